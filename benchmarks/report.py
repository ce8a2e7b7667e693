"""Tables and charts of what benchmarks/step.py recorded.

  python -m benchmarks.report benchmarks/step_encoder.json ...   # as Markdown
  python -m benchmarks.report         # all of them, into benchmarks/README.md
"""

import importlib.metadata
import json
import pathlib
import sys

from rich import table as rich_table

# Heading -> cell of a row.
_MB = 2**20


def _ratio(row, key, quartiles):
  if key not in row:
    return ''
  low, high = row[quartiles]
  return f'{row[key]:.2f} ({low:.2f} to {high:.2f})'


def _traffic(row):
  found = row.get('collectives', {}).get('all-reduce')
  return '' if found is None else f'{found[1] / _MB:.2f}'


COLUMNS = {
    'trained': lambda r: f'{r["trained"]:,}',
    'ms': lambda r: f'{1000 * r["seconds"]:.1f}' if 'seconds' in r else '',
    '/ full': lambda r: _ratio(r, 'ratio', 'quartiles'),
    'PEFT ms': lambda r: f'{1000 * r["torch_seconds"]:.1f}'
                         if 'torch_seconds' in r else '',
    '/ PEFT': lambda r: _ratio(r, 'torch_ratio', 'torch_quartiles'),
    'GFLOP': lambda r: f'{r["gflop"]:.2f}',
    '/ bound': lambda r: f'{r["flop_ratio"]:.3f}' if 'flop_ratio' in r else '',
    'of a product': lambda r: f'{r["share_of_product"]:.2f}'
                              if 'share_of_product' in r else '',
    'temp MiB': lambda r: f'{r["temp"] / _MB:.0f}',
    'peak MiB': lambda r: f'{r["peak"] / _MB:.0f}',
    'PEFT peak MiB': lambda r: f'{r["torch_peak"] / _MB:.0f}'
                               if r.get('torch_peak') else '',
    'weight-shaped MiB': lambda r: f'{r["weight_shaped"] / _MB:.1f}',
    'all-reduce MiB': _traffic}


# What a step on a CPU was meant to reach: {column: {arm: at most}}.
TARGETS = {
    'flop_ratio': dict(lora=1.02, ia3=1.02, ssf=1.02, bitfit=1.02, oft=1.05,
                       boft=1.05),
    'ratio': dict(lora=0.75, ssf=0.75, bitfit=0.75, ia3=0.75, oft=0.85,
                  boft=1.0),
    'torch_ratio': dict(lora=0.9, oft=0.8, dora=0.7, ia3=1.0, boft=0.25,
                        prefix=1.0, prompt=1.0)}
_MEANT = dict(flop_ratio='FLOPs / bound', ratio='time / full',
              torch_ratio='time / PEFT')


def targets(results):
  """A Markdown table of `TARGETS` and what each of the results reached."""
  lines = [f'| | arm | at most | {" | ".join(r["model"] for r in results)} |',
           '| --- | --- | ---: |' + ' ---: |' * len(results)]
  for key, meant in TARGETS.items():
    for arm, most in meant.items():
      got = [r['arms'].get(arm, {}).get(key) for r in results]
      cells_ = ['' if v is None else f'{v:.3f}' if key == 'flop_ratio'
                else f'{v:.2f}' for v in got]
      cells_ = [c + ' reached' if v is not None and v <= most else c
                for c, v in zip(cells_, got)]
      lines.append(f'| {_MEANT[key]} | {arm} | {most:g} | '
                   f'{" | ".join(cells_)} |')
  return '\n'.join(lines)


def title(result):
  """One line on what was measured, and on what."""
  return (f'{result["model"]}, {result["batch"]} x {result["tokens"]} tokens, '
          f'{result["dtype"]}; {result["device"]}, {result["cpus"]} cores; '
          + ', '.join(f'{k} {v}' for k, v in result['versions'].items())
          + f'; commit {result["commit"]}')


def versions():
  """{package: version} of those that are there."""
  found = {}
  for name in ('jax', 'torch', 'transformers', 'peft'):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return found


def cells(result):
  """(headings, rows of strings); columns that nobody fills are left out."""
  rows = [[name, *(f(row) for f in COLUMNS.values())]
          for name, row in result['arms'].items()]
  heads = ['', *COLUMNS]
  keep = [i for i in range(len(heads)) if i == 0 or any(r[i] for r in rows)]
  return [heads[i] for i in keep], [[r[i] for i in keep] for r in rows]


def table(result):
  """A rich table."""
  heads, rows = cells(result)
  out = rich_table.Table(title=title(result))
  for i, head in enumerate(heads):
    out.add_column(head, justify='right' if i else 'left')
  for row in rows:
    out.add_row(*row)
  return out


def markdown(result):
  """The same as Markdown."""
  heads, rows = cells(result)
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  return '\n'.join([line(heads), line(['---'] + ['---:'] * (len(heads) - 1)),
                    *map(line, rows)])


def chart(result, path):
  """Bars: the time of a step of every arm, in both libraries."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  timed = {n: r for n, r in result['arms'].items() if 'seconds' in r}
  if not timed:
    return
  figure, axes = plt.subplots(figsize=(1.2 + 0.75 * len(timed), 3.2))
  for key, shift, color, label in (
      ('seconds', -0.2, '#3465a4', 'peftjax'),
      ('torch_seconds', 0.2, '#f0a030', 'PEFT on torch')):
    there = [(i, 1000 * r[key]) for i, r in enumerate(timed.values())
             if key in r]
    if there:
      axes.bar([i + shift for i, _ in there], [v for _, v in there], 0.38,
               color=color, label=label)
  axes.set_xticks(range(len(timed)), timed, rotation=30, ha='right')
  axes.set_ylabel('ms a step')
  axes.set_title(f'{result["model"]}, {result["batch"]} x {result["tokens"]} '
                 f'tokens, {result["dtype"]}', fontsize=9)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False, fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=120, metadata=dict(Software=None))
  plt.close(figure)


def written(text, results):
  """README text with the tables between the markers of their files replaced."""
  for name, result in results.items():
    text = _put(text, name, f'{title(result)}\n\n{markdown(result)}')
  cpu = [r for r in results.values() if r['device'].startswith('cpu')]
  return _put(text, 'targets', targets(cpu)) if cpu else text


def _put(text, name, table_):
  begin, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
  if begin not in text or end not in text:
    raise ValueError(f'README.md has no {begin} ... {end}')
  head, rest = text.split(begin)
  return f'{head}{begin}\n{table_}\n{end}{rest.split(end)[1]}'


def main():
  """Prints the tables of files; without any, puts all into README.md."""
  here = pathlib.Path(__file__).parent
  paths = [pathlib.Path(p) for p in sys.argv[1:]]
  found = {p.name: json.loads(p.read_text(encoding='utf-8'))
           for p in paths or sorted(here.glob('step_*.json'))}
  if not paths:
    readme = here / 'README.md'
    text = written(readme.read_text(encoding='utf-8'), found)
    readme.write_text(text, encoding='utf-8')
  for result in found.values() if paths else ():
    print(f'{title(result)}\n\n{markdown(result)}\n')


if __name__ == '__main__':
  main()
