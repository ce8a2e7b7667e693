"""Truncated singular value decompositions, and low-rank factors made of them.

A singular vector is known up to its sign, which LAPACK, cuSOLVER and the TPU's
routine choose differently. Here the entry of largest magnitude of every left
vector is positive (the first one, where several tie). Vectors of equal singular
values are still free to rotate; products of factors are not.

All take one matrix w [d_in, d_out] of any float type, or its factors, work in
float32 or better, and are vmapped over stacks.

Source of `randomised`: "Finding structure with randomness: Probabilistic
algorithms for constructing approximate matrix decompositions" (arXiv
0909.4061), algorithms 4.4 and 5.1.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from peftjax.method import nearest
from peftjax.ops import linalg

SIDES = ('both', 'left', 'right')
_mul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def split(w, rank):
  """The first `rank` terms of the singular value decomposition of w.

  Args:
    w: [d_in, d_out].
    rank: From 1 to min(d_in, d_out).

  Returns:
    (u [d_in, rank], s [rank], vt [rank, d_out]): orthonormal columns, singular
    values in descending order, orthonormal rows.

  Raises:
    ValueError: a w that is no matrix, a rank that it does not have.
  """
  w = _matrix('split', w)
  _check_rank('split', rank, min(w.shape), f'a matrix of {list(w.shape)}')
  u, s, vt = linalg.svd(w)
  return signed(u[:, :rank], s[:rank], vt[:rank])


def randomised(w, rank, oversample=10, iterations=2, *, key):
  """`split`, found by products with a random matrix: fast where rank is small.

  With Q [d_in, l] orthonormal, l = rank + oversample, and W' = W^T,

    Q = qr(W N),  N [d_out, l] normal;   `iterations` times: Q = qr(W qr(W' Q))
    Q' W = U S V',  W ~ (Q U) S V'

  Directions beyond the first l are damped by (s_l+1 / s_rank)^(2 iterations +
  1): exact where w has a rank of at most l, good where singular values fall.

  Args:
    w: [d_in, d_out].
    rank: From 1 to min(d_in, d_out).
    oversample: Further columns, at least 0; l is at most min(d_in, d_out).
    iterations: Power iterations, at least 0; each is orthonormalised, so that
      small singular values survive float32.
    key: Of N.

  Returns:
    As `split`.

  Raises:
    ValueError: as `split`; an oversample or iterations below 0.
  """
  w = _matrix('randomised', w)
  most = min(w.shape)
  _check_rank('randomised', rank, most, f'a matrix of {list(w.shape)}')
  for name, n in (('oversample', oversample), ('iterations', iterations)):
    if n < 0:
      raise ValueError(f'randomised: {name}={n}: expected a whole number, at '
                       'least 0; the nearest is 0')
  columns = min(rank + oversample, most)
  basis = lambda m: linalg.qr(m)[0]
  q = basis(_mul(w, jax.random.normal(key, (w.shape[1], columns), w.dtype)))
  for _ in range(iterations):
    q = basis(_mul(w, basis(_mul(w.T, q))))
  u, s, vt = linalg.svd(_mul(q.T, w))
  return signed(_mul(q, u[:, :rank]), s[:rank], vt[:rank])


def signed(u, s, vt):
  """The same terms, signs as in the module docstring; numpy stays numpy."""
  top = u[abs(u).argmax(0), np.arange(u.shape[1])]
  sign = (1 - 2 * (top < 0)).astype(u.dtype)
  return u * sign, s, vt * sign[:, None]


# --------------------------------------------------------------------- factors
def weighed(u, s, vt, side='both'):
  """(a, b) with a b = u diag(s) vt; numpy stays numpy.

  Args:
    u: [d_in, r].
    s: [r].
    vt: [r, d_out].
    side: Which factor takes the singular values: 'left' (a = u s, b = vt),
      'right' (a = u, b = s vt), or 'both' their roots, so that
      a^T a = b b^T = diag(s).

  Raises:
    ValueError: an unknown side.
  """
  if side not in SIDES:
    raise ValueError(f'unknown side {side!r}{nearest(side, SIDES)}')
  if side == 'both':
    root = s ** 0.5
    return u * root, root[:, None] * vt
  return (u * s, vt) if side == 'left' else (u, s[:, None] * vt)


def factors(w, rank, side='both'):
  """(a [d_in, rank], b [rank, d_out]): a b is the nearest to w of this rank.

  Nearest in the Frobenius and in the spectral norm (Eckart and Young). `side`
  as of `weighed`.
  """
  return weighed(*split(w, rank), side)


def truncate(w, k):
  """The matrix of rank k that is nearest to w, [d_in, d_out] like w."""
  return _mul(*factors(w, k))


def residual(w, rank):
  """What `factors` leaves: w - a b, [d_in, d_out]."""
  return w - truncate(w, rank)


# -------------------------------------------------------------------- adapters
def refactor(delta, rank, scale=1.0):
  """(a [d_in, rank], b [rank, d_out]) with scale a b nearest to delta.

  Each factor takes the root of the singular values of delta / scale.

  Args:
    delta: [d_in, d_out].
    rank: From 1 to min(d_in, d_out).
    scale: Of the adapter that a and b are for, not 0.
  """
  return factors(_matrix('refactor', delta) / scale, rank)


def refactor_factors(a, b, rank):
  """`refactor` of a b, whose dense form is never made.

    a = Q_a R_a,  b^T = Q_b R_b,  R_a R_b^T = U S V^T
    a b = (Q_a U) S (Q_b V)^T

  Args:
    a: [d_in, m].
    b: [m, d_out].
    rank: From 1 to min(d_in, m, d_out).

  Returns:
    (a [d_in, rank], b [rank, d_out]).

  Raises:
    ValueError: factors that do not fit, a rank that their product cannot have.
  """
  a, b = _matrix('refactor_factors', a), _matrix('refactor_factors', b)
  if a.shape[1] != b.shape[0]:
    raise ValueError(f'refactor_factors: a {list(a.shape)} and b '
                     f'{list(b.shape)} have no product')
  _check_rank('refactor_factors', rank, min(*a.shape, b.shape[1]),
              f'the product of {list(a.shape)} and {list(b.shape)}')
  (qa, ra), (qb, rb) = linalg.qr(a), linalg.qr(b.T)
  u, s, vt = linalg.svd(_mul(ra, rb.T))
  return weighed(*signed(
      _mul(qa, u[:, :rank]), s[:rank], _mul(vt[:rank], qb.T)))


def concatenate(adapters):
  """The sum of adapters as one: (a, b) with a b = sum_i scale_i a_i b_i.

  No decomposition, so nothing is lost; `refactor_factors` makes it smaller.

  Args:
    adapters: Sequence of (a [d_in, r_i], b [r_i, d_out], scale_i); the scales
      go into a.

  Returns:
    (a [d_in, sum r_i], b [sum r_i, d_out]).

  Raises:
    ValueError: no adapters, or adapters of different kernels.
  """
  adapters = list(adapters)
  if not adapters:
    raise ValueError('concatenate: expected at least one (a, b, scale)')
  ends = [(a.shape[0], b.shape[1]) for a, b, _ in adapters]
  for i, (a, b, _) in enumerate(adapters):
    if a.shape[1] != b.shape[0] or ends[i] != ends[0]:
      raise ValueError(
          f'concatenate: adapter {i} has a {list(a.shape)} and b '
          f'{list(b.shape)}, expected [{ends[0][0]}, r] and [r, {ends[0][1]}]')
  return (jnp.concatenate([scale * a for a, _, scale in adapters], 1),
          jnp.concatenate([b for _, b, _ in adapters], 0))


# ---------------------------------------------------------------------- checks
def _matrix(name, w):
  """w in float32 or better; raises where it is no matrix."""
  w = jnp.asarray(w)
  if w.ndim != 2:
    raise ValueError(f'{name}: w has shape {w.shape}, expected [d_in, d_out]')
  return w.astype(jnp.promote_types(w.dtype, jnp.float32))


def _check_rank(name, rank, most, what):
  if not 1 <= rank <= most:
    raise ValueError(f'{name}: rank={rank}: expected 1 to {most} for {what}; '
                     f'the nearest is {min(max(rank, 1), most)}')
