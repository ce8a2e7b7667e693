"""LoRA-SB: an r x r matrix between bases of the first step of full tuning.

Source: "Initialization using Update Approximation is a Silver Bullet for
Extremely Efficient Low-Rank Fine-Tuning" (arXiv 2411.19557).

  D = -eta sign(G)                 G: mean gradient of the kernel [d_in, d_out]
  D = U diag(S) V^T                S in descending order
  A = U_r                          [d_in, r], frozen
  B = V_r^T                        [r, d_out], frozen
  y = x K + b + (x A) R B          R [r, r]
  fold: K' = K + A R B

Init: R = diag(S_r): not the base, but the base after a first step D of full
fine-tuning by AdamW, as near as rank r comes to it. The kernel itself is left
as it is. G is collected before training (`peftjax.calibrate`), in training
mode; of it only the signs count, 0 for what has no gradient.

Count: r^2 a kernel; r (d_in + d_out) frozen numbers are stored beside them.

A and B have orthonormal columns and rows, and there is no scale: a step of
gradient descent on R moves the kernel by -lr A A^T G B^T B, the nearest to the
full step that the two bases allow. They depend on the data and are kept in
theta.

Where sources differ:
  eta. The authors' code takes lr / (warm-up ratio * steps), the learning rate
    of the first step of a linear warm-up. Here it is `step_size`, a number of
    the method, which knows of no schedule.
  Examples. Their code takes 50 for language models and 2 for GLUE, here it is
    as `config.calibrate` says. They add gradients up; the mean has their signs.
  Precision. Their code stores A, R and B in bfloat16, which leaves A and B
    orthonormal to about 1e-2; here they are float32.
  The decomposition. A full one here, a randomised one there.
"""

import math

import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.methods.lowrank.lora import by_site
from peftjax.methods.lowrank.lora_xs import lora_xs
from peftjax.ops import statistics
from peftjax.ops import svd

EXAMPLE = dict(rank=2, step_size=0.1)


def lora_sb(rank=24, step_size=1e-4, rank_pattern=(), dropout=0.0,
            sites=sites_lib.kernels):
  """LoRA-SB.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernel.
    step_size: eta, any positive number: how far the start is from the base. The
      authors' is config.optim.lr / (config.optim.warmup * config.steps).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    dropout: Rate on the adapter's input while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: a step_size that is not positive, and what `lora` refuses.
  """
  if not 0 < step_size < math.inf:
    raise ValueError(f'lora_sb: step_size={step_size}: expected a positive '
                     'number; lr / (steps of the warm-up) is usual')
  base = lora_xs(rank, rank_pattern=rank_pattern, dropout=dropout, sites=sites)
  rank_of, _, _ = by_site(rank, 1.0, 'lora', rank_pattern, ())

  def init(key, site, p, stats):
    del key, p
    u, s, vt = svd.split(-jnp.sign(stats['gradient']), rank_of(site.path))
    return dict(a=u, b=vt, r=step_size * jnp.diag(s))

  def prepare(t, ctx):
    del ctx
    return {**t, 'scale': jnp.float32(1)}

  return base._replace(
      name='lora_sb', init=init, prepare=prepare, tolerance=math.inf,
      calibration=statistics.mean_gradient())
