"""LoRA-SB on every kernel of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --config=experiments/quickstart/lora_sb_kmnist.py \
      --workdir=runs/lora_sb_kmnist

`:runlocal` does two steps.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  # As the authors have it: lr over the 12 steps of the warm-up.
  sb = dict(name='lowrank.lora_sb', rank=16, step_size=8e-5)
  return common.kmnist(method=(sb, common.HEAD), lr=1e-3, arg=arg)
