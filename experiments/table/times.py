r"""Steps of the table's arms timed by themselves, on a quiet machine.

  PEFTJAX_DATA=DATA python -m peftjax.compare \
      --config=experiments/table/times.py:text --workdir=runs/times_text

(`images` in the place of `text`.) The grids take hours and share the machine
with other work; their s/step say more of that than of the methods. Here every
arm does 24 steps of the first set, nothing is searched, and little is judged.
`:text,runlocal` does two steps.
"""

from experiments.table import images
from experiments.table import text

STEPS = 24
HALVES = {'text': text, 'images': images}


def get_config(arg=None):
  """The grid; `arg` is 'text' or 'images', then as in `common.parse_arg`.

  Raises:
    ValueError: another word in the first place.
  """
  half, _, rest = (arg or '').partition(',')
  if half not in HALVES:
    raise ValueError(f'times.py:{half}: expected times.py:text or '
                     'times.py:images')
  grid = HALVES[half].get_config(rest)
  if 'runlocal' not in rest.split(','):
    grid.base.steps = STEPS
    grid.base.data.validation = grid.base.data.test = 32
  grid.tasks, grid.seeds, grid.search = grid.tasks[:1], (0,), None
  return grid
