r"""LN tuning on GLUE.

  python -m peftjax.train --workdir=runs/glue/ln_tuning \
      --config=experiments/glue/ln_tuning.py:task=rte,backbone=roberta_base

One TPU v5e chip or one 24 GB GPU with roberta_base; a v5e-8 slice shards the
batch by itself.
`:runlocal` does two steps on samples. Tasks, protocol, results: README.md.
"""

from experiments import common
from experiments.glue import suite


def get_config(arg=None):
  """The config of a GLUE task; `arg` as in `experiments.suites`."""
  return suite.config(
      method=(dict(name='selective.ln_tuning'), common.HEAD),
      lr=1e-3, arg=arg)
