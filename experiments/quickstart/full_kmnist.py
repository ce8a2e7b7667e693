"""Full fine-tuning of vit_s on Kuzushiji-MNIST.

  python -m peftjax.train --config=experiments/quickstart/full_kmnist.py \
      --workdir=runs/full_kmnist

`:runlocal` does two steps. Hardware, wall time and result: README.md.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='selective.full'),), lr=1e-3, arg=arg)
