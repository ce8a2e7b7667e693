r"""Prefix tuning on the E2E NLG challenge.

  python -m peftjax.train --workdir=runs/e2e/prefix_tuning \
      --config=experiments/e2e/prefix_tuning.py:backbone=gpt2_medium

Five vectors a layer, made by a network of width 512 as in the paper (arXiv
2101.00190). One TPU v5e chip or one 24 GB GPU with gpt2_medium; a v5e-8 slice
shards the batch by itself. `:runlocal` does two steps on samples. Data,
protocol, results: README.md.
"""

from experiments.e2e import suite


def get_config(arg=None):
  """The config of E2E; `arg` as in `experiments.suites`."""
  return suite.config(
      method=(dict(name='prompts.prefix_tuning', length=5, project=512),),
      lr=8e-5, arg=arg)
