"""KaSA: LoRA with singular values, on a kernel without its last ones.

Source: "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language
Models" (arXiv 2412.06071).

  K = U diag(S) V^T                K [d_in, d_out], k = min(d_in, d_out) terms
  W = K - D E                      the first k - r terms; D = U_d diag(S_d)
                                   [d_in, r] and E = V_d^T [r, d_out] the rest
  y = x W + b + s ((dropout(x) A) * g) B        g [r], s as in `lowrank.lora`
  fold: K' = W + s A diag(g) B
  penalty: sum over kernels of
    beta ||g||^2 + gamma (||B B^T - I||_F + ||A^T A - I||_F)

Init: A and B as in `lowrank.lora`, so B = 0, and g ~ N(0, 1). The adapted model
starts at the truncated base, not at the base. D and E are frozen leaves of
theta and come off as a thin product: the base's kernel is not touched, and
leaving theta out gives it back. The gradients of A and g through the task are
exactly zero in the first step; at B = 0 the penalty of B is sqrt(r), and flat.

Count: r (d_in + d_out) + r a kernel; r (d_in + d_out) more are stored.

beta = gamma = 0 turns the penalties off; then with g = 1 this is LoRA on W. The
best of the authors' settings go from beta 1e-4, gamma 1e-3 (CoLA, SST-2), the
defaults here, to 1e-2, 1e-5 (QNLI, RTE).

Where sources differ:
  What is cut. The authors' code keeps d_in - r terms, which cuts nothing from a
    kernel with d_in >= d_out + r. Here, as in the paper and Hugging Face PEFT,
    k - r remain whatever the shape.
  Penalty. The code takes the mean over kernels, of Gram matrices as large as
    the kernel; here it is the paper's and PEFT's sum, of r x r ones
    (`ops.gram`).
  The base. PEFT overwrites the kernel with W, and merging leaves it so.
  Quantised bases. D and E are those of the kernel that `init` is given, and
    come off the quantised one.
"""

import math

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.methods.lowrank.lora import by_site, dropped, lora
from peftjax.ops import gram
from peftjax.ops import products
from peftjax.ops import svd

EXAMPLE = dict(rank=2, alpha=4.0)


def kasa(rank=8, alpha=16.0, beta=1e-4, gamma=1e-3, scaling='lora',
         rank_pattern=(), alpha_pattern=(), dropout=0.0,
         sites=sites_lib.kernels):
  """KaSA.

  Args:
    rank: r, at least 1 and below the smaller side of the kernel.
    alpha: Numerator of the scale, any positive number.
    beta: Weight of the penalty on g, any finite number from 0.
    gamma: Weight of the penalty on A and B, any finite number from 0.
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    alpha_pattern: The same for alpha.
    dropout: Rate on the input of A while training; what is cut stays cut.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: what `lora` refuses, a rank that leaves nothing of a kernel, a
      negative weight.
  """
  for name, weight in (('beta', beta), ('gamma', gamma)):
    if not 0 <= weight < math.inf:
      raise ValueError(f'kasa: {name}={weight}: expected a finite number, at '
                       'least 0, which turns the penalty off')
  base = lora(rank, alpha, scaling, rank_pattern, alpha_pattern, dropout, sites)
  rank_of, _, _ = by_site(rank, alpha, scaling, rank_pattern, alpha_pattern)

  def init(key, site, p, stats):
    key, k = jax.random.split(key)
    r, shape = rank_of(site.path), p['kernel'].shape
    u, s, vt = svd.split(p['kernel'], min(shape))
    return {**base.init(key, site, p, stats), 'g': jax.random.normal(k, (r,)),
            'd': u[:, -r:] * s[-r:], 'e': vt[-r:]}

  def prepare(t, ctx):  # B over -E: what A and D find is carried up together
    t = base.prepare(t, ctx)
    return dict(a=t['a'], d=t['d'], g=t['scale'] * t['g'],
                up=jnp.concatenate([t['b'], -t['e']], 0))

  def fold(p, t):
    down = jnp.concatenate([t['a'] * t['g'], t['d']], 1)
    return {**p, 'kernel': p['kernel'] + down @ t['up']}

  def layer(f, x, t, ctx):
    h = t['g'] * ctx.dot(dropped(x, dropout, ctx), t['a'])
    h = jnp.concatenate([h, ctx.dot(x, t['d'])], -1)
    return f(x) + products.thin(h, t['up'])

  def penalty(theta, aux, step):
    del aux, step
    off = lambda a, b: (gram.off_orthonormal(jnp.swapaxes(b, -1, -2)).sum()
                        + gram.off_orthonormal(a).sum())
    return sum(beta * jnp.square(t['g']).sum() + gamma * off(t['a'], t['b'])
               for t in theta.values())

  def check(found):
    base.check(found)
    for path, site in found.items():
      shape, r = site.params['kernel'].shape, rank_of(path)
      if r >= min(shape):
        raise ValueError(
            f'kasa: rank {r} at {path!r} leaves nothing of a kernel of '
            f'{list(shape)}; ' + (f'the nearest that does is {min(shape) - 1}'
                                  if min(shape) > 1 else 'leave it out'))

  def count(site):
    return base.count(site) + rank_of(site.path)

  return base._replace(
      name='kasa', init=init, prepare=prepare, fold=fold, layer=layer,
      penalty=penalty if beta or gamma else None, check=check, count=count,
      frozen=('d', 'e'), tolerance=math.inf)
