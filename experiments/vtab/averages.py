"""Both averages of VTAB-1k, because papers mix them up.

  python -m experiments.vtab.averages --rows=runs/vtab/results.json

Prints for every arm the mean of its tasks, and the mean of the means of the
groups natural, specialised and structured (`peftjax.data.vtab.GROUPS`), in %.
With tasks missing, both stand with the number of tasks that there are, and are
not comparable with papers.
"""

import json

from absl import app
from absl import flags
import numpy as np

from peftjax import report
from peftjax.data.vtab import GROUPS, VTAB


def averages(rows):
  """[{arm, tasks, mean of tasks, mean of groups, each group}] of a grid's rows.

  Seeds are averaged first. The mean of groups is None where a group is empty.

  Raises:
    ValueError: a task that VTAB does not have.
  """
  scores = {}
  for row in rows:
    if row['task'] not in VTAB:
      raise ValueError(f'task {row["task"]!r} is not one of VTAB: '
                       f'{", ".join(VTAB)}')
    scores.setdefault(row['arm'], {}).setdefault(row['task'], []).append(
        row['score'])
  lines = []
  for arm, tasks in scores.items():
    means = {t: float(np.mean(v)) for t, v in tasks.items()}
    groups = {g: [means[t] for t in names if t in means]
              for g, names in GROUPS.items()}
    each = {g: float(np.mean(v)) if v else None for g, v in groups.items()}
    whole = None if None in each.values() else float(
        np.mean(list(each.values())))
    lines.append(dict(arm=arm, tasks=len(means),
                      mean_of_tasks=float(np.mean(list(means.values()))),
                      mean_of_groups=whole, **each))
  return lines


def main(argv):
  del argv
  with open(_ROWS.value, encoding='utf-8') as f:
    lines = averages(json.load(f))
  text = lambda v: '' if v is None else (
      f'{100 * v:.2f}' if isinstance(v, float) else str(v))
  print(report.markdown([{k: text(v) for k, v in line.items()}
                         for line in lines]))


if __name__ == '__main__':
  _ROWS = flags.DEFINE_string('rows', None, 'results.json of a grid.',
                              required=True)
  app.run(main)
