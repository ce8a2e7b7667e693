"""The linear probe of vit_s: a new head alone, on Kuzushiji-MNIST.

  python -m peftjax.train --workdir=runs/linear_probe_kmnist \
      --config=experiments/quickstart/linear_probe_kmnist.py

`:runlocal` does two steps. Hardware, wall time and result: README.md.
"""

from experiments import common


def get_config(arg=None):
  """The training config; `arg` as in `common.parse_arg`."""
  return common.kmnist(
      method=(common.HEAD,), lr=1e-2, arg=arg)
