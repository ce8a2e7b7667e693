"""LORA: LoRA, rsLoRA, DoRA and KaSA, and whatever else is a LoRA once trained.

  ours                       PEFT
  a [d_in, r]                lora_A.weight [r, d_in]; of a convolution [r, c, kh,
                             kw]; of a table lora_embedding_A [r, V]
  b [r, d_out]               lora_B.weight [d_out, r], [d_out, r, 1, 1];
                             lora_embedding_B [d, r]
  m [d_out]                  lora_magnitude_vector [d_out]; [1, d_out, 1, 1]
  g [r] of KaSA              lora_diag [r]
  scale s                    lora_alpha / r, or / sqrt(r)

Slices of a fused kernel become one adapter whose rank is the sum of theirs.
K + s (A B - A0 B0) is the LoRA [A, A0], [B; -B0] of twice the rank, on K as it
was before PiSSA, OLoRA, CorDA or LoRA-GA; `interop.peft.factors` has the rest. A
table that also decodes (tied) is adapted in both places, as it is here.

KaSA is one where `kasa_config` says so, of linear layers. PEFT cuts the kernels
itself when it loads it, from the original base, and so does what is read here.

An adapter that says `init_lora_weights: loftq` is for kernels that PEFT rounds
when it loads it: codes are made of them here too, and it is read as
`quantised.loftq` of one iteration. One that was saved beside its rounded base
says `true`, and is a plain LoRA on that base.
"""

import numpy as np

from peftjax.interop.peft import factors
from peftjax.interop.peft.part import array, commonest, grouped, matched
from peftjax.interop.peft.part import one, Part, plain, sites_of
from peftjax.method import nearest

METHODS = tuple(factors.FORMS)
SUFFIXES = ('lora_A.weight', 'lora_B.weight', 'lora_embedding_A',
            'lora_embedding_B', 'lora_magnitude_vector', 'lora_diag')
CONFIG = dict(r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False,
              use_dora=False, fan_in_fan_out=False, rank_pattern={},
              alpha_pattern={}, init_lora_weights=True, loftq_config={},
              kasa_config=None)
# Starts that leave the base as it is: nothing of them is needed any more.
_STARTS = (True, False, 'gaussian', 'orthogonal', 'eva')
# Starts that PEFT makes again from the base when it loads the adapter.
_REMADE = {'pissa': 'lowrank.pissa', 'olora': 'lowrank.olora',
           'loftq': 'quantised.loftq'}
# Kinds of modules whose base PEFT changes as is done here, where not 'linear'
# alone: it leaves tables as they are, and OLoRA takes conv1d's kernel as it lies.
_CHANGED = {'pissa': ('linear', 'conv1d')}


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  given = part.settings
  root, kasa = factors.rank_root(given), part.spec['name'] == 'lowrank.kasa'
  groups, said = {}, {}
  for path, f in factors.of(part, names).items():
    module, span = names.module(path)
    if grouped(module, sites[path]):
      raise ValueError(
          f'{path!r} is a convolution in groups, whose factors in PEFT are '
          'others; leave it out of the sites, or write the folded model '
          "(format 'merged')")
    if kasa and (module.kind != 'linear' or span is not None):
      raise ValueError(
          f"{path!r}: PEFT's KaSA is of whole linear layers, and "
          f'{module.name} is of kind {module.kind!r}, '
          f'{"a slice" if span else "whole"} here; write it with format '
          "'lora' and twice the rank, which loses nothing")
    said[path] = f.alpha
    groups.setdefault(module, []).append(
        (path, span, f.scale, f.a, f.b, part.theta[path].get('m')))
  modules, ranks, alphas = {}, {}, {}
  for module, found in groups.items():
    one({path: float(f'{s:.7g}') for path, _, s, *_ in found},
        f'the scale within {module.name}')  # equal but for rounding
    scale = found[0][2]
    a, b, m = joined(module, found, sites)
    modules[module.name] = _tensors(module, a, b, m)
    if kasa:
      modules[module.name]['lora_diag'] = array(part.theta[found[0][0]]['g'])
    names_here = [module.name]
    decoder = names.tied(module.path) if module.kind == 'embedding' else None
    if decoder:
      if m is not None:
        raise ValueError(f'{module.path!r} is tied to {decoder}: DoRA of a '
                         'tied table has no counterpart in PEFT')
      modules[decoder] = {'lora_A.weight': array(b), 'lora_B.weight': array(a)}
      names_here.append(decoder)
    for name in names_here:
      ranks[name] = a.shape[1]
      alphas[name] = _alpha(said[found[0][0]], scale, root, a.shape[1])
  r, alpha = commonest(ranks.values()), commonest(alphas.values())
  config = dict(
      r=r, lora_alpha=plain(alpha), lora_dropout=given['dropout'],
      use_rslora=given.get('scaling') == 'rslora',
      use_dora=part.spec['name'] == 'lowrank.dora',
      fan_in_fan_out=any(m.kind == 'conv1d' for m in groups),
      rank_pattern={names.written(n): v for n, v in ranks.items() if v != r},
      alpha_pattern={names.written(n): plain(v) for n, v in alphas.items()
                     if v != alpha},
      init_lora_weights=True)
  if kasa:
    config['kasa_config'] = dict(beta=given['beta'], gamma=given['gamma'])
  return config, modules


