r"""The head alone for named entities.

  python -m peftjax.train --workdir=runs/ner/linear_probe \
      --config=experiments/ner/linear_probe.py:task=conll2003,backbone=bert_base

One TPU v5e chip or one 24 GB GPU with bert_base; a v5e-8 slice shards the batch
by itself.
`:runlocal` does two steps on samples. Tasks, protocol, results: README.md.
"""

from experiments import common
from experiments.ner import suite


def get_config(arg=None):
  """The config of a set of named entities; `arg` as in `experiments.suites`."""
  return suite.config(
      method=(common.HEAD,),
      lr=1e-3, arg=arg)
