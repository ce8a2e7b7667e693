"""QLoRA on vit_s: LoRA on kernels of 4 bits, and a new head, Kuzushiji-MNIST.

  python -m peftjax.train --config=experiments/quickstart/nf4_kmnist.py \
      --workdir=runs/nf4_kmnist

`:runlocal` does two steps.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='quantised.nf4'), dict(name='lowrank.lora', rank=8),
              common.HEAD), lr=3e-3, arg=arg)