def _alpha(given, scale, root, rank):
  """The alpha that gives `scale` at `rank`; as it was given where it can be."""
  same = given is not None and given / root(rank) == scale
  return given if same else scale * root(rank)


def joined(module, found, sites):
  """(a [d_in, r], b [r, d_out], m or None) of one module from its slices."""
  path, span, _, a, b, m = found[0]
  if len(found) == 1 and span is None:
    return a, b, m
  width = sites[path].leaves['kernel'].full[1]
  a = np.concatenate([f[3] for f in found], 1)
  b = np.zeros((a.shape[1], width), np.asarray(found[0][4]).dtype)
  row, covered = 0, 0
  for _, span, _, _, part, _ in found:
    b[row:row + len(part), slice(*span)] = part
    row, covered = row + len(part), covered + span[1] - span[0]
  if m is None:
    return a, b, None
  if covered != width:
    raise ValueError(
        f'{module.name}: DoRA has a magnitude for every output in PEFT, and '
        f'only {covered} of {width} are adapted; adapt all slices of '
        f'{module.path!r}, or describe it whole (config.model.fused="whole")')
  magnitude = np.zeros(width, np.asarray(m).dtype)
  for _, span, _, _, _, m in found:
    magnitude[slice(*span)] = m
  return a, b, magnitude


def _tensors(module, a, b, m):
  a, b = np.asarray(a).T, np.asarray(b).T
  if module.kind == 'embedding':
    out = dict(lora_embedding_A=a, lora_embedding_B=b)
  elif module.kind == 'conv':
    a, b, m = _convolution(module, a, b, m)
    out = {'lora_A.weight': a, 'lora_B.weight': b}
  else:
    out = {'lora_A.weight': a, 'lora_B.weight': b}
  if m is not None:
    out['lora_magnitude_vector'] = m
  return {k: array(v) for k, v in out.items()}


def _convolution(module, a, b, m):
  kernel = module.shape  # [kh, kw, c_in, c_out]
  a = a.reshape(len(a), kernel[2], kernel[0], kernel[1])
  return a, b[..., None, None], None if m is None else (
      np.asarray(m)[None, :, None, None])


