"""Trans-PEFT on the attention of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --workdir=runs/trans_peft_kmnist \
      --config=experiments/quickstart/trans_peft_kmnist.py

`:runlocal` does two steps.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='lowrank.trans_peft', rank=8, alpha=16.0, mask=0.1),
              common.HEAD), lr=3e-3, arg=arg)
