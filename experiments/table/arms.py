"""The methods of the table, with the centre of their learning-rate search.

The new head learns at one rate in all arms, which is not searched; only for the
linear probe, where it is all there is, the search is over that rate.
"""

from experiments import common

HEAD_RATE = 1e-2
# Every kernel of the blocks is adapted where a method adapts kernels.
ARMS = (
    ('linear probe', (common.HEAD,), HEAD_RATE),
    ('LoRA', (dict(name='lowrank.lora', rank=8), common.HEAD), 1e-3),
    ('OFT', (dict(name='orthogonal.oft', block_size=16), common.HEAD), 3e-3),
    ('BOFT', (dict(name='orthogonal.boft', block_size=8, factors=2),
              common.HEAD), 3e-3),
    ('BitFit', (dict(name='selective.bitfit'), common.HEAD), 3e-3),
    ('SSF', (dict(name='scaling.ssf'), common.HEAD), 3e-3),
    ('diff pruning', (dict(name='sparse.diff_pruning'), common.HEAD), 3e-4),
    ('full', (dict(name='selective.full'), common.HEAD), 1e-4),
)


def of(rates, leaves):
  """Arms of a grid.

  Args:
    rates: {arm: centre of its search} that differ here.
    leaves: Names of the leaves that the backbone has, for full fine-tuning.
  """
  unknown = set(rates) - {name for name, _, _ in ARMS}
  if unknown:
    raise ValueError(f'no arms {sorted(unknown)} in {[a[0] for a in ARMS]}')
  arms = []
  for name, method, lr in ARMS:
    if name == 'full':  # the head is a method of its own, with its own rate
      body = dict(method[0], sites=dict(leaf=leaves, exclude='^head'))
      method = (body, *method[1:])
    change = {'method': method, 'optim.lr': rates.get(name, lr),
              'optim.groups.head.lr_abs': HEAD_RATE}
    if name == 'linear probe':
      change['optim.groups.head.lr_abs'] = None
    arms.append((name, change))
  return tuple(arms)
