"""LoRA-XS: only an r x r matrix is trained, between fixed bases of the kernel.

Source: "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters"
(arXiv 2405.17604).

  K = U diag(S) V^T                K [d_in, d_out], S in descending order
  A = U_r diag(S_r)                [d_in, r], frozen
  B = V_r^T                        [r, d_out], frozen
  y = x K + b + s ((dropout(x) A) R) B         R [r, r], s as in `lowrank.lora`
  fold: K' = K + s A R B

Init: R ~ N(0, 1e-5^2): the base but for about 1e-5 of the kernel's principal
part. The kernel is not reduced by A B; R = -I / s would take its r first terms
out.

Count: r^2 a kernel; r (d_in + d_out) frozen numbers are stored beside them.

A and B are data of theta, not made again from the base: another machine could
turn vectors of equal singular values. Their signs are fixed (`ops.svd`). S_r in
A scales the gradient of R, s A^T G B^T with G that of the kernel.

basis='random' is the control: A = P diag(S_r), B = Q^T with P and Q of random
orthonormal columns, so that only the directions differ.

Where sources differ:
  The decomposition. A full one here; the authors' code has a randomised one of
    10 iterations. It keeps R transposed, acting on columns.
  Scale. The default alpha is r, as for their language models: s = 1.
"""

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.method import nearest
from peftjax.methods.lowrank.lora import by_site, dropped, lora
from peftjax.ops import linalg
from peftjax.ops import products
from peftjax.ops import svd

EXAMPLE = dict(rank=2, alpha=2.0)
BASES = ('svd', 'random')
STD = 1e-5  # of R at the start


def lora_xs(rank=16, alpha=16.0, basis='svd', scaling='lora', rank_pattern=(),
            alpha_pattern=(), dropout=0.0, sites=sites_lib.kernels):
  """LoRA-XS.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernel.
    alpha: Numerator of the scale, any positive number.
    basis: 'svd' (singular vectors of the kernel) or 'random' (orthonormal ones
      that have nothing to do with it).
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    alpha_pattern: The same for alpha.
    dropout: Rate on the adapter's input while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: an unknown basis, and what `lora` refuses.
  """
  if basis not in BASES:
    raise ValueError(
        f'lora_xs: unknown basis {basis!r}{nearest(basis, BASES)}')
  base = lora(rank, alpha, scaling, rank_pattern, alpha_pattern, dropout, sites)
  rank_of, _, _ = by_site(rank, alpha, scaling, rank_pattern, alpha_pattern)

  def init(key, site, p, stats):
    del stats
    r, (left, right, core) = rank_of(site.path), jax.random.split(key, 3)
    u, s, vt = svd.split(p['kernel'], r)
    if basis == 'random':
      u, vt = orthonormal(left, u.shape), orthonormal(right, vt.T.shape).T
    return dict(a=u * s, b=vt, r=STD * jax.random.normal(core, (r, r)))

  def fold(p, t):
    return base.fold(p, {**t, 'b': t['r'] @ t['b']})

  def layer(f, x, t, ctx):
    h = products.thin(ctx.dot(dropped(x, dropout, ctx), t['a']), t['r'])
    return f(x) + products.low_rank(h, t['b'], t['scale'])

  def count(site):
    return rank_of(site.path) ** 2

  return base._replace(name='lora_xs', init=init, fold=fold, layer=layer,
                       count=count, frozen=('a', 'b'), tolerance=1e-3)


def orthonormal(key, shape):
  """[d, r] with orthonormal columns, r <= d, evenly distributed."""
  q, r = linalg.qr(jax.random.normal(key, shape))
  return q * jnp.where(jnp.diag(r) < 0, -1, 1)  # QR alone favours some signs
