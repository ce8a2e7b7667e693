"""How far the columns of a factor are from orthonormal, by its Gram matrix.

The r x r Gram matrix of A [d, r] is enough. The d x d one has the same
minimisers and d - r further terms, which nothing changes:

  ||A A^T - I_d||_F^2 = ||A^T A - I_r||_F^2 + d - r

Used by KaSA (arXiv 2412.06071) and AdaLoRA (arXiv 2303.10512).
"""

import jax
import jax.numpy as jnp

# Under the root, whose derivative at 0 is infinite: columns orthonormal to the
# bit have distance 1e-6 and gradient 0.
_EPS = 1e-12


def off_orthonormal(a):
  """||A^T A - I||_F of every matrix A of a [..., d, r]: [...].

  In float32 at least. Rows of B [r, d] are the columns of B^T.

  Raises:
    ValueError: an array without two axes.
  """
  if a.ndim < 2:
    raise ValueError(f'off_orthonormal: got shape {a.shape}, expected [..., d, '
                     'r]')
  a = a.astype(jnp.promote_types(a.dtype, jnp.float32))
  gram = jnp.einsum('...dr,...ds->...rs', a, a,
                    precision=jax.lax.Precision.HIGHEST)
  off = gram - jnp.eye(a.shape[-1], dtype=a.dtype)
  return jnp.sqrt(jnp.square(off).sum((-2, -1)) + _EPS)
