"""Prints what every method can do, as measured.

  python -m peftjax.methods           # a table
  python -m peftjax.methods --write   # the same into README.md
"""

import os

from absl import app
from absl import flags
import rich.console
import rich.table

from peftjax import capabilities

WRITE = flags.DEFINE_bool('write', False, 'Whether to update the README.')
README = flags.DEFINE_string('readme', 'README.md', 'The README.')

BEGIN, END = '<!-- methods:begin -->', '<!-- methods:end -->'


def replace(text, table):
  """`text` with `table` between the two markers.

  Raises:
    ValueError: a text without the markers.
  """
  for marker in (BEGIN, END):
    if text.count(marker) != 1:
      raise ValueError(
          f'expected the marker {marker!r} once, found it {text.count(marker)} '
          'times')
  head, rest = text.split(BEGIN)
  return f'{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}'


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  if WRITE.value:
    if not os.path.exists(README.value):
      raise app.UsageError(f'no file {README.value!r}: run this in the folder '
                           'of the README, or name it by --readme')
    with open(README.value, encoding='utf-8') as f:
      text = f.read()
    text = replace(text, capabilities.markdown('docs/methods/'))
    with open(README.value, 'w', encoding='utf-8') as f:
      f.write(text)
  table = rich.table.Table(*(c.replace('`', '') for c in capabilities.COLUMNS))
  for row in capabilities.rows():
    table.add_row(*(cell.replace('`', '') for cell in row.cells()))
  console = rich.console.Console()
  if not console.is_terminal:  # a pipe has no width to wrap at
    console = rich.console.Console(width=200)
  console.print(table)


if __name__ == '__main__':
  app.run(main)
