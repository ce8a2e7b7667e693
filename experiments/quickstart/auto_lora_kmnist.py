"""AutoLoRA on every kernel of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --config=experiments/quickstart/auto_lora_kmnist.py \
      --workdir=runs/auto_lora_kmnist

`:runlocal` does two steps, one of each phase.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='lowrank.auto_lora'), common.HEAD), lr=3e-3, arg=arg)
