r"""Diff pruning on the E2E NLG challenge.

  python -m peftjax.train --workdir=runs/e2e/diff_pruning \
      --config=experiments/e2e/diff_pruning.py:backbone=gpt2_medium

One TPU v5e chip or one 24 GB GPU with gpt2_medium; a v5e-8 slice shards the
batch by itself. `:runlocal` does two steps on samples. Data, protocol, results:
README.md.
"""

from experiments.e2e import suite


def get_config(arg=None):
  """The config of E2E; `arg` as in `experiments.suites`."""
  return suite.config(
      method=(dict(name='sparse.diff_pruning'),),
      lr=5e-5, arg=arg)
