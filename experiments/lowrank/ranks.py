r"""AutoLoRA's ranks, searched once a task; the arms of grid.py that retrain them.

  PEFTJAX_DATA=DATA python -m peftjax.compare --workdir=runs/lowrank_ranks \
      --config=experiments/lowrank/ranks.py \
      --record=experiments/lowrank/ranks_cells.json
  python -m experiments.lowrank.ranks

The search (rank 8, 180 steps, the rate chosen as in grid.py, seed 0) is a run
of its own, so that what follows differs in the ranks alone: plain LoRA with the
ranks found, with the same ranks at other kernels (a random permutation), with
equal ranks of the same sum, and AdaLoRA with that budget. The second command
writes ranks.json, which grid.py reads; without it grid.py has no such arms.
`:runlocal` does two steps.
"""

import json
import os

from absl import app
from absl import flags
import numpy as np

from experiments.lowrank import grid as grid_lib
from experiments.lowrank import stories
from experiments.lowrank.arms import RANKS
from peftjax.artifact import load_adapter
from peftjax.fold import load_base
from peftjax.sites import describe, kernels


def get_config(arg=None):
  """The grid; `arg` as of grid.py, without arms."""
  grid = grid_lib.get_config(','.join(filter(None, ('arms=auto_search', arg))))
  grid.base.eval_every, grid.base.watch_split = 0, ''
  grid.seeds = (0,)
  return grid


def found(adapter, paths):
  """{path of a kernel: the rank that a search left it}, 0 where it has none."""
  theta = load_adapter(adapter).theta['auto_lora']
  return {p: int(theta[p]['a'].shape[-1]) if p in theta else 0 for p in paths}


def main(argv):
  del argv
  out = {}
  for task in grid_lib.TASKS:
    adapter, = stories.adapters(_WORKDIR.value, task, 'auto_search').values()
    meta = load_adapter(adapter).meta
    base, (args, kwargs), _ = load_base(adapter, meta, meta['base']['weights'])
    sites = describe(base.model, *args, **kwargs)
    out[task] = found(adapter, [p for p, s in sites.items() if kernels(s)])
    values = np.array(list(out[task].values()))
    print(f'{task}: {values.sum()} ranks, {values.min()} to {values.max()}')
  with open(RANKS, 'w', encoding='utf-8') as f:
    json.dump(out, f, indent=1)
    f.write('\n')


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_string(
      'workdir', 'runs/lowrank_ranks', 'The finished search.')
  app.run(main)
