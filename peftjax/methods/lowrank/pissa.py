"""PiSSA: LoRA that starts as the principal components of the kernel itself.

Source: "PiSSA: Principal Singular Values and Singular Vectors Adaptation of
Large Language Models" (arXiv 2404.02948).

  K = U diag(S) V^T                K [d_in, d_out], S in descending order
  A0 = U_r diag(S_r / s)^(1/2)     [d_in, r], so that s A0 B0 is the nearest
  B0 = diag(S_r / s)^(1/2) V_r^T   [r, d_out]   matrix to K of rank r
  y = x K + b + s x (A B - A0 B0)  s as in `lowrank.lora`
  fold: K' = K + s (A B - A0 B0)

Init: A = A0, B = B0: exactly the base model. A0 and B0 are kept in theta,
frozen; the kernel of the base is not touched, and an adapter is a LoRA of rank
2 r on it. The difference is computed as (A - A0) B + A0 (B - B0), one pair of
thin products with [A - A0, A0] and [B; B - B0]: zero at the start to the bit,
and in bfloat16 not drowned by the rounding of A and A0. Signs of singular
vectors are fixed (`ops.svd`). A kernel of zeros gives factors of zeros, which
never train.

Count: r (d_in + d_out) a kernel; as many again are stored.

Where sources differ:
  The base. The paper's code and Hugging Face PEFT train beside a residual
    kernel K - s A0 B0 that takes the place of K, and convert afterwards.
  Scale. The paper's scripts set alpha = r, so s = 1; so do the defaults here
    together, and with another rank it has to be said. Any other s gives the
    same start and product, and other learning rates.
  Dropout. Here it acts on the whole difference, so that the start is the base
    in training as well; in PEFT on A B alone.
  The decomposition is a full one; PEFT also offers a faster randomised one.
"""

import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.methods.lowrank.lora import by_site, lora
from peftjax.ops import svd

EXAMPLE = dict(rank=2, alpha=4.0)


def pissa(rank=8, alpha=8.0, scaling='lora', rank_pattern=(), alpha_pattern=(),
          dropout=0.0, sites=sites_lib.kernels):
  """PiSSA.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernel.
    alpha: Numerator of the scale, any positive number; that of the rank gives
      the authors' s = 1.
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    alpha_pattern: The same for alpha.
    dropout: Rate on the input of the change while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: what `lora` refuses.
  """
  def start(kernel, r, s):
    a, b = svd.factors(kernel, r)
    return a / s ** 0.5, b / s ** 0.5

  return starting_at('pissa', start, rank, alpha, scaling, rank_pattern,
                     alpha_pattern, dropout, sites)


def starting_at(name, start, rank, alpha, scaling, rank_pattern, alpha_pattern,
                dropout, sites):
  """LoRA that starts at factors A0, B0 of the kernel and adds A B - A0 B0.

  Args:
    name: The method's.
    start: (kernel [d_in, d_out], r, s) -> (A0 [d_in, r], B0 [r, d_out]); of a
      method with a `calibration`, (kernel, r, s, stats).
    rank: As for `lora`, like all that follow.
    alpha: Numerator of the scale.
    scaling: 'lora' or 'rslora'.
    rank_pattern: (regex, rank) pairs or a mapping.
    alpha_pattern: (regex, alpha) pairs or a mapping.
    dropout: Rate on the input of the change while training.
    sites: Predicate on sites.

  Returns:
    A `Method` with theta a, b and, frozen, a0, b0.
  """
  base = lora(rank, alpha, scaling, rank_pattern, alpha_pattern, dropout, sites)
  rank_of, scale_of, _ = by_site(
      rank, alpha, scaling, rank_pattern, alpha_pattern)

  def init(key, site, p, stats):
    del key
    found = () if stats is None else (stats,)
    a, b = start(p['kernel'], rank_of(site.path), scale_of(site.path), *found)
    return dict(a=a, b=b, a0=a, b0=b)

  def prepare(t, ctx):  # a LoRA of rank 2 r, for `lora` to fold and to apply
    a = jnp.concatenate([t['a'] - t['a0'], t['a0']], 1)
    b = jnp.concatenate([t['b'], t['b'] - t['b0']], 0)
    return base.prepare(dict(a=a, b=b), ctx)

  return base._replace(
      name=name, init=init, prepare=prepare, frozen=('a0', 'b0'))
