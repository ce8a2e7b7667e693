"""AdaLoRA on every kernel of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --config=experiments/quickstart/adalora_kmnist.py \
      --workdir=runs/adalora_kmnist

`:runlocal` does two steps.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='lowrank.adalora', tinit=0.1, tfinal=0.3),
              common.HEAD), lr=3e-3, arg=arg)
