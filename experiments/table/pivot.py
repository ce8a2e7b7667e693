"""The table of a grid: a line an arm, a column a task, ranks, costs.

  python -m experiments.table.pivot --rows=runs/table_text/results.json

prints it; `python -m experiments.tables` writes it into experiments/README.md.
"""

import json

from absl import app
from absl import flags
import numpy as np
from scipy import stats

from peftjax import report


def means(rows):
  """(arms, tasks, {(arm, task): rows}) in the order of the rows."""
  cells = {}
  for row in rows:
    cells.setdefault((row['arm'], row['task']), []).append(row)
  arms = list(dict.fromkeys(a for a, _ in cells))
  tasks = list(dict.fromkeys(t for _, t in cells))
  return arms, tasks, cells


def ranks(rows):
  """{arm: mean over tasks of its rank by mean score}, 1 the best; ties share.

  Arms that lack a task are left out.
  """
  arms, tasks, cells = means(rows)
  arms = [a for a in arms if all((a, t) in cells for t in tasks)]
  score = np.array([[np.mean([r['score'] for r in cells[a, t]]) for t in tasks]
                    for a in arms])
  each = stats.rankdata(-score, axis=0)
  return dict(zip(arms, each.mean(1)))


def pivot(rows, times=()):
  """[{column: text}]: mean ± standard deviation over seeds in every cell.

  times: Rows of a grid of times.py, whose s/step stand in the place of the
    grid's own.
  """
  arms, tasks, cells = means(rows)
  metric = {r['task']: r['metric'] for r in rows}
  order = ranks(rows)
  lines = []
  for arm in arms:
    line = {'': arm}
    for task in tasks:
      found = [100 * r['score'] for r in cells.get((arm, task), [])]
      name = f'{task} ({metric[task]})'
      line[name] = ''
      if found:
        line[name] = f'{np.mean(found):.1f}'
      if len(found) > 1:
        line[name] += f' ± {np.std(found, ddof=1):.1f}'
    mine = [r for r in rows if r['arm'] == arm]
    timed = [r for r in times if r['arm'] == arm] or mine
    line |= {
        'mean rank': f'{order[arm]:.1f}' if arm in order else '',
        'trained': f'{min(r["trained"] for r in mine):,}',
        'stored': f'{min(r["stored"] for r in mine):,}',
        's/step': f'{np.median([r["step_seconds"] for r in timed]):.2f}',
        'peak MiB': f'{max(r["peak_bytes"] for r in mine) / 2**20:.0f}'}
    lines.append(line)
  return lines


def main(argv):
  del argv
  with open(_ROWS.value, encoding='utf-8') as f:
    print(report.markdown(pivot(json.load(f))))


if __name__ == '__main__':
  _ROWS = flags.DEFINE_string('rows', None, 'results.json of a grid.',
                              required=True)
  app.run(main)
