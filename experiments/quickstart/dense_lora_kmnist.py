"""DenseLoRA on vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --workdir=runs/dense_lora_kmnist \
      --config=experiments/quickstart/dense_lora_kmnist.py

`:runlocal` does two steps.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='lowrank.dense_lora', rank=16),
              common.HEAD), lr=1e-3, arg=arg)
