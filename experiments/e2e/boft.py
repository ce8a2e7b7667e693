r"""BOFT on the E2E NLG challenge.

  python -m peftjax.train --workdir=runs/e2e/boft \
      --config=experiments/e2e/boft.py:backbone=gpt2_medium

One TPU v5e chip or one 24 GB GPU with gpt2_medium; a v5e-8 slice shards the
batch by itself. `:runlocal` does two steps on samples. Data, protocol, results:
README.md.
"""

from experiments.e2e import suite


def get_config(arg=None):
  """The config of E2E; `arg` as in `experiments.suites`."""
  return suite.config(
      method=(dict(name='orthogonal.boft', block_size=8, factors=2),),
      lr=2e-4, arg=arg)
