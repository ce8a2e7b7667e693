"""VeRA on every kernel of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --workdir=runs/vera_kmnist \
      --config=experiments/quickstart/vera_kmnist.py

`:runlocal` does two steps.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='lowrank.vera', rank=256),
              common.HEAD), lr=1e-2, arg=arg)
