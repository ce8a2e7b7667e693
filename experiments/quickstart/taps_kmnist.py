"""TAPS on every kernel of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --workdir=runs/taps_kmnist \
      --config=experiments/quickstart/taps_kmnist.py

`:runlocal` does two steps.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='lowrank.taps', warmup=8),
              common.HEAD), lr=3e-4, arg=arg)
