"""Decompositions one by one: right, and never a batch for LAPACK."""

import jax
import jax.numpy as jnp
import numpy as np
from peftjax.ops import linalg
import pytest

W = np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)


def twice(fn):
  return jax.jit(jax.vmap(jax.vmap(fn)))


def test_svd_and_qr_give_the_matrices_back():
  u, s, vt = twice(linalg.svd)(W[..., :4])
  np.testing.assert_allclose(u * s[..., None, :] @ vt, W[..., :4], atol=1e-5)
  q, r = twice(linalg.qr)(W[..., :4])
  np.testing.assert_allclose(q @ r, W[..., :4], atol=1e-5)
  assert u.shape == q.shape == (2, 3, 6, 4)


def test_inverse():
  np.testing.assert_allclose(
      twice(linalg.inverse)(W) @ W, np.broadcast_to(np.eye(6), W.shape),
      atol=1e-4)


@pytest.mark.parametrize('fn', (
    linalg.svd, linalg.qr, linalg.triangle, linalg.inverse))
def test_lapack_gets_one_matrix_at_a_time(fn):
  text = twice(fn).lower(W).as_text()
  calls = [line for line in text.splitlines() if 'lapack' in line]
  assert calls or jax.default_backend() != 'cpu'
  assert not any('x6x6xf32>' in line for line in calls)
  batched = jax.jit(jax.vmap(jnp.linalg.qr)).lower(W[0]).as_text()
  assert any('x6x6xf32>' in line for line in batched.splitlines()
             if 'lapack' in line)  # the test can see one
