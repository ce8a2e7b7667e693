r"""Trainable tokens on GLUE: the two marks that RoBERTa puts around sentences.

  python -m peftjax.train --workdir=runs/glue/trainable_tokens \
      --config=experiments/glue/trainable_tokens.py:task=rte

The ids are those of <s>, which the head reads, and </s>; another backbone has
others (101 and 102 in BERT). Two rows and a head adapt little: this is a lower
bound and an example, not a contender.
One TPU v5e chip or one 24 GB GPU with roberta_base; a v5e-8 slice shards the
batch by itself.
`:runlocal` does two steps on samples. Tasks, protocol, results: README.md.
"""

from experiments import common
from experiments.glue import suite


def get_config(arg=None):
  """The config of a GLUE task; `arg` as in `experiments.suites`."""
  return suite.config(
      method=(dict(name='selective.trainable_tokens', tokens=(0, 2)),
              common.HEAD),
      lr=1e-3, arg=arg)
