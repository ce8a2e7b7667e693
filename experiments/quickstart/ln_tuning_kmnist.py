"""LN tuning: the norms of vit_s, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --workdir=runs/ln_tuning_kmnist \
      --config=experiments/quickstart/ln_tuning_kmnist.py

`:runlocal` does two steps. No result is recorded yet.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='selective.ln_tuning'), common.HEAD), lr=3e-3, arg=arg)