def read(config, modules, names, sites):
  """See `peftjax.interop.peft`."""
  start = config['init_lora_weights']
  if start not in _STARTS and start not in _REMADE:
    raise ValueError(
        f'init_lora_weights is {start!r}: expected a start that leaves the base '
        'as it is, or that can be made again from it; save it from PEFT with '
        'path_initial_model_for_weight_conversion, which writes a plain LoRA'
        f'{nearest(str(start), [*map(str, _STARTS), *_REMADE])}')
  dora, kasa = config['use_dora'], config['kasa_config']
  if kasa and (dora or start in _REMADE):
    raise ValueError(
        f'kasa_config with use_dora={dora}, init_lora_weights={start!r}: '
        'expected one change of the base at most')
  if dora and start in _REMADE:
    raise ValueError(f'use_dora with init_lora_weights={start!r}: DoRA on a '
                     'base that its start changed is not a method here')
  more = _loftq(config['loftq_config']) if start == 'loftq' else {}
  ties = {n for n in modules if names.table_of(n)}
  theta, ranks, alphas = {}, {}, {}
  for name, t in modules.items():
    if name in ties:
      continue  # what its table's adapter says again
    module = names.path(name)
    changed = 'kasa' if kasa else start if start in _REMADE else ''
    kinds = _CHANGED.get(changed, ('linear',))
    if changed and module.kind not in kinds:
      raise ValueError(
          f'{name}: {changed} of a module of kind {module.kind!r}, expected '
          f'{" or ".join(map(repr, kinds))}; PEFT\'s of it is another')
    want = ('lora_embedding_A', 'lora_embedding_B') if (
        module.kind == 'embedding') else ('lora_A.weight', 'lora_B.weight')
    want += ('lora_magnitude_vector',) if dora else ()
    want += ('lora_diag',) if kasa else ()
    if set(t) != set(want):
      raise ValueError(f'{name}: expected the tensors {sorted(want)}, found '
                       f'{sorted(t)}')
    a, b = (t[k].reshape(len(t[k]), -1).T for k in want[:2])
    rank = matched(config['rank_pattern'], name, config['r'])
    if a.shape[1] != rank or b.shape[0] != rank:
      raise ValueError(
          f'{name}: {want[0]} {list(t[want[0]].shape)} and {want[1]} '
          f'{list(t[want[1]].shape)} are not of the rank {rank} that the '
          'config says')
    _check_tie(names.tied(module.path) if module.kind == 'embedding' else None,
               name, a, b, modules)
    theta[module.path] = dict(a=array(a), b=array(b))
    if dora:
      theta[module.path]['m'] = array(t['lora_magnitude_vector'].reshape(-1))
    if kasa:  # what is cut off is made from the base
      theta[module.path]['g'] = array(t['lora_diag'])
    ranks[module.path] = rank
    alphas[module.path] = matched(
        config['alpha_pattern'], name, config['lora_alpha'])
  r, alpha = commonest(ranks.values()), commonest(alphas.values())
  method = 'lowrank.dora' if dora else _REMADE.get(start, 'lowrank.lora')
  if kasa:
    method = 'lowrank.kasa'
    more = {k: kasa[k] for k in ('beta', 'gamma') if k in kasa}
  spec = dict(
      name=method,
      rank=r, alpha=float(alpha),
      scaling='rslora' if config['use_rslora'] else 'lora',
      dropout=config['lora_dropout'], sites=sites_of(theta), **more)
  for key, values, most in (('rank_pattern', ranks, r),
                            ('alpha_pattern', alphas, alpha)):
    odd = {v: [p for p in values if values[p] == v]
           for v in values.values() if v != most}
    if odd:
      spec[key] = [[sites_of(paths)['path'], v] for v, paths in odd.items()]
  return Part(spec, theta)


def _loftq(config):
  """Hyper-parameters of `quantised.loftq` for PEFT's LoftQConfig."""
  bits, rounds = config.get('loftq_bits', 4), config.get('loftq_iter', 1)
  if (bits, rounds) == (4, 1):
    return dict(bits=4, block=64, scales='float32', iterations=1, start='peft')
  raise ValueError(
      f"init_lora_weights is 'loftq' with loftq_bits={bits}, "
      f'loftq_iter={rounds}: expected 4 and 1. Later rounds follow '
      'decompositions that no other machine makes to the bit, and 8 bits round '
      'by float16: save the rounded base (model.unload().save_pretrained), set '
      'init_lora_weights to true in the config and give that base as --base')


def _check_tie(decoder, table, a, b, modules):
  """Raises unless a tied table and its decoder have the same adapter."""
  if decoder is None:
    return
  t = modules.get(decoder)
  if t is None or not (np.array_equal(t.get('lora_A.weight'), b)
                       and np.array_equal(t.get('lora_B.weight'), a)):
    raise ValueError(
        f'{table} is the table that {decoder} decodes with; here both change '
        f'together, in this adapter {decoder} '
        + ('has none' if t is None else 'has another')
        + ': merge it in PEFT and load the merged model')
