"""Diff pruning of vit_s to 0.5 %, and a new head, on Kuzushiji-MNIST.

  python -m peftjax.train --workdir=runs/diff_pruning_kmnist \
      --config=experiments/quickstart/diff_pruning_kmnist.py

`:runlocal` does two steps. Hardware, wall time and result: README.md.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(dict(name='sparse.diff_pruning'), common.HEAD), lr=1e-3, arg=arg)
