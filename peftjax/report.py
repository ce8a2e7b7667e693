"""Tables, intervals and plots of comparison rows; no training here.

A row is one finished run: dict(arm, task, seed, lr, metric, score, trained,
...), where metric is the name of what score is, as in `measures`.
"""

import csv
import json
import os

import matplotlib
import numpy as np
from scipy import stats

from peftjax import measures


def interval(values, level=0.95):
  """Mean and half-width of the t interval over runs; nan half-width for one."""
  values = np.asarray(values, float)
  if len(values) < 2:
    return float(values.mean()), float('nan')
  width = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
  return float(values.mean()), float(width)


def group(rows):
  """{(task, arm): rows} in the order of the rows."""
  groups = {}
  for row in rows:
    groups.setdefault((row['task'], row['arm']), []).append(row)
  return groups


def paired(rows, arm, other, key='score'):
  """Seed-paired difference arm - other, averaged over tasks first.

  Returns:
    (mean, low, high, number of seeds) of the 95 % t interval over seeds.

  Raises:
    ValueError: an unknown arm, or seeds that the two arms do not share.
  """
  by_seed = {}
  for name, sign in ((arm, 1), (other, -1)):
    mine = [r for r in rows if r['arm'] == name]
    if not mine:
      raise ValueError(f'no rows of arm {name!r}; there are '
                       f'{sorted({r["arm"] for r in rows})}')
    for r in mine:
      by_seed.setdefault(r['seed'], {}).setdefault(r['task'], []).append(
          sign * r[key])
  for seed, tasks in by_seed.items():
    if any(len(v) != 2 for v in tasks.values()):
      raise ValueError(f'seed {seed}: not every task has both {arm} and {other}')
  diffs = [np.mean([sum(v) for v in tasks.values()])
           for tasks in by_seed.values()]
  mean, width = interval(diffs)
  return mean, mean - width, mean + width, len(diffs)


def title(metric):
  """Name of a metric as a column shows it: 'accuracy %', 'perplexity'."""
  return f'{metric} %' if measures.scale(metric) == 100 else metric


def table(rows):
  """[{column: text}], one line a task and arm.

  The score's column has the metric's name where all rows share one, else
  'score' beside a column with the names.
  """
  lines, names = [], {r['metric'] for r in rows}
  for (task, arm), mine in group(rows).items():
    metric = mine[0]['metric']
    mean, width = interval([r['score'] for r in mine])
    shown = {} if len(names) == 1 else {'metric': title(metric)}
    shown['score' if shown else title(metric)] = (
        f'{measures.scale(metric) * mean:.2f}')
    lines.append({
        'task': task, 'arm': arm, **shown,
        '± 95 %': f'{measures.scale(metric) * width:.2f}',
        'seeds': str(len(mine)),
        'trained': f'{mine[0]["trained"]:,}', 'stored': f'{mine[0]["stored"]:,}',
        'lr': f'{mine[0]["lr"]:.2g}',
        's/step': f'{np.median([r["step_seconds"] for r in mine]):.3f}',
        'peak MiB': f'{mine[0]["peak_bytes"] / 2**20:.0f}'})
  return lines


def markdown(lines):
  """A list of {column: text} as a Markdown table."""
  names = list(lines[0])
  out = ['| ' + ' | '.join(names) + ' |', '|' + '---|' * len(names)]
  out += ['| ' + ' | '.join(line[n] for n in names) + ' |' for line in lines]
  return '\n'.join(out) + '\n'


def pareto(rows, path):
  """Draws scores against trained parameters with intervals; PNG, a plot a task.

  The line joins the arms that no other arm beats with fewer parameters.
  """
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt  # after the backend is chosen
  tasks = list(dict.fromkeys(r['task'] for r in rows))
  fig, axes = plt.subplots(
      1, len(tasks), figsize=(6.4 * len(tasks), 4.4), squeeze=False,
      layout='constrained')
  for ax, task in zip(axes[0], tasks):
    metric = next(r['metric'] for r in rows if r['task'] == task)
    scale, sign = measures.scale(metric), measures.better(metric)
    points = []
    for (t, arm), mine in group(rows).items():
      if t == task:
        mean, width = interval([r['score'] for r in mine])
        points.append((mine[0]['trained'], scale * mean,
                       0 if np.isnan(width) else scale * width, arm))
    points.sort()
    front, best = [], -np.inf
    for n, mean, _, _ in points:
      if sign * mean > best:
        front.append((n, mean))
        best = sign * mean
    ax.plot(*zip(*front), color='0.8', zorder=0)
    for i, (n, mean, width, arm) in enumerate(points):
      ax.errorbar(n, mean, yerr=width, fmt='o', capsize=3, color=f'C{i % 10}')
      ax.annotate(arm, (n, mean), textcoords='offset points', xytext=(6, 5),
                  fontsize=8)
    ax.set(xscale='log', xlabel='trained parameters', ylabel=title(metric),
           title=f'{task}: {metric} against trained parameters')
    ax.grid(alpha=0.3)
  fig.savefig(path, dpi=120)
  plt.close(fig)


def write(rows, folder):
  """Writes results.json, results.csv, table.md and pareto.png; their paths."""
  os.makedirs(folder, exist_ok=True)
  paths = [os.path.join(folder, n) for n in (
      'results.json', 'results.csv', 'table.md', 'pareto.png')]
  with open(paths[0], 'w') as f:
    json.dump(rows, f, indent=1)
    f.write('\n')
  with open(paths[1], 'w', newline='') as f:
    names = [n for n in rows[0] if n not in ('metrics', 'search', 'curve')]
    writer = csv.DictWriter(f, names, extrasaction='ignore')
    writer.writeheader()
    writer.writerows(rows)
  with open(paths[2], 'w') as f:
    f.write(markdown(table(rows)))
  pareto(rows, paths[3])
  return paths
