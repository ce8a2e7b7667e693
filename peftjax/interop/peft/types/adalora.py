"""ADALORA: AdaLoRA, the triplets that are left of it.

  ours             PEFT
  a [d_in, k]      lora_A [k, d_in]; of a convolution [k, c kh kw]
  e [k]            lora_E [k, 1]
  b [k, d_out]     lora_B [d_out, k]
  scale            lora_alpha / (init_r + 1e-5), whatever k is

`rank_pattern` of PEFT says which of a module's init_r triplets were kept, and
only these are stored. With it the adapter is read in its final form ('compact',
phase 1), without it as one whose budget has not fallen yet, of all triplets.
Which triplets they were is not kept: they are written as the first k of init_r,
of which PEFT takes the number. A site of rank 0 is left out.

PEFT counts tinit and tfinal in steps of total_step, here they are shares of the
run: they are written for a run of 1000 steps.
"""

import numpy as np

from peftjax.interop.peft.part import array, grouped, one, Part, plain
from peftjax.interop.peft.part import sites_of
from peftjax.interop.peft.names import scanned
from peftjax.interop.peft.types import lora

METHODS = ('lowrank.adalora',)
TENSORS = ('lora_A', 'lora_B', 'lora_E')
SUFFIXES = (*TENSORS, 'ranknum')
CONFIG = dict(r=8, init_r=12, target_r=8, tinit=0, tfinal=0, deltaT=1,
              beta1=0.85, beta2=0.85, orth_reg_weight=0.5, total_step=None,
              rank_pattern=None, lora_alpha=8, lora_dropout=0.0,
              fan_in_fan_out=False, init_lora_weights=True)
STEPS = 1000
KINDS = ('linear', 'conv1d', 'conv')


def _check(module, site):
  if module.kind not in KINDS:
    raise ValueError(
        f'{module.name}: its kind is {module.kind!r}, and AdaLoRA in PEFT is of '
        f"{', '.join(KINDS)}; leave it out of the sites, or write it with "
        "format 'lora' and its rank, which loses nothing")
  if grouped(module, site):
    raise ValueError(
        f'{module.name} is a convolution in groups, of which AdaLoRA in PEFT '
        'has no form; leave it out of the sites, or write the folded model '
        "(format 'merged')")


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  given, groups, values = part.settings, {}, {}
  for path, t in part.theta.items():
    module, span = names.module(path)
    _check(module, sites[path])
    a, b, e = t['a'], t['b'], t['e']
    if 'mask' in t:
      keep = t['mask'] | (e != 0)
    else:  # zeros fill stacked layers up, and train nowhere
      keep = (a != 0).any(0) | (b != 0).any(1) | (e != 0)
    if keep.any():
      scale = float(t['scale'])
      groups.setdefault(module, []).append(
          (path, span, scale, a[:, keep], b[keep], None))
      values.setdefault(module, []).append(e[keep])
  if not groups:
    raise ValueError('lowrank.adalora: every rank is 0; the adapter is the '
                     'base, and there is nothing to write')
  scale = one({p: s for found in groups.values() for p, _, s, *_ in found},
              'the scale')
  modules, left = {}, {}
  for module, found in groups.items():
    a, b, _ = lora.joined(module, found, sites)
    e = np.concatenate(values[module])
    modules[module.name] = dict(
        lora_A=array(a.T), lora_E=array(e[:, None]), lora_B=array(b.T))
    left[module.name] = len(e)
  r, phase = max(given['rank'], *left.values()), given.get('phase', 0)
  alpha = scale * (r + 1e-5)
  if np.isclose(alpha, given['alpha'], rtol=1e-6):  # but for rounding
    alpha = given['alpha']
  share = lambda x: int(STEPS * x + 1e-6)
  config = dict(
      init_r=r, target_r=plain(given['target']), lora_alpha=plain(alpha),
      lora_dropout=given['dropout'], tinit=share(given['tinit']),
      tfinal=share(given['tfinal']), total_step=STEPS, deltaT=given['delta_t'],
      beta1=given['beta1'], beta2=given['beta2'],
      orth_reg_weight=given['orthogonal'], init_lora_weights=True,
      fan_in_fan_out=any(m.kind == 'conv1d' for m in groups))
  if phase or set(left.values()) != {r}:
    config['rank_pattern'] = {
        f'{names.written(n)}.lora_E': k * [True] + (r - k) * [False]
        for n, k in left.items()}
  return config, modules


def read(config, modules, names, sites):
  """See `peftjax.interop.peft`."""
  r, pattern = config['init_r'], config['rank_pattern'] or {}
  kept = {_module(n): v for n, v in pattern.items()}
  unknown = [n for n in kept if n not in modules]
  if unknown:
    raise ValueError(f'rank_pattern names {sorted(unknown)[:3]}, of which '
                     'there are no tensors: config and tensors are of two '
                     'adapters')
  theta, ranks = {}, {}
  for name, t in modules.items():
    module = names.path(name)
    _check(module, sites[module.path])
    kernel = sites[module.path].params['kernel'].shape
    t, told = dict(t), t.get('ranknum', np.float32(r))
    t.pop('ranknum', None)
    if set(t) != set(TENSORS):
      raise ValueError(f'{name}: expected the tensors {list(TENSORS)}, found '
                       f'{sorted(t)}')
    if np.any(told != r):
      raise ValueError(f'{name}: its ranknum is {told}, expected init_r={r}, '
                       'by which PEFT divides')
    k = sum(map(bool, kept.get(name, r * [True])))
    shapes = [tuple(t[n].shape) for n in TENSORS]
    want = [(k, kernel[0]), (kernel[1], k), (k, 1)]
    if shapes != want:
      raise ValueError(
          f'{name}: {list(TENSORS)} of {shapes}, expected {want} by '
          f'init_r={r}, rank_pattern and the base; the adapter is of another base')
    ranks[module.path] = k
    theta[module.path] = dict(a=t['lora_A'].T, e=t['lora_E'][:, 0],
                              b=t['lora_B'].T)
  if names.scan:  # one shape a stack, as the method itself has it
    for path, t in theta.items():
      most = max(k for p, k in ranks.items() if scanned(p) == scanned(path))
      fill = (0, most - ranks[path])
      theta[path] = dict(a=np.pad(t['a'], ((0, 0), fill)),
                         e=np.pad(t['e'], fill),
                         b=np.pad(t['b'], (fill, (0, 0))))
  theta = {p: {n: array(v) for n, v in t.items()}
           for p, t in theta.items() if t['e'].size}
  if not theta:
    raise ValueError('rank_pattern leaves no rank anywhere: the adapter is the '
                     'base')
  steps = config['total_step'] or STEPS
  spec = dict(
      name='lowrank.adalora', rank=r, target=min(config['target_r'], r),
      alpha=float(config['lora_alpha']), tinit=config['tinit'] / steps,
      tfinal=config['tfinal'] / steps, delta_t=config['deltaT'],
      beta1=config['beta1'], beta2=config['beta2'],
      orthogonal=config['orth_reg_weight'], dropout=config['lora_dropout'],
      sites=sites_of(theta))
  if pattern:
    spec['phase'] = 1
  return Part(spec, theta)


def _module(name):
  """'h.0.query' of 'h.0.query.lora_E', with what PEFT may put around it."""
  return name.partition('.lora_E')[0].removeprefix('base_model.model.')
