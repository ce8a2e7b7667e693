"""CorDA: LoRA that starts as components of the kernel, chosen by its inputs.

Source: "CorDA: Context-Oriented Decomposition Adaptation of Large Language
Models" (arXiv 2406.05223).

  C = mean over calls of x^T x / max|x|^2      [d_in, d_in], x [n, d_in]
  C' = C + damp mean(diag C) I                 damp: see below
  C' K = U diag(S) V^T                         K [d_in, d_out]
  A0 = C'^-1 U_J diag(S_J / s)^(1/2)           [d_in, r]
  B0 = diag(S_J / s)^(1/2) V_J^T               [r, d_out]
  y = x K + b + s x (A B - A0 B0)              s as in `lowrank.lora`
  fold: K' = K + s (A B - A0 B0)

mode='ipm' (instruction-previewed) takes for J the r largest values: what the
kernel does to inputs such as the calibration's, which should be those of the
task. mode='kpm' (knowledge-preserved) takes the r smallest: the calibration
shows what is to be kept. All min(d_in, d_out) components together are K.

damp starts at 0.01 and is doubled until ||C' C'^-1 - I||_F < 0.05. The rows of
x are the tokens that are no padding, a call is a batch of `config.calibrate`;
its largest magnitude max|x| is divided out, so that all calls weigh about the
same.
Layers that read the same share C.

Init: A = A0, B = B0: exactly the base model. Theta, its two frozen leaves and
the form of the products are those of `lowrank.pissa`; with C the identity so is
the start of mode='ipm'. Values of S that are zero, as 'kpm' takes them of a
kernel of lower rank, give factors of zeros, which never train.

Count: r (d_in + d_out) a kernel; as many again are stored.

Where sources differ:
  The scale of a call. The authors' code and Hugging Face PEFT divide by
    |max x|, the entry that is largest with its sign.
  The mean. The authors' code divides by 256 whatever was seen. In both, a call
    is one sequence of 2048 tokens: config.calibrate.batch=1.
  The base. Both train beside K - s A0 B0 in the place of K.
  Scale. Theirs is s = 1, as with rank and alpha by default here; PEFT's is
    alpha / r. The authors' rank for 7B models is 128, whose alpha is 128 too.
  Experts of a mixture. All of them read all tokens here (`models.moe`), and so
    do their statistics; hooks of PEFT meet the tokens an expert is chosen for.
"""

import functools

import jax
import jax.numpy as jnp

from peftjax.calibrate import readable
from peftjax.method import nearest
from peftjax.methods.lowrank.pissa import starting_at
from peftjax.ops import linalg
from peftjax.ops import statistics
from peftjax.ops import svd

EXAMPLE = dict(rank=2, alpha=4.0)
MODES = ('ipm', 'kpm')
DAMP, LIMIT = 0.01, 0.05  # the first damping, the error of a good inverse
_mul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def corda(rank=8, alpha=8.0, mode='ipm', scaling='lora', rank_pattern=(),
          alpha_pattern=(), dropout=0.0, sites=readable):
  """CorDA.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernel.
    alpha: Numerator of the scale, any positive number; that of the rank gives
      the authors' s = 1.
    mode: 'ipm', the largest components, or 'kpm', the smallest.
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    alpha_pattern: The same for alpha.
    dropout: Rate on the input of the change while training.
    sites: Predicate on sites; by default every kernel that multiplies what its
      layer reads, but the head.

  Raises:
    ValueError: an unknown mode, and what `lora` refuses.
  """
  if mode not in MODES:
    raise ValueError(f'corda: unknown mode {mode!r}{nearest(mode, MODES)}')

  def start(kernel, r, s, stats):
    kernel = kernel.astype(jnp.float32)
    c, inverse = damped(stats['covariance'])
    u, values, vt = svd.split(_mul(c, kernel), min(kernel.shape))
    chosen = slice(r) if mode == 'ipm' else slice(-r, None)
    root = jnp.sqrt(values[chosen] / s)
    return _mul(inverse, u[:, chosen]) * root, root[:, None] * vt[chosen]

  method = starting_at('corda', start, rank, alpha, scaling, rank_pattern,
                       alpha_pattern, dropout, sites)
  return method._replace(calibration=statistics.covariance('call', 'call'))


def damped(c):
  """(C' = C + damp mean(diag C) I, its inverse), good to `LIMIT`; [d, d]."""
  eye, mean = jnp.eye(len(c)), jnp.trace(c) / len(c)
  mean = jnp.where(mean > 0, mean, 1)  # inputs of zeros: C' is damp I

  def tried(damp):
    new = c + damp * mean * eye
    inverse = linalg.inverse(new)
    return damp, new, inverse, jnp.linalg.norm(_mul(new, inverse) - eye)

  def again(found):
    damp, _, _, error = found
    return ~(error < LIMIT) & (damp < 1e6)  # beyond it only a NaN fails

  with jax.default_matmul_precision('highest'):
    _, new, inverse, _ = jax.lax.while_loop(
        again, lambda found: tried(2 * found[0]), tried(jnp.float32(DAMP)))
  return new, inverse
