"""LoRA: a trained low-rank delta beside a frozen kernel.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685);
scaling='rslora': "A Rank Stabilization Scaling Factor for Fine-Tuning with
LoRA" (arXiv 2312.03732).

  y = x K + b + s (dropout(x) A) B    K [d_in, d_out], A [d_in, r], B [r, d_out]
  fold: K' = K + s A B                s = alpha / r, or alpha / sqrt(r) (rsLoRA)

Init: A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0, so the adapted model starts as
the base. The gradient of A is exactly zero in the first step. The scale is data
of the site: changing the rank of a trained theta does not change it.

Count: r (d_in + d_out) a kernel.

An embedding table is a [vocabulary, d] kernel whose input is one-hot; its A
starts at zero and its B ~ N(0, 1), as in Hugging Face PEFT. On a tied table the
delta changes the output logits too. A convolution's A slides over the image
with the kernel's own strides, and B is 1 x 1. Slices of a fused kernel are
sites of their own: each gets its own A and B.
"""

import math
import numbers

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax import trees
from peftjax.method import Method, nearest
from peftjax.ops import products

EXAMPLE = dict(rank=2, alpha=4.0)
SCALINGS = ('lora', 'rslora')


def lora(rank=8, alpha=16.0, scaling='lora', rank_pattern=(), alpha_pattern=(),
         dropout=0.0, sites=sites_lib.kernels):
  """LoRA.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernel.
    alpha: Numerator of the scale, any positive number.
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    alpha_pattern: The same for alpha.
    dropout: Rate on the adapter's input while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: a rank outside [1, min(d_in, d_out)], an alpha that is not
      positive, an unknown scaling, a dropout outside [0, 1), or a pattern that
      matches no site.
  """
  check_rate(dropout)
  rank_of, scale_of, check = by_site(
      rank, alpha, scaling, rank_pattern, alpha_pattern)

  def init(key, site, p, stats):
    del stats
    d_in, d_out = p['kernel'].shape
    r = rank_of(site.path)
    if site.kind == 'Embed':
      return dict(a=jnp.zeros((d_in, r)), b=jax.random.normal(key, (r, d_out)))
    bound = 1 / math.sqrt(d_in)
    a = jax.random.uniform(key, (d_in, r), minval=-bound, maxval=bound)
    return dict(a=a, b=jnp.zeros((r, d_out)))

  def prepare(t, ctx):
    return {**t, 'scale': jnp.float32(scale_of(ctx.path))}

  def fold(p, t):
    return {**p, 'kernel': p['kernel'] + t['scale'] * (t['a'] @ t['b'])}

  def layer(f, x, t, ctx):
    h = dropped(x, dropout, ctx)
    return f(x) + products.low_rank(ctx.dot(h, t['a']), t['b'], t['scale'])

  def count(site):
    return rank_of(site.path) * sum(site.params['kernel'].shape)

  return Method('lora', sites, init, prepare, fold, layer, needs_x=False,
                check=check, count=count)


def by_site(rank, alpha, scaling, rank_pattern, alpha_pattern, least=1):
  """Rank and scale of every site.

  Args:
    rank: As for `lora`, like all that follow.
    alpha: Numerator of the scale.
    scaling: 'lora' or 'rslora'.
    rank_pattern: (regex, rank) pairs or a mapping.
    alpha_pattern: (regex, alpha) pairs or a mapping.
    least: The least rank; with 0 sites may be left without an adapter.

  Returns:
    (path -> r, path -> s, the check of a method's sites).
  """
  rank_pattern, alpha_pattern = (
      tuple(p.items()) if hasattr(p, 'items') else tuple(map(tuple, p))
      for p in (rank_pattern, alpha_pattern))
  if scaling not in SCALINGS:
    raise ValueError(f'unknown scaling {scaling!r}{nearest(scaling, SCALINGS)}')
  for a in (alpha, *(a for _, a in alpha_pattern)):
    if not 0 < a < math.inf:
      raise ValueError(f'alpha={a}: expected a positive number; 16 is usual')

  def rank_of(path):
    return trees.first_match(rank_pattern, path, rank)

  def scale_of(path):
    r = rank_of(path)
    root = r if scaling == 'lora' else math.sqrt(r)
    return trees.first_match(alpha_pattern, path, alpha) / root

  def check(found):
    for pattern, _ in rank_pattern + alpha_pattern:
      if not any(trees.first_match([(pattern, True)], p, False)
                 for p in found):
        raise ValueError(f'pattern {pattern!r} matches none of the sites'
                         f'{nearest(pattern, found)}')
    for path, site in found.items():
      if 'kernel' not in site.params:
        raise ValueError(f'{path!r} ({site.kind}) has no kernel; it has '
                         f'{sorted(site.params)}')
      most, r = min(site.params['kernel'].shape), rank_of(path)
      if not isinstance(r, numbers.Integral) or not least <= r <= most:
        near = max(int(r), least) if isinstance(r, numbers.Real) else 8
        raise ValueError(
            f'rank {r!r} at {path!r}: expected a whole number from {least} to '
            f'{most} for a kernel of {list(site.params["kernel"].shape)}; the '
            f'nearest is {min(near, most)}')

  return rank_of, scale_of, check


def check_rate(dropout):
  if not 0 <= dropout < 1:
    raise ValueError(f'dropout={dropout}: expected a rate in [0, 1); the '
                     f'nearest is {0.0 if dropout < 0 else 0.9}')


def dropped(x, rate, ctx):
  """An adapter's input: x itself but while training, then inverted dropout."""
  if not rate or not ctx.train:
    return x
  if jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f'dropout on the input of {ctx.path!r}, which takes ids; '
                     'leave the embedding out or set dropout=0')
  if ctx.rng is None:
    raise ValueError(f'dropout={rate} at {ctx.path!r} needs a key while '
                     'training: apply(..., train=True, rng=key)')
  keep = jax.random.bernoulli(ctx.rng, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
