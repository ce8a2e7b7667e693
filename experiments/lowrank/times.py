r"""Steps of the grid's arms timed by themselves.

  PEFTJAX_DATA=DATA python -m experiments.lowrank.prepare
  PEFTJAX_DATA=DATA python -m peftjax.compare --workdir=runs/lowrank_times \
      --config=experiments/lowrank/times.py \
      --record=experiments/lowrank/times_cells.json

The grid takes hours and shares the machine with other work; its s/step say more
of that than of the methods. Here every arm does 24 steps of mpqa, nothing is
searched, and little is judged. `arms=lora+dora` as in grid.py, `:runlocal` does
two steps.
"""

from experiments import common
from experiments.lowrank import grid as grid_lib

STEPS = 24


def get_config(arg=None):
  """The grid; `arg` as of grid.py, without a task."""
  given = common.parse_arg(common.choose(arg, arms='')[1])
  small = given.get('runlocal')
  grid = grid_lib.get_config(
      ','.join(filter(None, ('' if small else 'task=mpqa', arg))))
  grid.base.eval_every, grid.base.watch_split = 0, ''
  if not small:
    grid.base.steps = given.get('steps', STEPS)
    grid.base.data.validation = grid.base.data.test = 32
  grid.seeds, grid.search = (0,), None
  return grid
