"""COFT on every kernel of vit_s, and a new head, on Kuzushiji-MNIST.

As oft_kmnist.py, with the rotations kept within a radius of the identity.

  python -m peftjax.train --config=experiments/quickstart/coft_kmnist.py \
      --workdir=runs/coft_kmnist

`:runlocal` does two steps. Hardware, wall time and result: README.md.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='orthogonal.coft', eps=0.5, block_size=16),
              common.HEAD), lr=3e-3, arg=arg)
