"""Selective LoRA on every kernel of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --workdir=runs/selective_lora_kmnist \
      --config=experiments/quickstart/selective_lora_kmnist.py

`:runlocal` does two steps.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='lowrank.selective_lora', rank=8, warmup=8),
              common.HEAD), lr=3e-3, arg=arg)
