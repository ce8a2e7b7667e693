"""Truncated singular value decompositions, with signs that are fixed.

A singular vector is known up to its sign, which LAPACK, cuSOLVER and the TPU's
routine choose differently. Here the entry of largest magnitude of every left
vector is positive (the first one, where several tie). Vectors of equal singular
values are still free to rotate; products of factors are not.

All take one matrix w [d_in, d_out] of any float type, work in float32 or
better, and are vmapped over stacks.
"""

from jax import lax
import jax.numpy as jnp


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
  if w.ndim != 2:
    raise ValueError(f'split: w has shape {w.shape}, expected [d_in, d_out]')
  most = min(w.shape)
  if not 1 <= rank <= most:
    raise ValueError(
        f'split: rank={rank}: expected 1 to {most} for a matrix of '
        f'{list(w.shape)}; the nearest is {min(max(rank, 1), most)}')
  w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
  u, s, vt = jnp.linalg.svd(w, full_matrices=False)
  u, s, vt = u[:, :rank], s[:rank], vt[:rank]
  top = jnp.take_along_axis(u, jnp.abs(u).argmax(0)[None], 0)[0]
  sign = jnp.where(top < 0, -1, 1).astype(u.dtype)
  return u * sign, s, vt * sign[:, None]


def factors(w, rank):
  """(a [d_in, rank], b [rank, d_out]): a b is the nearest to w of this rank.

  Each side takes the root of the singular values: a^T a = b b^T = diag(s).
  """
  u, s, vt = split(w, rank)
  root = jnp.sqrt(s)
  return u * root, root[:, None] * vt


def residual(w, rank):
  """What `factors` leaves: w - a b, [d_in, d_out]."""
  a, b = factors(w, rank)
  return w - jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
