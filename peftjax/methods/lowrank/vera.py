"""VeRA: random factors that all layers share, and two trained vectors a layer.

Source: "VeRA: Vector-based Random Matrix Adaptation" (arXiv 2310.11454), as in
Hugging Face PEFT.

  y = x K + c + ((x A) * d) B * b    K [d_in, d_out], c the layer's bias
  fold: K' = K + A diag(d) B diag(b)  d [r], b [d_out]

A [n, r] and B [r, m] are one pair for all sites, random and frozen. n is the
largest d_in and m the largest d_out of the sites; a layer takes the first d_in
rows of A and the first d_out columns of B.

Init: A ~ U(-sqrt(6 / n), sqrt(6 / n)), B ~ U(-sqrt(6 / r), sqrt(6 / r)), which
is Kaiming's; d = 0.1, b = 0, so the adapted model starts as the base. In the
first step b alone has a gradient.

Count: r + d_out a kernel; r (n + m) more are stored once.

There is no further scale: d and b are that. r may be above the sides of a
kernel. Convolutions and embeddings are folded where they run.
"""

import math

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.method import Method
from peftjax.methods.lowrank.lora import check_rate, dropped
from peftjax.ops import products
from peftjax.ops import prompts

EXAMPLE = dict(rank=3)


def vera(rank=256, d_initial=0.1, dropout=0.0, sites=sites_lib.kernels):
  """VeRA.

  Args:
    rank: r, 1 to 65536.
    d_initial: d at the start, any number but 0.
    dropout: Rate on the input of the change while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: a rank outside [1, 65536], a d_initial that is 0 or not finite,
      a dropout outside [0, 1), or a site without a kernel.
  """
  prompts.check_size('vera', 'rank', rank)
  check_rate(dropout)
  if not 0 < abs(d_initial) < math.inf:
    raise ValueError(f'vera: d_initial={d_initial}: expected a finite number '
                     'but 0, where nothing would train; the usual one is 0.1')

  def check(found):
    for path, site in found.items():
      if 'kernel' not in site.params:
        raise ValueError(f'vera: {path!r} ({site.kind}) has no kernel; it has '
                         f'{sorted(site.params)}')

  def shared(key, found):
    n, m = (max(s.params['kernel'].shape[i] for s in found.values())
            for i in (0, 1))
    out = {}
    for k, name, shape in zip(
        jax.random.split(key), 'AB', ((n, rank), (rank, m))):
      bound = math.sqrt(6 / shape[0])
      out[name] = jax.random.uniform(k, shape, minval=-bound, maxval=bound)
    return out

  def init(key, site, p, stats):
    del key, site, stats
    return dict(d=jnp.full(rank, d_initial, jnp.float32),
                b=jnp.zeros(p['kernel'].shape[1]))

  def prepare(t, ctx):
    del ctx  # b on the columns of B: no output is gone through once more.
    return dict(A=t['A'], d=t['d'], up=t['B'][:, :t['b'].size] * t['b'])

  def fold(p, t):
    a = t['A'][:p['kernel'].shape[0]]
    return {**p, 'kernel': p['kernel'] + (a * t['d']) @ t['up']}

  def layer(f, x, t, ctx):
    h = ctx.dot(dropped(x, dropout, ctx), t['A'][:x.shape[-1]])
    return f(x) + products.thin(h * t['d'], t['up'])

  def count(site):
    return rank + site.params['kernel'].shape[1]

  return Method('vera', sites, init, prepare, fold, layer, shared=shared,
                frozen=('A', 'B'), check=check, count=count)
