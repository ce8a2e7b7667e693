"""Every method on the quickstart task: accuracy against trained parameters.

  python -m peftjax.compare --config=experiments/quickstart/all_methods.py \
      --workdir=runs/all_methods

Every arm searches three learning rates, a factor 3 apart, by half-length runs on
seed 0 judged on the validation part; the best then runs at full length on three
seeds, and only these read the test part. Hardware, wall time and results:
experiments/quickstart/README.md. `:runlocal` does two steps a cell.
"""

import ml_collections

from experiments import common

# (arm, method, centre of the learning-rate search)
ARMS = (
    ('head', (common.HEAD,), 1e-2),
    ('lora', (dict(name='lowrank.lora', rank=8), common.HEAD), 1e-2),
    ('oft', (dict(name='orthogonal.oft', block_size=16), common.HEAD), 1e-2),
    ('coft', (dict(name='orthogonal.coft', block_size=16), common.HEAD), 1e-2),
    ('boft', (dict(name='orthogonal.boft', block_size=8, factors=2),
              common.HEAD), 1e-2),
    ('ssf', (dict(name='scaling.ssf'), common.HEAD), 1e-2),
    ('bitfit', (dict(name='selective.bitfit'), common.HEAD), 1e-2),
    ('diff_pruning', (dict(name='sparse.diff_pruning'), common.HEAD), 3e-3),
    ('full', (dict(name='selective.full'),), 1e-3),
)


def get_config(arg=None):
  """The grid; `arg` as in `common.parse_arg`."""
  small = common.parse_arg(arg).get('runlocal', False)
  grid = ml_collections.ConfigDict()
  grid.base = common.kmnist(method=(common.HEAD,), lr=1e-3, arg=arg)
  grid.arms = tuple((name, {'method': method, 'optim.lr': lr})
                    for name, method, lr in ARMS)
  grid.tasks = (('kmnist', {}),)
  grid.seeds = (0,) if small else (0, 1, 2)
  grid.search = None if small else dict(
      rates=(1 / 3, 1.0, 3.0), fraction=0.5, seed=0)
  return grid
