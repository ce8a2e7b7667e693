"""OLoRA: LoRA that starts as a projection of the kernel; one side orthonormal.

Source: "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models" (arXiv
2406.01775).

  K^T = Q R                        K [d_in, d_out]; Q [d_out, k] orthonormal
                                   columns, R [k, d_in] upper triangular
  A0 = R_{:r}^T = K Q_r            [d_in, r]
  B0 = Q_r^T                       [r, d_out], orthonormal rows
  y = x K + b + s x (A B - A0 B0)  s as in `lowrank.lora`
  fold: K' = K + s (A B - A0 B0)

Papers and Hugging Face PEFT decompose the weight as torch keeps it, [d_out,
d_in]: the orthonormal factor lies on the side of the outputs. Q_r spans the
first r rows of K, so that A0 B0 = K Q_r Q_r^T is K with its rows projected onto
what the layer makes of its first r inputs. Only these r rows are decomposed.
The diagonal of R is made positive, which fixes the signs.

Init: A = A0, B = B0: exactly the base model. Theta, its two frozen leaves and
the form of the products are those of `lowrank.pissa`.

Count: r (d_in + d_out) a kernel; as many again are stored.

Where sources differ:
  The base. PEFT trains beside K - s A0 B0 in the place of K.
  Scale. As in PEFT, A0 B0 is not divided by s: the trained product starts at s
    times the projection. s = 1 with rank and alpha as by default.
  Dropout. As in `lowrank.pissa`.
"""

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.methods.lowrank.pissa import starting_at
from peftjax.ops import linalg

EXAMPLE = dict(rank=2, alpha=4.0)


def olora(rank=8, alpha=8.0, scaling='lora', rank_pattern=(), alpha_pattern=(),
          dropout=0.0, sites=sites_lib.kernels):
  """OLoRA.

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
  return starting_at('olora', start, rank, alpha, scaling, rank_pattern,
                     alpha_pattern, dropout, sites)


def start(kernel, r, s):
  """(A0 [d_in, r], B0 [r, d_out]) of a kernel [d_in, d_out]."""
  del s
  kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
  q, triangle = linalg.qr(kernel[:r].T)
  q *= jnp.where(jnp.diagonal(triangle) < 0, -1, 1).astype(q.dtype)
  return jnp.matmul(kernel, q, precision=jax.lax.Precision.HIGHEST), q.T
