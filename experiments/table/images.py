r"""The table's image half: every method on vit_s and five sets.

  python -m experiments.table.halves --data_dir=DATA --out=runs/halves
  PEFTJAX_DATA=DATA python -m peftjax.compare \
      --config=experiments/table/images.py --workdir=runs/table_images \
      --record=experiments/table/images_cells.json

800 training images (pets5: 480), 200 to choose a rate by (pets5: 120), at most
1000 to test on. vit_s
has never seen kmnist, omniglot100 and cifar10. It was pretrained on eurosat's
and pets5's training images and on every second test image: of these two the
other half is the test part, which the first command writes, and what they show
is adaptation to a set that the base knows. Search and seeds as in text.py.
Hardware, wall time and results: experiments/README.md. `:runlocal` does two
steps a cell on images that come with the package.
"""

import ml_collections

from experiments import common
from experiments.table import arms

TASKS = (
    ('kmnist', {'data.name': 'kmnist'}),
    ('omniglot100', {'data.name': 'omniglot100'}),
    ('cifar10', {'data.name': 'data:cifar10'}),
    ('eurosat', {'data.name': 'file:runs/halves/eurosat.npz', 'data.test': 0}),
    ('pets5', {'data.name': 'file:runs/halves/pets5.npz', 'data.train': 480,
               'data.test': 0}),
)


def get_config(arg=None):
  """The grid; `arg` as in `common.parse_arg`."""
  given = common.parse_arg(arg)
  small = given.pop('runlocal', False)
  base = common.base()
  base.method = (common.HEAD,)
  base.steps, base.batch = 100, 16
  base.data.test = 1000
  base.model.scan = small
  base.eval_before = False
  base.checkpoint_every = 0
  for key, value in given.items():
    common.put(base, key, value)
  grid = ml_collections.ConfigDict()
  grid.base = base
  grid.arms = arms.of(
      {'LoRA': 1e-2, 'OFT': 3e-3, 'BOFT': 3e-3, 'BitFit': 1e-2, 'SSF': 1e-2,
       'diff pruning': 3e-3, 'full': 1e-3}, ('kernel', 'bias', 'scale', 'pos'))
  grid.tasks = TASKS[1:2] if small else TASKS
  grid.seeds = (0,) if small else (0, 1, 2)
  grid.search = None if small else dict(
      rates=(1 / 3, 1.0, 3.0), fraction=0.3, seed=0)
  return grid
