"""LoftQ of 2 bits on every kernel of vit_s, and a new head, Kuzushiji-MNIST.

  python -m peftjax.train --config=experiments/quickstart/loftq_kmnist.py \
      --workdir=runs/loftq_kmnist

`:runlocal` does two steps.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='quantised.loftq', rank=8, bits=2), common.HEAD),
      lr=1e-3, arg=arg)
