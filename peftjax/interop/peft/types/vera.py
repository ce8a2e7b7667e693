"""VERA: VeRA.

  ours             PEFT
  A [n, r]         vera_A [r, n], of the whole adapter
  B [r, m]         vera_B [m, r], of the whole adapter
  d [r]            vera_lambda_d [r]
  b [d_out]        vera_lambda_b [d_out]

n and m are the largest sides of the adapted kernels, in both. A and B are
always written. PEFT may leave them out (save_projection=False) and draw them
again from projection_prng_key by torch's generator on CPUs, MT19937; so are they
here, by numpy's of the same kind. Linear layers alone.
"""

import math

import numpy as np

from peftjax.interop.peft.part import array, Part, sites_of

METHODS = ('lowrank.vera',)
COMMON = ('vera_A', 'vera_B')
SUFFIXES = ('vera_lambda_b', 'vera_lambda_d')
CONFIG = dict(r=256, projection_prng_key=0, save_projection=True,
              vera_dropout=0.0, d_initial=0.1, fan_in_fan_out=False,
              init_weights=True)


def _check(module, span=None):
  if module.kind not in ('linear', 'conv1d'):
    raise ValueError(
        f'{module.name}: its kind is {module.kind!r}, and VeRA in PEFT is of '
        "linear layers; leave it out of the sites, or write the folded model "
        "(format 'merged')")
  if span is not None:
    raise ValueError(
        f'{module.name}: a slice of it takes the first columns of B here, the '
        'whole of it in PEFT; describe it whole (config.model.fused="whole"), '
        "or write the folded model (format 'merged')")


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  given, modules, kinds, shapes = part.settings, {}, set(), []
  for path, t in part.theta.items():
    module, span = names.module(path)
    _check(module, span)
    modules[module.name] = dict(vera_lambda_d=array(t['d']),
                                vera_lambda_b=array(t['b']))
    kinds.add(module.kind)
    shapes.append(sites[path].params['kernel'].shape)
  n, m = map(max, zip(*shapes))
  # Of a head that is left out there may be more.
  modules[''] = dict(vera_A=array(part.shared['A'][:n].T),
                     vera_B=array(part.shared['B'][:, :m].T))
  return dict(
      r=given['rank'], projection_prng_key=0, save_projection=True,
      vera_dropout=given['dropout'], d_initial=given['d_initial'],
      fan_in_fan_out='conv1d' in kinds, init_weights=True), modules


def read(config, modules, names, sites):
  """See `peftjax.interop.peft`."""
  theta, shapes, r = {}, [], config['r']
  modules = dict(modules)
  common = modules.pop('')
  for name, t in modules.items():
    module = names.path(name)
    _check(module)
    if set(t) != set(SUFFIXES):
      raise ValueError(f'{name}: expected the tensors {list(SUFFIXES)}, found '
                       f'{sorted(t)}')
    d_in, d_out = sites[module.path].params['kernel'].shape
    d, b = t['vera_lambda_d'], t['vera_lambda_b']
    if d.shape != (r,) or b.shape != (d_out,):
      raise ValueError(
          f'{name}: vera_lambda_d {list(d.shape)} and vera_lambda_b '
          f'{list(b.shape)}, expected [{r}] by the config and [{d_out}] by the '
          'base; the adapter is of another base')
    theta[module.path] = dict(d=array(d), b=array(b))
    shapes.append((d_in, d_out))
  n, m = map(max, zip(*shapes))
  if bool(common) != config['save_projection'] or len(common) % 2:
    raise ValueError(
        f'save_projection is {config["save_projection"]} and the projections '
        f'that are there are {sorted(common)}: config and tensors are of two '
        'adapters')
  a, b = ((common['vera_A'], common['vera_B']) if common
          else drawn(config['projection_prng_key'], r, n, m))
  if a.shape[0] != r or a.shape[1] < n or b.shape[0] < m or b.shape[1] != r:
    raise ValueError(
        f'vera_A {list(a.shape)} and vera_B {list(b.shape)}, expected at least '
        f'[{r}, {n}] and [{m}, {r}]; the adapter is of another base')
  spec = dict(name='lowrank.vera', rank=r, d_initial=config['d_initial'],
              dropout=config['vera_dropout'], sites=sites_of(theta))
  return Part(spec, theta, dict(A=array(a[:, :n].T), B=array(b[:m].T)))


def drawn(key, r, n, m):
  """(vera_A [r, n], vera_B [m, r]) as PEFT draws them from a key.

  One number of 32 bits an entry, of which 24 make a fraction in [0, 1).
  """
  bits, out = np.random.RandomState(int(key) & 0xffffffff), []
  for shape, fan in (((r, n), n), ((m, r), r)):
    low = np.float32(-math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan)))
    raw = bits.randint(2 ** 32, size=shape, dtype=np.uint32) & (2 ** 24 - 1)
    value = raw * 2. ** -24 * float(-low - low) + float(low)  # rounded once
    out.append(value.astype(np.float32))
  return tuple(out)
