"""Draws what is recorded in this folder: PNG files beside README.md.

  python -m experiments.lowrank.figures
"""

import os

from absl import app
import matplotlib
import numpy as np

from experiments.lowrank import decide
from experiments.lowrank import grid as grid_lib
from experiments.lowrank import rates as rates_lib
from peftjax import report

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # pylint: disable=wrong-import-position

CURVES = ('full', 'lora', 'lora_plus', 'dora', 'pissa', 'corda_ipm', 'eva',
          'lora_ga', 'lora_sb_r24', 'delora')


def _save(fig, folder, name):
  path = os.path.join(folder, f'{name}.png')
  fig.savefig(path, dpi=120)
  plt.close(fig)
  print(path)


def curves(rows, folder):
  """Mean validation loss against steps, a panel a task."""
  tasks = list(dict.fromkeys(r['task'] for r in rows))
  fig, axes = plt.subplots(1, len(tasks), figsize=(5.4 * len(tasks), 4),
                           squeeze=False, layout='constrained')
  for ax, task in zip(axes[0], tasks):
    for arm in CURVES:
      found = [r['curve'] for r in rows
               if r['task'] == task and r['arm'] == arm and r.get('curve')]
      if not found:
        continue
      steps = sorted(map(int, found[0]))
      values = np.array([[c[str(s)] for s in steps] for c in found])
      line, = ax.plot(steps, values.mean(0), label=arm)
      ax.fill_between(steps, values.min(0), values.max(0), alpha=0.15,
                      color=line.get_color())
    ax.set(xlabel='step', ylabel='validation loss', title=task)
    ax.grid(alpha=0.3)
  axes[0][-1].legend(fontsize=8)
  _save(fig, folder, 'curves')


def rates(rows, folder):
  """Accuracy against the learning rate, mean and range over seeds."""
  fig, ax = plt.subplots(figsize=(5.4, 4), layout='constrained')
  for method in rates_lib.METHODS:
    shown = []
    for rate in rates_lib.RATES:
      values = [r['score'] for r in rows
                if r['arm'] == rates_lib.arm(method, rate)]
      if values:
        shown.append((rate, np.mean(values), min(values), max(values)))
    if shown:
      rate, mean, low, high = (np.array(v) for v in zip(*shown))
      line, = ax.plot(rate, 100 * mean, marker='o', label=method)
      ax.fill_between(rate, 100 * low, 100 * high, alpha=0.15,
                      color=line.get_color())
  ax.set(xscale='log', xlabel='learning rate', ylabel='accuracy %',
         title='mpqa, 75 steps')
  ax.grid(alpha=0.3)
  ax.legend(fontsize=8)
  _save(fig, folder, 'rates')


def scatter(rows, folder):
  """Kept against learnt, a dot a seed."""
  fig, ax = plt.subplots(figsize=(5.4, 4), layout='constrained')
  for arm in dict.fromkeys(r['arm'] for r in rows):
    mine = [r for r in rows if r['arm'] == arm]
    ax.scatter([r['bits'] for r in mine], [r['keep'] for r in mine], label=arm)
  ax.set(xlabel='bits a byte on E2E (learnt)', yscale='log',
         ylabel='KL(base || tuned), nats a token (kept)')
  ax.grid(alpha=0.3)
  ax.legend(fontsize=8)
  _save(fig, folder, 'forget')


def versions(rows, folder):
  """Loss on both versions of the base, joined by lines.

  Not of the bases alone, which are far above all arms.
  """
  rows = [r for r in rows if r['arm'] != 'none']
  fig, ax = plt.subplots(figsize=(5.4, 4), layout='constrained')
  for i, arm in enumerate(dict.fromkeys(r['arm'] for r in rows)):
    for n, row in enumerate(r for r in rows if r['arm'] == arm):
      label = dict(label=arm) if not n else {}
      if 'bits_v1' in row:
        ax.plot((1, 2), (row['bits_v1'], row['bits']), marker='o',
                color=f'C{i}', **label)
      else:
        ax.plot(2, row['bits'], marker='*', color=f'C{i}', **label)
  ax.set(xticks=(1, 2), xlabel='version of the base',
         ylabel='bits a byte on E2E')
  ax.grid(alpha=0.3)
  ax.legend(fontsize=8)
  _save(fig, folder, 'updated_base')


def bars(rows, folder):
  """Intruders and effective rank beside their controls."""
  arms = list(dict.fromkeys(r['arm'] for r in rows))
  fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
  for ax, title, keys in (
      (axes[0], 'intruders among the first 10 directions', (
          ('adapter', 'intruders'), ('random, same rank and norm',
                                     'intruders_random'))),
      (axes[1], 'rank that holds 90 % of the change', (
          ('adapter', 'rank'), ('noise, same norm', 'rank_noise')))):
    for i, (label, key) in enumerate(keys):
      means = [np.mean([r[key] for r in rows if r['arm'] == a]) for a in arms]
      ax.bar(np.arange(len(arms)) + 0.4 * i, means, 0.4, label=label)
    ax.set(title=title, xticks=np.arange(len(arms)) + 0.2)
    ax.set_xticklabels(arms, rotation=20)
    ax.legend(fontsize=8)
  _save(fig, folder, 'intruders')


def draw(source, folder):
  """Draws into `folder` what is recorded in `source`."""
  rows = [r for task in grid_lib.TASKS
          for r in decide.grid_rows(task, source)[0]]
  if rows:
    curves(rows, folder)
    report.pareto(rows, os.path.join(folder, 'size.png'))
  spread = decide.recorded(rates_lib.get_config(), 'rates', source)[0]
  for found, make in ((spread, rates), (decide.stored('forget', source), scatter),
                      (decide.stored('updated_base', source), versions),
                      (decide.stored('intruders', source), bars)):
    if found:
      make(found, folder)


def main(argv):
  del argv
  draw(decide.FOLDER, decide.FOLDER)


if __name__ == '__main__':
  app.run(main)
