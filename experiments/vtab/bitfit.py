r"""BitFit on VTAB-1k.

  python -m peftjax.train --workdir=runs/vtab/bitfit \
      --config=experiments/vtab/bitfit.py:task=caltech101,backbone=vit_base

One TPU v5e chip or one 24 GB GPU with vit_base; a v5e-8 slice shards the batch
by itself.
`:runlocal` does two steps on samples. Tasks, protocol, results: README.md.
"""

from experiments import common
from experiments.vtab import suite


def get_config(arg=None):
  """The config of a VTAB-1k task; `arg` as in `experiments.suites`."""
  return suite.config(
      method=(dict(name='selective.bitfit'), common.HEAD),
      lr=1e-3, arg=arg)
