"""Writes the measured tables into README.md and docs/lowrank.md.

  python -m experiments.lowrank.pages

Reads what is recorded in this folder alone; arms that did not run are named.
"""

import os
import textwrap

from absl import app
import numpy as np

from experiments import tables
from experiments.lowrank import decide
from experiments.lowrank import grid as grid_lib
from experiments.lowrank import intruders
from experiments.lowrank import times as times_lib
from experiments.table import pivot
from peftjax import report

# Arms of ranks and controls that the claims need, and the page does not.
ASIDE = ('lora_r3', 'lora_xs_random', 'kasa_free', 'auto_lora_permuted',
         'lora_same', 'adalora_same', 'lora_r64', 'rslora_r64')
SAME = 0.05  # how far the size of an arm may be from LoRA's


def mean_sizes(rows):
  """Rows with the mean of their arm as `adapter` and `file`.

  Ranks and blocks that a run has found differ from seed to seed.
  """
  of = {}
  for r in rows:
    of.setdefault(r['arm'], []).append(r)
  mean = lambda r, key: round(float(np.mean([v[key] for v in of[r['arm']]])))
  return [dict(r, adapter=mean(r, 'adapter'), file=mean(r, 'file'))
          for r in rows]


def same_size(rows):
  """Rows of the arms that train as many numbers as LoRA, beside the head."""
  rows = mean_sizes(rows)
  size = next((r['adapter'] for r in rows if r['arm'] == 'lora'), 0)
  return [r for r in rows
          if size and abs(r['adapter'] / size - 1) <= SAME]


def gains(rows):
  """{arm: mean over its tasks of its accuracy less that of LoRA, in points}."""
  _, _, cells = pivot.means(rows)
  mean = {k: np.mean([r['score'] for r in v]) for k, v in cells.items()}
  out = {}
  for (arm, task), score in mean.items():
    out.setdefault(arm, []).append(
        100 * (score - mean.get(('lora', task), np.nan)))
  return {arm: float(np.mean(v)) for arm, v in out.items()}


def compared(rows, times=()):
  """The comparison as Markdown, the largest gain on LoRA first.

  The head is not counted. Ranks are of the arms that ran on every task; s/step
  are those of `times`, rows of times.py, where an arm has them there.
  """
  gain, lines = gains(rows), []
  for line in pivot.pivot([
      dict(r, trained=r['adapter'], stored=r['file'])
      for r in mean_sizes(rows)], times):
    names = list(line)
    at = names.index('mean rank')
    lines.append({**{n: line[n] for n in names[:at]},
                  'less LoRA': f'{gain[line[""]]:+.1f}',
                  **{n: line[n] for n in names[at:]}})
  return report.markdown(sorted(lines, key=lambda line: -gain[line['']]))


def absent(missing):
  """Which arms did not run on which task, as a sentence; '' for none."""
  lost = {}
  for cell in missing:
    task, arm, _ = cell.split('-')
    lost.setdefault(task, {})[arm] = None
  lines = [f'{task} without {", ".join(f"`{a}`" for a in arms)}'
           for task, arms in lost.items()]
  return textwrap.fill(f'Not run: {"; ".join(lines)}.', 80) if lines else ''


def forgotten(rows):
  """A line an arm: what was learnt and what was kept."""
  lines = []
  for arm in dict.fromkeys(r['arm'] for r in rows):
    mine = [r for r in rows if r['arm'] == arm]
    line = {'arm': arm}
    for title, key in (('bits a byte on E2E', 'bits'),
                       ('KL of the base, nats a token', 'keep')):
      values = [r[key] for r in mine]
      line[title] = f'{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}'
    lines.append(line)
  return report.markdown(lines)


def updated(rows):
  """A line an arm: the loss on both versions of the base."""
  lines = []
  for arm in dict.fromkeys(r['arm'] for r in rows):
    mine = [r for r in rows if r['arm'] == arm]
    line = {'arm': arm}
    for title, key in (('bits a byte, version 1', 'bits_v1'),
                       ('version 2, as it is', 'bits')):
      values = [r[key] for r in mine if key in r]
      line[title] = '-' if not values else f'{np.mean(values):.4f}'
      if len(values) > 1:
        line[title] += f' ± {np.std(values, ddof=1):.4f}'
    lines.append(line)
  return report.markdown(lines)


def main(argv):
  del argv
  here = os.path.join('experiments', 'lowrank', 'README.md')
  page = os.path.join('docs', 'lowrank.md')
  tables.fill(here, 'claims', report.markdown(decide.all_lines()))
  rows, missing = [], []
  timed = decide.recorded(times_lib.get_config(), 'times')[0]
  for task in grid_lib.TASKS:
    found, lost = decide.grid_rows(task)
    rows, missing = rows + found, missing + lost
  tables.fill(page, 'missing', absent(missing))
  if rows:
    tables.fill(here, 'arms', report.markdown(report.table(rows)))
    tables.fill(page, 'budget', compared(
        [r for r in rows if r['arm'] not in ASIDE], timed))
  if same_size(rows):
    tables.fill(page, 'size', compared(same_size(rows), timed))
  for name, make in (('forget', forgotten), ('updated_base', updated)):
    found = decide.stored(name)
    if found:
      tables.fill(here, name, make(found))
  found = decide.stored('intruders')
  if found:
    tables.fill(here, 'intruders', report.markdown(intruders.lines(found)))


if __name__ == '__main__':
  app.run(main)
