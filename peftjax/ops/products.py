"""Matrix products that several methods share."""

import jax
from jax import lax
import jax.numpy as jnp


@jax.custom_vjp
def thin(x, a):
  """x [..., d] times a [d, r] with r much smaller than d.

  Same value as x @ a. The gradient of `a` is written (dh^T x)^T: as x^T dh, the
  form autodiff makes, XLA's CPU backend reaches a fifth of the throughput.
  """
  return jnp.matmul(x, a)


def _thin_fwd(x, a):
  return jnp.matmul(x, a), (x, a)


def _thin_bwd(residuals, dh):
  x, a = residuals
  rows = tuple(range(x.ndim - 1))
  dx = lax.dot_general(dh, a, (((dh.ndim - 1,), (1,)), ((), ())))
  da = lax.dot_general(dh, x, ((rows, rows), ((), ()))).T
  return dx.astype(x.dtype), da.astype(a.dtype)


thin.defvjp(_thin_fwd, _thin_bwd)
