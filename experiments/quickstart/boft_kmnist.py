"""BOFT(2, 8) on every kernel of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --config=experiments/quickstart/boft_kmnist.py \
      --workdir=runs/boft_kmnist

`:runlocal` does two steps. Hardware, wall time and result: README.md.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='orthogonal.boft', block_size=8, factors=2),
              common.HEAD), lr=3e-3, arg=arg)
