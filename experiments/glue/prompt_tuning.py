r"""Prompt tuning on GLUE.

  python -m peftjax.train --workdir=runs/glue/prompt_tuning \
      --config=experiments/glue/prompt_tuning.py:task=rte,backbone=roberta_base

One TPU v5e chip or one 24 GB GPU with roberta_base; a v5e-8 slice shards the
batch by itself.
`:runlocal` does two steps on samples. Tasks, protocol, results: README.md.
"""

from experiments import common
from experiments.glue import suite


def get_config(arg=None):
  """The config of a GLUE task; `arg` as in `experiments.suites`."""
  return suite.config(
      method=(dict(name='prompts.prompt_tuning', length=20,
                   init='sample_vocab'), common.HEAD),
      lr=3e-2, arg=arg)
