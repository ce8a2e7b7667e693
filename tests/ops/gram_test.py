"""Distances from orthonormal columns: closed forms, the large Gram matrix."""

import jax
import jax.numpy as jnp
import numpy as np
from peftjax.ops import gram
import pytest

RNG = np.random.default_rng(0)


def test_is_the_frobenius_norm_of_every_matrix():
  a = RNG.normal(size=(2, 3, 7, 4))
  got = gram.off_orthonormal(jnp.asarray(a, jnp.float32))
  want = np.linalg.norm(
      a.swapaxes(-1, -2) @ a - np.eye(4), axis=(-2, -1))
  assert got.shape == (2, 3)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_large_gram_matrix_differs_by_a_constant():
  """||A A^T - I_d||^2 = ||A^T A - I_r||^2 + d - r: the same minimisers."""
  a = np.float32(RNG.normal(size=(9, 3)))
  np.testing.assert_allclose(
      gram.off_orthonormal(a.T) ** 2, gram.off_orthonormal(a) ** 2 + 9 - 3,
      rtol=1e-5)


def test_gradient_is_the_closed_form_and_zero_at_both_ends():
  a = np.float32(RNG.normal(size=(7, 4)))
  value, grad = jax.value_and_grad(gram.off_orthonormal)(a)
  off = np.float64(a).T @ a - np.eye(4)
  np.testing.assert_allclose(grad, 2 * a @ off / value, rtol=1e-5, atol=1e-5)
  value, grad = jax.value_and_grad(gram.off_orthonormal)(jnp.eye(7, 4))
  np.testing.assert_allclose(value, 1e-6, rtol=1e-3)
  np.testing.assert_array_equal(grad, np.zeros((7, 4)))
  value, grad = jax.value_and_grad(gram.off_orthonormal)(jnp.zeros((7, 4)))
  np.testing.assert_allclose(value, 2.0, rtol=1e-6)  # sqrt(r)
  np.testing.assert_array_equal(grad, np.zeros((7, 4)))


def test_computes_in_float32():
  assert gram.off_orthonormal(jnp.ones((3, 2), jnp.bfloat16)).dtype == (
      jnp.float32)


def test_refuses_a_vector():
  with pytest.raises(ValueError, match=r'got shape \(3,\), expected'):
    gram.off_orthonormal(jnp.ones(3))
