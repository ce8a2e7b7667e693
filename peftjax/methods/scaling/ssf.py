"""SSF: a trained scale and shift after every operation of a frozen network.

Source: "Scaling & Shifting Your Features: A New Baseline for Efficient Model
Tuning" (arXiv 2210.08823).

  y = g * f(x) + t                     g, t [d_out], on the last (channel) axis
  fold: K' = K * g,  b' = b * g + t    after a linear layer or a convolution
        scale' = scale * g,  bias' = bias * g + t             after a norm

It attaches directly after the operation: before the activation that follows an
up projection, before the split into heads. Every site folds into parameters
that the layer already has, so inference costs nothing; a layer without a bias
has nowhere to put t and is refused by `fold` (it still runs and trains).

Init: 'normal' is the paper's, g ~ N(1, 0.02) and t ~ N(0, 0.02), which is not
the base model at step 0; 'identity' (g = 1, t = 0) is. g and t take no weight
decay, as in the paper's code, whose decay reaches only the new head; decay
would pull g to 0.

Count: 2 d_out a site. In ViT-B/16: 2 (11 * 12 + 2) 768 = 205,824 beside its
head; a fused qkv kernel gives one site a projection, together the paper's 3 d.
"""

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.method import Method, nearest

EXAMPLE = dict(init='normal')
INITS = ('normal', 'identity')
STD = 0.02


def operations(site):
  """Default sites: every linear layer, convolution and norm but the head."""
  norm = site.role == 'norm' and not {'scale', 'bias'}.isdisjoint(site.params)
  return norm or sites_lib.kernels(site)


def ssf(init='normal', sites=operations):
  """SSF.

  Args:
    init: 'normal' (the paper's, not exact at step 0) or 'identity' (exact).
    sites: Predicate on sites; by default every linear layer, convolution and
      norm but the head.

  Raises:
    ValueError: an unknown init, or a site without a channel axis.
  """
  if init not in INITS:
    raise ValueError(f'ssf: unknown init {init!r}{nearest(init, INITS)}')

  def width(site):
    """Channels that the site puts out, as a method sees them; None unknown."""
    kernel = site.params.get('kernel')
    if kernel is not None and len(kernel.shape) == 2:
      return kernel.shape[1]
    shape = getattr(site.y, 'shape', ())
    if not shape:  # a params tree without activations
      shape = next((site.params[n].shape for n in ('scale', 'bias')
                    if n in site.params), ())
    return shape[-1] if shape else None

  def check(found):
    for path, site in found.items():
      if width(site) is None:
        raise ValueError(
            f'ssf: {path!r} ({site.kind}) has no channel axis to scale: '
            'expected a layer with one output array, or a kernel, scale or '
            f'bias; it has {sorted(site.params)}')

  def make(key, site, p, stats):
    del p, stats
    d = width(site)
    if init == 'identity':
      return dict(g=jnp.ones(d), t=jnp.zeros(d))
    noise = STD * jax.random.normal(key, (2, d))
    return dict(g=1 + noise[0], t=noise[1])

  def fold(p, t):
    weight = 'kernel' if 'kernel' in p else 'scale'
    new = {**p, 'bias': p.get('bias', 0) * t['g'] + t['t']}
    if weight in p:
      new[weight] = p[weight] * t['g']
    return new

  def layer(f, x, t, ctx):
    del ctx
    return f(x) * t['g'] + t['t']

  def count(site):
    return 2 * width(site)

  return Method(
      'ssf', sites, make, fold=fold, layer=layer, needs_x=False, check=check,
      labels=dict(g='no_decay', t='no_decay'), count=count,
      tolerance=0.0 if init == 'identity' else float('inf'))
