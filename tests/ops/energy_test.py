"""Hyperspherical energy against loops, closed forms and its invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from peftjax.ops import energy
from peftjax.ops import orthogonal
import pytest

hyperspherical_energy = jax.jit(
    energy.hyperspherical_energy, static_argnames=('half_space', 'reduce'))
both = pytest.mark.parametrize('half_space', (False, True))


def kernel(seed, d, n):
  return np.random.default_rng(seed).normal(size=(d, n)).astype(np.float32)


def by_loops(w, half_space):
  """Sum over ordered pairs, and their number, float64."""
  w = w.astype(np.float64)
  if half_space:
    u = [s * c / np.sqrt((c**2).sum() + 1e-4) for s in (1, -1) for c in w.T]
  else:
    u = [c / np.linalg.norm(c) for c in w.T]
  total = pairs = 0
  for i in range(len(u)):
    for j in range(len(u)):
      if i != j:
        total += (2 - 2 * u[i] @ u[j])**-0.5
        pairs += 1
  return total, pairs


@both
@pytest.mark.parametrize('n', (1, 5))
def test_energy_equals_a_double_loop(half_space, n):
  w = kernel(0, 7, n)
  total, pairs = by_loops(w, half_space)
  np.testing.assert_allclose(
      hyperspherical_energy(w, half_space=half_space), total, rtol=1e-5)
  np.testing.assert_allclose(
      hyperspherical_energy(w, half_space=half_space, reduce='mean'),
      total / max(pairs, 1), rtol=1e-5)


def test_half_space_norm_matters_for_small_columns():
  w = kernel(0, 7, 5) * 0.01  # squared norms near the added 1e-4
  total, pairs = by_loops(w, True)
  got = hyperspherical_energy(w, half_space=True, reduce='mean')
  np.testing.assert_allclose(got, total / pairs, rtol=1e-5)
  assert abs(got - hyperspherical_energy(
      w * 100, half_space=True, reduce='mean')) > 1e-3


def test_orthonormal_and_simplex_columns():
  n = 6
  eye = np.eye(9, dtype=np.float32)[:, :n]
  np.testing.assert_allclose(
      hyperspherical_energy(eye), n * (n - 1) / np.sqrt(2), rtol=1e-6)
  simplex = np.eye(n, dtype=np.float32) - 1 / n  # cos = -1 / (n - 1)
  np.testing.assert_allclose(
      hyperspherical_energy(simplex, reduce='mean'),
      (2 + 2 / (n - 1))**-0.5, rtol=1e-6)


def _rotate(w, v):
  r = orthogonal.cayley(orthogonal.skew(v, 8))
  return orthogonal.block_rotate(w.T, r.mT).T


@both
def test_energy_sees_rotations_scales_and_updates(half_space):
  w = kernel(0, 24, 10)
  measure = functools.partial(hyperspherical_energy, half_space=half_space)
  before = measure(w)
  rotated = np.asarray(jax.jit(_rotate)(w, kernel(1, 3, 28)))
  assert np.abs(rotated - w).max() > 0.5
  np.testing.assert_allclose(measure(rotated), before, rtol=1e-5)
  scale = np.linspace(0.5, 2, 10, dtype=np.float32)
  # With half_space the 1e-4 under the root is not scaled along.
  np.testing.assert_allclose(
      measure(w * scale), before, rtol=1e-4 if half_space else 1e-5)
  low_rank = kernel(2, 24, 1) @ kernel(3, 1, 10)
  assert abs(measure(w + low_rank) - before) > 1e-3 * before


def test_duplicates_are_clipped_and_zero_columns_count_as_orthogonal():
  parallel = np.array([[1, 2]], np.float32)
  np.testing.assert_allclose(
      hyperspherical_energy(parallel), 2e4, rtol=1e-5)
  zero = np.array([[0, 0.3], [0, -1]], np.float32)
  np.testing.assert_allclose(
      hyperspherical_energy(zero, reduce='mean'), 2**-0.5, rtol=1e-6)
  grad = jax.grad(hyperspherical_energy)(np.concatenate([zero, zero], 1))
  assert np.isfinite(grad).all()


def test_more_columns_than_are_held_at_a_time():
  w = kernel(0, 16, energy._COLUMNS + 3)
  u = w.astype(np.float64) / np.linalg.norm(w, axis=0)
  square = 2 - 2 * u.T @ u
  np.fill_diagonal(square, np.inf)
  np.testing.assert_allclose(
      hyperspherical_energy(w), (square**-0.5).sum(), rtol=1e-5)


def test_bfloat16_kernels_are_measured_in_float32():
  w = jnp.asarray(kernel(0, 7, 5), jnp.bfloat16)
  got = hyperspherical_energy(w)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
      got, by_loops(np.asarray(w, np.float32), False)[0], rtol=1e-5)


@both
def test_model_energy_sums_matrices_and_convolutions(half_space):
  dense, conv = kernel(0, 7, 5), kernel(1, 18, 4).reshape(3, 3, 2, 4)
  params = dict(
      a=dict(kernel=dense, bias=np.ones(5, np.float32)),
      b=dict(kernel=conv, other=np.ones((2, 3, 4), np.float32)))
  expected = sum(by_loops(w.reshape(-1, w.shape[-1]), half_space)[0]
                 for w in (dense, conv))
  np.testing.assert_allclose(
      jax.jit(energy.model_energy, static_argnums=1)(params, half_space),
      expected, rtol=1e-5)
  assert energy.model_energy({'bias': np.ones(3)}) == 0


def test_bad_input():
  with pytest.raises(ValueError, match=r'\(3, 3, 2, 4\), expected \[d_in, n\]'):
    energy.hyperspherical_energy(np.zeros((3, 3, 2, 4)))
  with pytest.raises(ValueError, match="'max', expected 'sum' or 'mean'"):
    energy.hyperspherical_energy(np.zeros((3, 3)), reduce='max')
