"""Matrix products that several methods share."""

import jax
from jax import lax
import jax.numpy as jnp


@jax.custom_vjp
def thin(x, a):
  """x [..., d] times a [d, r], where one of d and r is much the smaller.

  Same value as x @ a. The two are the halves of a low-rank product, down to a
  few columns and up again. The gradient of `a` is a product over all rows of x;
  written with the narrow operand first, whatever shape comes out, it reads
  both operands as they lie. In the form that autodiff makes XLA's CPU backend
  first transposes the wide one, or multiplies at 5 to 8 GFLOP/s, not 50 to 60.
  """
  return jnp.matmul(x, a)


def _thin_fwd(x, a):
  return jnp.matmul(x, a), (x, a)


def _thin_bwd(residuals, dy):
  x, a = residuals
  rows = tuple(range(x.ndim - 1))
  over_rows = ((rows, rows), ((), ()))
  dx = lax.dot_general(dy, a, (((dy.ndim - 1,), (1,)), ((), ())))
  if a.shape[0] > a.shape[1]:
    # Without the barrier XLA takes the transposition back.
    da = lax.optimization_barrier(lax.dot_general(dy, x, over_rows)).T
  else:
    da = lax.dot_general(x, dy, over_rows)
  return dx.astype(x.dtype), da.astype(a.dtype)


thin.defvjp(_thin_fwd, _thin_bwd)


def low_rank(h, b, scale):
  """scale * h [..., r] times b [r, d], the second half of a low-rank product.

  The scale multiplies h, which is narrow, so that neither the result nor its
  gradient is gone through once more.
  """
  return thin(scale * h, b)
