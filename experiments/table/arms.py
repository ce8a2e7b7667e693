"""The methods of the table, with the centre of their learning-rate search."""

from experiments import common

# Every kernel of the blocks is adapted, but for full fine-tuning and the probe.
ARMS = (
    ('linear probe', (common.HEAD,), 3e-3),
    ('LoRA', (dict(name='lowrank.lora', rank=8), common.HEAD), 1e-3),
    ('OFT', (dict(name='orthogonal.oft', block_size=16), common.HEAD), 3e-3),
    ('BOFT', (dict(name='orthogonal.boft', block_size=8, factors=2),
              common.HEAD), 3e-3),
    ('BitFit', (dict(name='selective.bitfit'), common.HEAD), 3e-3),
    ('SSF', (dict(name='scaling.ssf'), common.HEAD), 3e-3),
    ('diff pruning', (dict(name='sparse.diff_pruning'), common.HEAD), 3e-4),
    ('full', (dict(name='selective.full'),), 1e-4),
)


def of(rates):
  """Arms of a grid; rates: {arm: centre of its search} that differ here."""
  unknown = set(rates) - {name for name, _, _ in ARMS}
  if unknown:
    raise ValueError(f'no arms {sorted(unknown)} in {[a[0] for a in ARMS]}')
  return tuple((name, {'method': method, 'optim.lr': rates.get(name, lr)})
               for name, method, lr in ARMS)
