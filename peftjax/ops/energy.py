"""Hyperspherical energy: how evenly the neurons of a layer spread directions.

Neurons are the columns w_j of a kernel [d_in, n], u_j = w_j / ||w_j||:

  E = sum_{i != j} 1 / ||u_i - u_j||,   ||u_i - u_j||^2 = 2 - 2 u_i . u_j.

A rotation of the input space (OFT, BOFT) and positive column scales leave E as
it is; an additive low-rank update does not.

Source: "Learning towards Minimum Hyperspherical Energy" (arXiv 1805.09298), as
used in "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (arXiv
2306.07280). The metric of OFT's released code differs: see `half_space`.
"""

import jax
import jax.numpy as jnp

# Smallest squared distance: each pair counts for at most 1e4. In float32
# 2 - 2 cos itself is good to a few 1e-7, so closer pairs have no digits left.
_MIN_SQUARE = 1e-8

# Columns of the [n, n] matrix of cosines held at a time, so that a head with a
# large vocabulary does not need n^2 numbers.
_COLUMNS = 1024


def hyperspherical_energy(kernel, half_space=False, reduce='sum'):
  """Hyperspherical energy of the columns of one kernel.

  Squared distances are clipped from below at 1e-8, so duplicate neurons count
  1e4 a pair instead of infinity, and computed in float32 at full matmul
  precision. A zero column has no direction; it counts as orthogonal to all.

  Args:
    kernel: [d_in, n], any float type.
    half_space: False, the papers' energy of the n directions u_j. True, the
      metric of OFT's released code: the 2 n directions {u_j} and {-u_j}, with
      ||w|| = sqrt(sum w^2 + 1e-4). (That code averages: reduce='mean'.)
    reduce: 'sum' over ordered pairs i != j, so each pair counts twice, as in
      the formula; 'mean' over pairs.

  Returns:
    A float32 scalar; 0 where there are no pairs.

  Raises:
    ValueError: if kernel is not a matrix or reduce is unknown.
  """
  if kernel.ndim != 2:
    raise ValueError(
        f'hyperspherical_energy: kernel has shape {kernel.shape}, expected '
        '[d_in, n]; flatten a convolution to [-1, d_out] first.')
  if reduce not in ('sum', 'mean'):
    raise ValueError(
        f"hyperspherical_energy: reduce={reduce!r}, expected 'sum' or 'mean'.")
  w = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
  n = w.shape[1]
  square = jnp.sum(w**2, axis=0)
  if half_space:
    u = w / jnp.sqrt(square + 1e-4)
  else:
    u = w / jnp.sqrt(jnp.where(square > 0, square, 1))

  def inverse_distance(cosine):
    return jax.lax.rsqrt(jnp.maximum(2 - 2 * cosine, _MIN_SQUARE))

  def column(j):
    cosine = jnp.matmul(u[:, j], u, precision=jax.lax.Precision.HIGHEST)
    same = jnp.where(jnp.arange(n) == j, 0, inverse_distance(cosine)).sum()
    if not half_space:
      return same
    # u_j against the other u_i and all -u_i; -u_j gives the same once more.
    return 2 * (same + inverse_distance(-cosine).sum())

  total = jnp.sum(
      jax.lax.map(column, jnp.arange(n), batch_size=min(n, _COLUMNS)))
  points = 2 * n if half_space else n
  return total / max(points * (points - 1), 1) if reduce == 'mean' else total


def model_energy(params, half_space=False, reduce='sum'):
  """Sum of `hyperspherical_energy` over all 2-D and 4-D leaves of a tree.

  A convolution kernel [kh, kw, c_in, c_out] is flattened to one column per
  output channel. Report it as the difference to the pretrained parameters.

  Args:
    params: tree of arrays; leaves that are not 2-D or 4-D are left out.
    half_space: see `hyperspherical_energy`.
    reduce: within a leaf, see `hyperspherical_energy`.

  Returns:
    A float32 scalar.
  """
  return sum(
      (hyperspherical_energy(w.reshape(-1, w.shape[-1]), half_space, reduce)
       for w in jax.tree.leaves(params) if w.ndim in (2, 4)),
      start=jnp.float32(0))
