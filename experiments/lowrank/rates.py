r"""DeLoRA against the learning rate, beside LoRA and DoRA.

  PEFTJAX_DATA=DATA python -m experiments.lowrank.prepare
  PEFTJAX_DATA=DATA python -m peftjax.compare --workdir=runs/lowrank_rates \
      --config=experiments/lowrank/rates.py \
      --record=experiments/lowrank/rates_cells.json

mpqa as in grid.py, 75 steps, nine rates half a decade apart, three seeds, no
search: an arm is a method at a rate. Only `optim.lr` varies: DeLoRA's strength
keeps the rate of its group. Cells that diverge are failures of the grid and
count as outside. `arms=delora` runs one method, `:runlocal` two steps
of one rate.
"""

import os

import ml_collections

from experiments import common
from experiments.lowrank import arms as arms_lib
from experiments.lowrank import grid as grid_lib

METHODS = ('lora', 'dora', 'delora')
RATES = tuple(10 ** (-4.5 + 0.5 * i) for i in range(9))


def arm(method, rate):
  return f'{method}@{rate:.2g}'


def get_config(arg=None):
  """The grid; `arg` holds arms, and what `common.parse_arg` takes."""
  chosen, rest = common.choose(arg, arms='')
  grid = grid_lib.get_config(
      f'task=mpqa,{rest}' if 'runlocal' not in rest else rest)
  given = common.parse_arg(rest)
  small = given.pop('runlocal', False)
  grid.base.eval_every, grid.base.watch_split = 0, ''
  if 'steps' not in given:
    grid.base.steps = 75
  arms = {}
  for name in common.pick(chosen['arms'], METHODS, 'arms'):
    (_, change), = arms_lib.of(name, small)
    arms |= {arm(name, rate): {**change, 'optim.lr': rate}
             for rate in (RATES[3:4] if small else RATES)}
  grid.arms, grid.search = tuple(arms.items()), None
  return grid


def widths(rows, method, within=0.02):
  """{seed: decades of rates that come within so much of the best of a method}.

  Half a decade a rate, so half a decade more than from the first such rate to
  the last. The best is each seed's own, on the test rows.
  """
  score = {}
  for row in rows:
    name, _, rate = row['arm'].partition('@')
    if name == method:
      score.setdefault(row['seed'], {})[rate] = row['score']
  return {seed: 0.5 * sum(max(of.values()) - v <= within for v in of.values())
          for seed, of in score.items()}
