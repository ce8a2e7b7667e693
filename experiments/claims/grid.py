"""The grid behind the claims: the quickstart's arms and their controls.

  python -m peftjax.compare --config=experiments/claims/grid.py \
      --workdir=runs/all_methods
  python -m experiments.claims.decide --rows=runs/all_methods/results.json

It shares its folder, and so its finished cells, with
experiments/quickstart/all_methods.py. Controls: `random_mask` trains 0.5 % of
the backbone's entries, chosen at random: as many as diff pruning keeps, and 3 %
more than there are biases; `lora_r4` is the LoRA nearest to OFT and BOFT in
size. Results: experiments/claims/README.md. `:runlocal` does two steps a cell.
"""

from experiments import common
from experiments.quickstart import all_methods

CONTROLS = (
    ('lora_r4', (dict(name='lowrank.lora', rank=4), common.HEAD), 1e-2),
    ('random_mask', (dict(name='sparse.random_mask', density=0.005),
                     common.HEAD), 1e-2),
)


def get_config(arg=None):
  """The grid; `arg` as in `common.parse_arg`."""
  grid = all_methods.get_config(arg)
  grid.arms = grid.arms + tuple(
      (name, {'method': method, 'optim.lr': lr})
      for name, method, lr in CONTROLS)
  return grid
