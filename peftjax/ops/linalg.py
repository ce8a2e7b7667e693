"""Decompositions by LAPACK, one matrix at a time.

jaxlib hands the matrices of a batch to XLA's own threads, and one of these
waits for them. Where as many batched LUs or QRs run at once as there are
threads, all of them wait and none works: on 2 cores a program with two of them
stands still for ever (jaxlib 0.10.2). Under vmap the functions below are loops
over the batch. They are meant for what is made once, and not differentiated.
"""

import jax
import jax.numpy as jnp


@jax.custom_batching.sequential_vmap
def svd(w):
  """(u, s, vt) of w [d_in, d_out], without the null space."""
  return tuple(jnp.linalg.svd(w, full_matrices=False))


@jax.custom_batching.sequential_vmap
def qr(w):
  """(q, r) of w [d_in, d_out], q with as many columns as the smaller side."""
  return tuple(jnp.linalg.qr(w))


@jax.custom_batching.sequential_vmap
def triangle(w):
  """r of `qr`, without q."""
  return jnp.linalg.qr(w, mode='r')


@jax.custom_batching.sequential_vmap
def inverse(w):
  """Of a square matrix."""
  return jnp.linalg.inv(w)
