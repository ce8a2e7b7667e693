"""LoRA-GA: LoRA that starts along the gradient of the kernel.

Source: "LoRA-GA: Low-Rank Adaptation with Gradient Approximation" (arXiv
2407.05000).

  G = U diag(S) V^T                mean gradient of the kernel [d_in, d_out],
                                   S in descending order
  A0 = c U[:, :r]                  [d_in, r], c = d_out^(1/4) / gamma^(1/2)
  B0 = c V^T[r:2r]                 [r, d_out]
  y = x K + b + s x (A B - A0 B0)  s as in `lowrank.lora`
  fold: K' = K + s (A B - A0 B0)

A first step of gradient descent on A and B moves the kernel along the nearest
matrix to G of rank 2 r, the most that two factors of rank r can follow: by
-lr (s c)^2 (U diag(S) V^T)_2r, to first order in lr.

Init: A = A0, B = B0: exactly the base model. G is collected before training
(`peftjax.calibrate`), in training mode. A0 and B0 are kept in theta, frozen,
and the difference is computed as in `lowrank.pissa`. Of G only the singular
vectors count; those of singular values that are 0 may be any.

Count: r (d_in + d_out) a kernel; as many again are stored.

Evidence for it is thin: the paper is the only source of its figures that was
read, and nothing here repeats them.

Where sources differ:
  The base. The authors' code and Hugging Face PEFT train beside a kernel
    K - s A0 B0 that takes the place of K.
  Size of the start. The authors' code has c on both factors, as here. In PEFT
    A0 is U[:, :r] itself and B0 is c diag(S[r:2r]) V^T[r:2r]: its start depends
    on the size of the gradient.
  Batches. The authors' config has 8 batches of one example each, ours 8 batches
    as they are trained on (`config.calibrate`).
  The decomposition is a full one; both others have a randomised one.
"""

import math

from peftjax import sites as sites_lib
from peftjax.methods.lowrank.lora import by_site
from peftjax.methods.lowrank.pissa import starting_at
from peftjax.ops import statistics
from peftjax.ops import svd

EXAMPLE = dict(rank=2, alpha=4.0, gamma=4.0)


def lora_ga(rank=8, alpha=16.0, gamma=16.0, scaling='rslora', rank_pattern=(),
            alpha_pattern=(), dropout=0.0, sites=sites_lib.kernels):
  """LoRA-GA.

  Args:
    rank: r, at least 1 and at most half of the smaller side of the kernel.
    alpha: Numerator of the scale, any positive number.
    gamma: How small A0 and B0 are, any positive number.
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    alpha_pattern: The same for alpha.
    dropout: Rate on the input of the change while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: a gamma that is not positive, a rank above half of the smaller
      side, and what `lora` refuses.
  """
  if not 0 < gamma < math.inf:
    raise ValueError(
        f'lora_ga: gamma={gamma}: expected a positive number; 16 is usual')
  rank_of, _, _ = by_site(rank, alpha, scaling, rank_pattern, alpha_pattern)

  def start(kernel, r, s, stats):
    del s
    u, _, vt = svd.split(stats['gradient'], 2 * r)
    c = kernel.shape[1] ** 0.25 / gamma ** 0.5
    return c * u[:, :r], c * vt[r:]

  base = starting_at('lora_ga', start, rank, alpha, scaling, rank_pattern,
                     alpha_pattern, dropout, sites)

  def check(found):
    base.check(found)
    for path, site in found.items():
      shape, r = site.params['kernel'].shape, rank_of(path)
      if 2 * r > min(shape):
        most = min(shape) // 2
        raise ValueError(
            f'lora_ga: rank {r} at {path!r}: expected at most half of the '
            f'smaller side of the kernel of {list(shape)}; '
            + (f'the nearest is {most}' if most
               else 'leave it out of the sites'))

  return base._replace(check=check, calibration=statistics.mean_gradient())
