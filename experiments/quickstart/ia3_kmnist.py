"""(IA)^3 in every block of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --config=experiments/quickstart/ia3_kmnist.py \
      --workdir=runs/ia3_kmnist

`:runlocal` does two steps. No result is recorded yet.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='scaling.ia3'), common.HEAD), lr=3e-3, arg=arg)
