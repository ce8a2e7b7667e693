"""BitFit: the biases of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --config=experiments/quickstart/bitfit_kmnist.py \
      --workdir=runs/bitfit_kmnist

`:runlocal` does two steps. Hardware, wall time and result: README.md.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='selective.bitfit'), common.HEAD), lr=3e-3, arg=arg)
