"""DoRA: LoRA on the directions of a kernel's columns; their lengths trained.

Source: "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353).

  V = K + s A B                    K [d_in, d_out], A [d_in, r], B [r, d_out]
  n_j = ||V_j||, without gradient  one per output, over the input axis
  y = x (V * g) + b                g = m / n [d_out], s as in `lowrank.lora`
  fold: K' = (K + s A B) * m / n   so ||K'_j|| = |m_j|

Init: A and B as in `lowrank.lora` and m_j = ||K_j||, so the adapted model
starts as the base, up to rounding of the norms. m takes no weight decay, which
would pull it to 0 and not to its start. A column of zeros has no direction: its
g is 1 until B gives it one.

Count: r (d_in + d_out) + d_out a kernel.

An embedding table and a convolution reach it as matrices, as in `lowrank.lora`:
one m per output channel, over (c_in, kh, kw), and one per embedding dimension,
over the vocabulary.

The scale leaves the bias b alone. b is the one the layer itself holds: a
method that changes the bias of the same layer goes outside (later in the tuple)
of this one.

Where sources differ:
  The gradient through n. As in the paper's section 4.3 and Hugging Face PEFT, n
    is a constant; with its gradient, B would move orthogonally to V only.
  Dropout. PEFT's form: it acts on both terms of the change, x' in
    y = x K + b + (g - 1) (x' K) + g s (x' A) B, for a second product with K
    while training. The paper has none.
  Quantised bases. m starts from the kernel that `init` is given, n is that of
    the kernel inside: the start differs from the quantised model by about the
    rounding of the norms, where PEFT takes both from the latter.
"""

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.methods.lowrank.lora import dropped, lora
from peftjax.ops import products

EXAMPLE = dict(rank=2, alpha=4.0)


def dora(rank=8, alpha=16.0, scaling='lora', rank_pattern=(), alpha_pattern=(),
         dropout=0.0, sites=sites_lib.kernels):
  """DoRA.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernel.
    alpha: Numerator of the scale, any positive number.
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    alpha_pattern: The same for alpha.
    dropout: Rate on the input of the change while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: what `lora` refuses.
  """
  base = lora(rank, alpha, scaling, rank_pattern, alpha_pattern, dropout, sites)

  def init(key, site, p, stats):
    m = jnp.linalg.norm(p['kernel'].astype(jnp.float32), axis=0)
    return {**base.init(key, site, p, stats), 'm': m}

  def prepare(t, ctx):
    t = base.prepare(t, ctx)
    if ctx.kernel is None:  # to be folded
      return t
    g = gain(t['m'], norms(ctx.kernel(), t))
    # g - 1 by itself: above 1, bfloat16 has steps of 0.0078.
    return dict(a=t['a'], b=t['scale'] * g * t['b'], change=g - 1)

  def fold(p, t):
    v = base.fold(p, t)['kernel']
    return {**p, 'kernel': v * gain(t['m'], jnp.linalg.norm(v, axis=0))}

  def layer(f, x, t, ctx):
    h, y = dropped(x, dropout, ctx), f(x)
    xk = y if h is x else f(h)
    if 'bias' in ctx.params:
      xk = xk - ctx.params['bias'].astype(y.dtype)
    return y + t['change'] * xk + products.thin(ctx.dot(h, t['a']), t['b'])

  def count(site):
    return base.count(site) + site.params['kernel'].shape[1]

  return base._replace(name='dora', init=init, prepare=prepare, fold=fold,
                       layer=layer, count=count, labels=dict(m='no_decay'))


def gain(m, n):
  """m / n, n being constant; 1 where n is 0."""
  n = jax.lax.stop_gradient(n)
  return jnp.where(n > 0, m / jnp.where(n > 0, n, 1), 1)


def norms(kernel, t):
  """Norms of the columns of K + s A B, without A B.

  ||K_j||^2 + 2 s (K^T A B)_jj + s^2 (B^T A^T A B)_jj, in float32. Measured
  against the direct norm in float64: 2e-7 apart where A B adds to a column;
  where it cancels all but a share e of one, 3e-7 / e^2 of the rest (3e-5 at
  e = 0.1). Deltas of training stay far from that. The product A B in blocks of
  columns would lose nothing, at as many operations, but one after another.
  """
  k, a, b, s = jax.lax.stop_gradient(
      (kernel.astype(jnp.float32), t['a'], t['b'], t['scale']))
  dot = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
  own, delta = jnp.square(k).sum(0), s * s * (b * dot(dot(a.T, a), b)).sum(0)
  square = own + 2 * s * (b * dot(a.T, k)).sum(0) + delta
  return jnp.sqrt(jnp.maximum(square, 1e-6 * (own + delta)))  # no digits below
