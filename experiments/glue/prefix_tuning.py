r"""Prefix tuning in every layer, as P-Tuning v2, on GLUE.

  python -m peftjax.train --workdir=runs/glue/prefix_tuning \
      --config=experiments/glue/prefix_tuning.py:task=rte,backbone=roberta_base

One TPU v5e chip or one 24 GB GPU with roberta_base; a v5e-8 slice shards the
batch by itself.
`:runlocal` does two steps on samples. Tasks, protocol, results: README.md.
"""

from experiments import common
from experiments.glue import suite


def get_config(arg=None):
  """The config of a GLUE task; `arg` as in `experiments.suites`."""
  return suite.config(
      method=(dict(name='prompts.prefix_tuning', length=20), common.HEAD),
      lr=5e-3, arg=arg)
