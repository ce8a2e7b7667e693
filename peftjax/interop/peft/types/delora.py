"""DELORA: DeLoRA in PEFT's form.

  ours             PEFT
  a [d_in, r]      delora_A [r, d_in]
  b [r, d_out]     delora_B [d_out, r]
  strength         delora_lambda [1]
  w [d_in]         delora_w_norm [d_in]; made from the base where it is missing

The paper's form (form='paper'), less what it starts at, is written as a LoRA of
twice the rank: PEFT has no DeLoRA of that form. PEFT's is of linear layers.
"""

from peftjax.interop.peft.part import array, commonest, matched, Part
from peftjax.interop.peft.part import plain, sites_of

METHODS = ('lowrank.delora',)
TENSORS = ('delora_A', 'delora_B', 'delora_lambda')
SUFFIXES = (*TENSORS, 'delora_w_norm')
CONFIG = dict(r=8, delora_lambda=15, module_dropout=0.0, rank_pattern={},
              lambda_pattern={}, init_weights=True)


def takes(part):
  """Whether it is in PEFT's form."""
  return part.settings['form'] == 'peft'


def _check(module, span=None):
  if module.kind != 'linear' or span is not None:
    what = 'part of a layer' if span else module.kind
    raise ValueError(
        f"{module.name}: PEFT's DeLoRA is of whole linear layers, and this is "
        f"of kind {what!r} here; leave it out of the sites, or write it with "
        "format 'lora' and its rank, which loses nothing")


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  del sites
  given, modules = part.settings, {}
  for path, t in part.theta.items():
    module, span = names.module(path)
    _check(module, span)
    modules[module.name] = dict(
        delora_A=array(t['a'].T), delora_B=array(t['b'].T),
        delora_lambda=array(t['strength'].reshape(1)),
        delora_w_norm=array(t['w']))
  ranks = {n: t['delora_A'].shape[0] for n, t in modules.items()}
  r = commonest(ranks.values())
  return dict(
      r=r, delora_lambda=plain(given['strength']), init_weights=True,
      module_dropout=given['dropout'], lambda_pattern={},
      rank_pattern={names.written(n): v for n, v in ranks.items()
                    if v != r}), modules


def read(config, modules, names, sites):
  """See `peftjax.interop.peft`."""
  theta, ranks = {}, {}
  for name, t in modules.items():
    module = names.path(name)
    _check(module)
    if set(t) | {'delora_w_norm'} != set(SUFFIXES):
      raise ValueError(f'{name}: expected the tensors {list(SUFFIXES)}, found '
                       f'{sorted(t)}')
    d_in, d_out = sites[module.path].params['kernel'].shape
    r = matched(config['rank_pattern'], name, config['r'])
    want = dict(delora_A=(r, d_in), delora_B=(d_out, r), delora_lambda=(1,),
                delora_w_norm=(d_in,))
    for n, v in t.items():
      if tuple(v.shape) != want[n]:
        raise ValueError(f'{name}: {n} of {list(v.shape)}, expected '
                         f'{list(want[n])} by the rank that the config says '
                         'and the base; the adapter is of another base')
    ranks[module.path] = r
    theta[module.path] = dict(
        a=array(t['delora_A'].T), b=array(t['delora_B'].T),
        strength=t['delora_lambda'].reshape(()))
    if 'delora_w_norm' in t:
      theta[module.path]['w'] = array(t['delora_w_norm'])
  r = commonest(ranks.values())
  odd = {v: [p for p in ranks if ranks[p] == v]
         for v in ranks.values() if v != r}
  spec = dict(
      name='lowrank.delora', rank=r, form='peft',
      strength=float(config['delora_lambda']),
      dropout=config['module_dropout'], sites=sites_of(theta))
  if odd:
    spec['rank_pattern'] = [[sites_of(p)['path'], v] for v, p in odd.items()]
  return Part(spec, theta)
