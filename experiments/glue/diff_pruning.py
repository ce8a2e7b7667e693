r"""Diff pruning on GLUE.

  python -m peftjax.train --workdir=runs/glue/diff_pruning \
      --config=experiments/glue/diff_pruning.py:task=rte,backbone=roberta_base

One TPU v5e chip or one 24 GB GPU with roberta_base; a v5e-8 slice shards the
batch by itself.
`:runlocal` does two steps on samples. Tasks, protocol, results: README.md.
"""

from experiments import common
from experiments.glue import suite


def get_config(arg=None):
  """The config of a GLUE task; `arg` as in `experiments.suites`."""
  return suite.config(
      method=(dict(name='sparse.diff_pruning'), common.HEAD),
      lr=5e-5, arg=arg)
