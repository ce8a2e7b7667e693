"""Int8 base: kernels kept as int8 with one scale per output channel.

Source: the vector-wise absmax quantisation of "LLM.int8(): 8-bit Matrix
Multiplication for Transformers at Scale" (Dettmers et al., arXiv 2208.07339),
on weights only: activations stay as they are, and there is no decomposition of
outlier features, which the paper needs because it quantises activations too.

  scale_j = max_i |K_ij| / 127       q_ij = round(K_ij / scale_j)      (int8)
  y = (x q) scale + b                q [d_in, d_out], scale [d_out]
  fold: K' = q scale                 |K' - K| <= scale / 2 in every entry

Trains nothing by itself: it is a base for other methods, as in
(int8(), lora(rank=8)), and stands first. The scales multiply the product, so
the kernel in float is never formed. Not exact at init: the adapted model is the
quantised one. A column of zeros has scale zero.

Count: 0.
"""

import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.method import Method

EXAMPLE = {}


def int8(sites=sites_lib.kernels):
  """Int8 kernels, frozen.

  Args:
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: a site without a kernel, or a slice of a fused kernel.
  """

  def init(key, site, p, stats):
    del key, site, stats
    kernel = p['kernel'].astype(jnp.float32)
    scale = jnp.abs(kernel).max(0) / 127
    q = jnp.round(kernel / jnp.where(scale > 0, scale, 1))
    return dict(q=q.astype(jnp.int8), scale=scale)

  def fold(p, t):
    return {**p, 'kernel': t['q'] * t['scale']}

  def layer(f, x, t, ctx):
    del f  # it would look for the kernel
    y = x.astype(t['scale'].dtype)
    return biased(y @ t['q'].astype(y.dtype) * t['scale'], ctx)

  return Method('int8', sites, init, fold=fold, layer=layer,
                frozen=('q', 'scale'), drops=('kernel',),
                tolerance=float('inf'), check=whole_kernels('int8'),
                count=lambda site: 0)


def whole_kernels(name):
  """The check of a method that keeps kernels in another form, each whole."""

  def check(found):
    for path, site in found.items():
      if 'kernel' not in site.params or len(site.params['kernel'].shape) != 2:
        raise ValueError(f'{name}: {path!r} ({site.kind}) has no kernel; it '
                         f'has {sorted(site.params)}')
      if site.leaves['kernel'].span:
        raise ValueError(
            f'{name}: {path!r} is a slice of a fused kernel, which is '
            'quantised whole: keep it in one piece with describe(..., '
            'fused=())')

  return check


def biased(y, ctx):
  """y with the layer's own bias, where it has one."""
  return y + ctx.params['bias'].astype(y.dtype) if 'bias' in ctx.params else y
