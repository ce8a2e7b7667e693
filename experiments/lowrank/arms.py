"""The arms of grid.py, with the centres of their learning-rate searches.

Every kernel of the blocks is adapted. Where nothing is said, r is 8 and alpha
2 r, so that the scale of a LoRA is 2 at any rank; what its authors have a rule
for (PiSSA and CorDA: alpha = r) is left as the method's default.

Arms of ranks that AutoLoRA has found (`ranks.py`) are there once ranks.json is.
"""

import json
import os
import re

import numpy as np

from experiments import common

HEAD_RATE = 1e-2
RANKS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'ranks.json')
_LEAVES = ('kernel', 'bias', 'scale')
_ALL = dict(roles=('q', 'k', 'v', 'o', 'up', 'down'))
_STEADY = {'optim.groups.no_decay.lr_abs': 1e-3}  # of gates, whatever the rate


def _lora(rank, scaling='lora', **more):
  return dict(name='lowrank.lora', rank=rank, alpha=2. * rank, scaling=scaling,
              **more)


# name: (method beside the head, centre of the search, further keys).
ARMS = {
    'head': (None, HEAD_RATE, {'optim.groups.head.lr_abs': None}),
    'full': (dict(name='selective.full', sites=dict(
        leaf=_LEAVES, exclude='^head')), 3e-4, {}),
    'lora': (_lora(8), 3e-3, {}),
    'lora_r1': (_lora(1), 3e-3, {}),
    'lora_r3': (_lora(3), 3e-3, {}),
    'lora_r64': (_lora(64), 2e-3, {}),
    'rslora_r64': (_lora(64, 'rslora'), 1e-3, {}),
    'lora_plus': (dict(name='lowrank.lora_plus', rank=8), 1e-3, {}),
    'dora': (dict(name='lowrank.dora', rank=8), 3e-3, {}),
    'pissa': (dict(name='lowrank.pissa', rank=8), 1e-3, {}),
    'olora': (dict(name='lowrank.olora', rank=8), 2e-3, {}),
    'corda_ipm': (dict(name='lowrank.corda', rank=8, mode='ipm'), 1e-3, {}),
    'eva_rho1': (dict(name='lowrank.eva', rank=8, alpha=16., rho=1.), 3e-3, {}),
    'eva': (dict(name='lowrank.eva', rank=8, alpha=16., rho=2.), 3e-3, {}),
    'lora_ga': (dict(name='lowrank.lora_ga', rank=8), 5e-4, {}),
    'lora_xs_r8': (dict(name='lowrank.lora_xs', rank=8, alpha=8.), 6e-3, {}),
    'lora_xs_r24': (dict(name='lowrank.lora_xs', rank=24, alpha=24.), 3e-3, {}),
    'lora_xs_random': (dict(name='lowrank.lora_xs', rank=24, alpha=24.,
                            basis='random'), 3e-3, {}),
    'lora_xs_r96': (dict(name='lowrank.lora_xs', rank=96, alpha=96.), 1e-3, {}),
    'lora_sb_r8': (dict(name='lowrank.lora_sb', rank=8), 2e-2, {}),
    'lora_sb_r24': (dict(name='lowrank.lora_sb', rank=24), 1e-2, {}),
    'lora_sb_r96': (dict(name='lowrank.lora_sb', rank=96), 2e-3, {}),
    'kasa': (dict(name='lowrank.kasa', rank=8), 3e-3, {}),
    'kasa_free': (dict(name='lowrank.kasa', rank=8, beta=0., gamma=0.),
                  3e-3, {}),
    'delora': (dict(name='lowrank.delora', rank=8, strength=4.), 3e-3,
               {'optim.groups.strength.lr_abs': 1e-2}),
    'dense_lora_r16': (dict(name='lowrank.dense_lora', rank=16, sites=_ALL),
                       3e-3, {}),
    'dense_lora_r40': (dict(name='lowrank.dense_lora', rank=40, alpha=80.,
                            sites=_ALL), 3e-3, {}),
    'adalora': (dict(name='lowrank.adalora', rank=12, target=8), 1e-2, {}),
    'selective_lora': (dict(name='lowrank.selective_lora', rank=8, warmup=40),
                       3e-3, _STEADY),
    'taps': (dict(name='lowrank.taps', warmup=40), 3e-4, _STEADY),
    'vera': (dict(name='lowrank.vera', rank=256), 5e-2, {}),
    'trans_peft': (dict(name='lowrank.trans_peft', rank=8, alpha=16.,
                        dropout=0., sites=_ALL), 3e-3, {}),
}


# A run of its own, of whose retraining nothing is used; see ranks.py.
SEARCH = {'auto_search': (dict(
    name='lowrank.auto_lora', rank=8, search=0.9), 1e-2, {})}


def with_ranks(ranks):
  """LoRA of the scale 2 with {path: rank}; kernels of rank 0 are left out."""
  own = {f'^{re.escape(path)}$': r for path, r in ranks.items() if r}
  return dict(name='lowrank.lora', rank_pattern=tuple(own.items()),
              alpha_pattern=tuple((p, 2. * r) for p, r in own.items()),
              sites=dict(path=tuple(own)))


def of_ranks(ranks):
  """Arms of {path: rank}, as of `ARMS`."""
  paths, values = list(ranks), np.array(list(ranks.values()))
  total, n = int(values.sum()), len(paths)
  elsewhere = np.random.RandomState(0).permutation(values)
  # Equal but for a remainder, which is spread over the depth.
  same = [total // n + (i * (total % n) % n < total % n) for i in range(n)]
  lora = lambda v: (with_ranks(dict(zip(paths, map(int, v)))), 3e-3, {})
  return {
      'auto_lora': lora(values), 'auto_lora_permuted': lora(elsewhere),
      'lora_same': lora(same), 'adalora_same': (dict(
          name='lowrank.adalora', rank=12, target=max(1., total / n)), 1e-2, {})}


def of(names='', small=False, task=''):
  """Arms of a grid.

  Args:
    names: 'lora+dora'; '': all but the search of ranks.
    small: Whether they are for a backbone of width 32.
    task: Whose ranks are meant, where there are such.
  """
  known = dict(ARMS)
  if os.path.exists(RANKS):
    with open(RANKS, encoding='utf-8') as f:
      ranks = json.load(f)
    known |= of_ranks(ranks[task]) if task in ranks else {}
  if names:
    known |= SEARCH
  out = []
  for name in common.pick(names, known, 'arms'):
    method, lr, more = known[name]
    if small and method and method.get('rank', 0) > 16:
      method = dict(method, rank=16)
    out.append((name, {
        'method': (*((method,) if method else ()), common.HEAD),
        'optim.lr': lr, **more}))
  return tuple(out)
