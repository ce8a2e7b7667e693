"""DeLoRA on every kernel of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --config=experiments/quickstart/delora_kmnist.py \
      --workdir=runs/delora_kmnist

`:runlocal` does two steps.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='lowrank.delora', rank=8), common.HEAD), lr=3e-3,
      arg=arg)
