"""Writes the measured tables into README.md and the studies' READMEs.

  python -m experiments.tables

Reads only recorded results: experiments/quickstart/{main,results}.json,
experiments/claims/{results,energy}.json, experiments/table/{text,images}.json
(the results.json of their grids) and {text,images}_times.json (of times.py). A
table stands between the markers
<!-- NAME:begin --> and <!-- NAME:end -->; what has no recorded result is left
as it is.
"""

import json
import os

from absl import app

from experiments import rules
from experiments.claims import decide
from experiments.table import pivot
from peftjax import report


def fill(path, name, body):
  """Puts `body` between the markers of `name` in a file.

  Raises:
    ValueError: the file does not have both markers once.
  """
  with open(path, encoding='utf-8') as f:
    text = f.read()
  begin, end = f'<!-- {name}:begin -->', f'<!-- {name}:end -->'
  if text.count(begin) != 1 or text.count(end) != 1:
    raise ValueError(f'{path}: expected {begin} and {end} once each')
  head, rest = text.split(begin)
  with open(path, 'w', encoding='utf-8') as f:
    f.write(f'{head}{begin}\n{body.strip()}\n{end}{rest.split(end)[1]}')


def quickstart(run):
  """The main job's table from main.json."""
  total = run['arms']['full fine-tuning']['trained']
  lines = [{
      '': name, 'accuracy before': f'{100 * s["before"]["accuracy"]:.1f} %',
      'after': f'{100 * s["after"]["accuracy"]:.1f} %',
      'trained parameters': f'{s["trained"]:,}',
      'share': f'{100 * s["trained"] / total:.2f} %',
      'step': f'{1000 / s["steps_per_second"]:.0f} ms'}
           for name, s in run['arms'].items()]
  return report.markdown(lines) + (
      f'\n{run["seconds"]} s in all, evaluation and compilation included. '
      'Folded and adapted outputs differ by at most '
      f'{run["fold"]["max_abs"]:.1e}, {run["fold"]["max_ulp"]:.0f} units in the '
      'last place.\n')


def claims(rows):
  """One line a claim: rule, numbers, verdict."""
  return report.markdown(rules.table(decide.CLAIMS, rows))


def energy(rows):
  """Energy and Gram changes of trained kernels."""
  return report.markdown([{
      'arm': r['arm'], 'seeds': str(len(r['energy'])),
      'relative change of energy':
          f'{min(r["energy"]):.1e} to {max(r["energy"]):.1e}',
      'largest relative change of a Gram matrix': f'{max(r["gram"]):.1e}'}
                          for r in rows])


def table(half):
  """What makes the table of all methods on many sets, with its timed steps."""
  def make(rows):
    path = f'experiments/table/{half}_times.json'
    times = ()
    if os.path.exists(path):
      with open(path, encoding='utf-8') as f:
        times = json.load(f)
    return report.markdown(pivot.pivot(rows, times))
  return make


def main(argv):
  del argv
  for path, targets in (
      ('experiments/quickstart/main.json', (
          ('README.md', 'quickstart', quickstart),)),
      ('experiments/quickstart/results.json', (
          ('README.md', 'results', lambda r: report.markdown(report.table(r))),
          ('experiments/quickstart/README.md', 'results',
           lambda r: report.markdown(report.table(r))))),
      ('experiments/claims/results.json', (
          ('experiments/claims/README.md', 'claims', claims),
          ('experiments/claims/README.md', 'arms',
           lambda r: report.markdown(report.table(r))))),
      ('experiments/claims/energy.json', (
          ('experiments/claims/README.md', 'energy', energy),)),
      ('experiments/table/text.json', (
          ('experiments/README.md', 'text', table('text')),)),
      ('experiments/table/images.json', (
          ('experiments/README.md', 'images', table('images')),))):
    if not os.path.exists(path):
      print(f'{path}: not recorded')
      continue
    with open(path, encoding='utf-8') as f:
      data = json.load(f)
    for file, name, make in targets:
      fill(file, name, make(data))
      print(f'{file}: {name}')


if __name__ == '__main__':
  app.run(main)
