"""LoftQ: a quantised base, and the LoRA that makes up for its rounding.

Source: "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models"
(arXiv 2310.08659).

  y = x Q + b + s (dropout(x) A) B      Q [d_in, d_out] in codes, frozen
  fold: K' = Q + s A B                  A [d_in, r], B [r, d_out]

Init: from D = 0, `iterations` times
  Q = dequantise(quantise(K - D))       as in `quantised.nf4`; 8 bits: `int8`
  U diag(S) V^T = K - Q
  D = U_r diag(S_r) V_r^T               nearest of rank r to what Q leaves
and the Q and D of the smallest ||K - Q - D|| are kept: later ones need not be
better. A = U_r (S_r / s)^(1/2), B = (S_r / s)^(1/2) V_r^T, so that s A B = D
and the start misses K by the other singular values of K - Q. Not exact at
init. Signs of singular vectors are fixed (`ops.svd`). A kernel that its codes
hold exactly gives factors of zeros, which never train.

Count: r (d_in + d_out) a kernel.

The kernel is made from its codes where the layer runs, and again in the
backward pass. The method holds the base itself: it stands first, without
another base. The paper's mixed precision is two of them, of 4 and of 2 bits, on
different sites.

Where sources differ:
  The scale. Hugging Face PEFT does not divide A and B by s, so that with alpha
    other than r it corrects by s D; start='peft' does as it does.
  Iterations. The paper's 5; PEFT's default is 1. Both keep the last Q and D,
    and so does start='peft'.
  bits=8. PEFT rounds the kernel to float16 first.
"""

import numbers

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.method import Method, nearest
from peftjax.methods.lowrank.lora import by_site, check_rate, dropped
from peftjax.methods.quantised.int8 import biased, int8, whole_kernels
from peftjax.methods.quantised.nf4 import nf4
from peftjax.ops import products, svd

EXAMPLE = dict(rank=2, alpha=4.0, block=16, iterations=2)
STARTS = ('exact', 'peft')


def loftq(rank=8, alpha=16.0, scaling='lora', rank_pattern=(), alpha_pattern=(),
          dropout=0.0, bits=4, block=64, scales='float32', iterations=5,
          start='exact', sites=sites_lib.kernels):
  """LoftQ.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernel.
    alpha: Numerator of the scale, any positive number.
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    alpha_pattern: The same for alpha.
    dropout: Rate on the adapter's input while training.
    bits: Of a code: 4, 3, 2, or 8 for int8 with one scale an output.
    block: Entries that share a scale, from 8 to 4096; not at 8 bits.
    scales: 'float32', or 'double', quantised in turn; not at 8 bits.
    iterations: Rounds of quantising and decomposing, from 1 to 100.
    start: 'exact', s A B = D, the best round; or 'peft', A B = D, the last.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: what `lora` and `nf4` refuse, iterations outside [1, 100], an
      unknown start, or a block or scales at 8 bits.
  """
  check_rate(dropout)
  if not isinstance(iterations, numbers.Integral) or not 1 <= iterations <= 100:
    near = 5 if iterations != iterations else min(max(iterations, 1), 100)
    raise ValueError(
        f'iterations={iterations}: expected a whole number from 1 to 100; the '
        f'nearest is {round(near)} (none at all would be nf4 and lora)')
  if start not in STARTS:
    raise ValueError(f'unknown start {start!r}{nearest(start, STARTS)}')
  if bits == 8 and (block, scales) != (64, 'float32'):
    raise ValueError(f'block={block}, scales={scales!r} at 8 bits, where every '
                     'output has one float32 scale: leave them out')
  base = int8() if bits == 8 else nf4(bits, block, scales)
  rank_of, scale_of, check_rank = by_site(
      rank, alpha, scaling, rank_pattern, alpha_pattern)

  def check(found):
    check_rank(found)
    whole_kernels('loftq')(found)

  def kernel(t):
    return base.fold({}, t)['kernel']

  def init(key, site, p, stats):
    w = p['kernel'].astype(jnp.float32)

    def iterate(product):
      q = base.init(key, site, dict(kernel=w - product), stats)
      rest = w - kernel(base.prepare(q, None))
      a, b = svd.factors(rest, rank_of(site.path))
      product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
      return product, {**q, 'a': a, 'b': b}, jnp.linalg.norm(rest - product)

    def step(_, carry):
      product, best, least = carry
      product, new, error = iterate(product)
      take = (error < least) | (start == 'peft')
      best = jax.tree.map(lambda n, o: jnp.where(take, n, o), new, best)
      return product, best, jnp.where(take, error, least)

    shapes = jax.eval_shape(iterate, w)[1]
    empty = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
    _, t, _ = jax.lax.fori_loop(0, iterations, step, (
        jnp.zeros_like(w), empty, jnp.float32(jnp.inf)))
    root = scale_of(site.path) ** 0.5 if start == 'exact' else 1.0
    return {**t, 'a': t['a'] / root, 'b': t['b'] / root}

  def prepare(t, ctx):
    return {**base.prepare(t, ctx), 's': jnp.float32(scale_of(ctx.path))}

  def fold(p, t):
    return {**p, 'kernel': kernel(t) + t['s'] * (t['a'] @ t['b'])}

  def layer(f, x, t, ctx):
    del f  # it would look for the kernel
    dtype = t['a'].dtype
    if jnp.issubdtype(x.dtype, jnp.floating):
      x = x.astype(dtype)
    codes = {n: t[n] for n in base.frozen if n in t}
    product = jax.checkpoint(
        lambda x, codes: ctx.dot(x, kernel(codes).astype(dtype)))
    h = dropped(x, dropout, ctx)
    return biased(product(x, codes), ctx) + products.low_rank(
        ctx.dot(h, t['a']), t['b'], t['s'])

  def count(site):
    return rank_of(site.path) * sum(site.params['kernel'].shape)

  return Method('loftq', sites, init, prepare, fold, layer, needs_x=False,
                frozen=base.frozen, drops=('kernel',), tolerance=float('inf'),
                check=check, count=count)
