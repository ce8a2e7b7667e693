"""Truncated decompositions: closed forms, signs, optimality."""

import jax
import jax.numpy as jnp
import numpy as np
from peftjax.ops import svd
import pytest

RNG = np.random.default_rng(0)


def orthonormal(d, r):
  return np.linalg.qr(RNG.normal(size=(d, r)))[0]


def test_a_diagonal_matrix():
  w = jnp.diag(jnp.array([2., -5., 3.]))
  u, s, vt = svd.split(w, 2)
  np.testing.assert_allclose(s, [5, 3], rtol=1e-6)
  np.testing.assert_allclose(u, [[0, 0], [1, 0], [0, 1]], atol=1e-6)
  np.testing.assert_allclose(vt, [[0, -1, 0], [0, 0, 1]], atol=1e-6)
  np.testing.assert_allclose(
      svd.residual(w, 2), np.diag([2, 0, 0]), atol=1e-6)


@pytest.mark.parametrize('shape', [(7, 5), (5, 7), (6, 6)])
def test_finds_the_terms_that_a_matrix_was_made_of(shape):
  u, v = (orthonormal(d, 4) for d in shape)
  u *= np.sign(u[np.abs(u).argmax(0), np.arange(4)])
  s = np.array([4., 3., 2., 1.])
  w = np.float32(u * s @ v.T)
  got = svd.split(w, 3)
  for g, want in zip(got, (u[:, :3], s[:3], v.T[:3])):
    np.testing.assert_allclose(g, want, atol=2e-6)


def test_signs_do_not_depend_on_those_of_the_routine(monkeypatch):
  w = np.float32(RNG.normal(size=(8, 6)))
  want = svd.split(w, 6)
  plain = jnp.linalg.svd

  def flipped(w, **kwargs):
    u, s, vt = plain(w, **kwargs)
    sign = np.float32([1, -1, -1, 1, -1, 1])
    return u * sign, s, vt * sign[:, None]

  monkeypatch.setattr(jnp.linalg, 'svd', flipped)
  for got, v in zip(svd.split(w, 6), want):
    np.testing.assert_array_equal(got, v)
  u, _, _ = want
  assert (np.take_along_axis(u, np.abs(u).argmax(0)[None], 0) > 0).all()


def test_factors_share_the_singular_values_and_are_the_nearest():
  w = np.float32(RNG.normal(size=(9, 7)))
  s = np.linalg.svd(w, compute_uv=False)
  a, b = svd.factors(w, 3)
  assert a.shape == (9, 3) and b.shape == (3, 7)
  np.testing.assert_allclose(a.T @ a, np.diag(s[:3]), atol=5e-6)
  np.testing.assert_allclose(b @ b.T, np.diag(s[:3]), atol=5e-6)
  rest = svd.residual(w, 3)
  np.testing.assert_allclose(rest, w - a @ b, atol=1e-6)
  np.testing.assert_allclose(  # Eckart and Young
      np.linalg.svd(rest, compute_uv=False)[:4], s[3:], atol=5e-6)


def test_low_rank_and_zero_matrices_are_finite():
  w = np.float32(np.outer(np.arange(1, 6), np.arange(1, 5)))
  a, b = svd.factors(w, 3)
  np.testing.assert_allclose(a @ b, w, atol=1e-4)
  assert not np.any(svd.residual(np.zeros((4, 3), np.float32), 2))
  assert all(np.isfinite(v).all() for v in svd.split(np.zeros((4, 3)), 2))


def test_bfloat16_is_decomposed_in_float32_and_stacks_by_vmap():
  w = jnp.asarray(RNG.normal(size=(2, 6, 4)), jnp.bfloat16)
  u, s, vt = jax.vmap(lambda w: svd.split(w, 4))(w)
  assert {v.dtype for v in (u, s, vt)} == {jnp.dtype('float32')}
  np.testing.assert_allclose(
      jnp.einsum('nir,nr,nro->nio', u, s, vt), np.float32(w), atol=1e-5)


@pytest.mark.parametrize('rank, near', [(0, 1), (5, 4)])
def test_bad_ranks(rank, near):
  with pytest.raises(ValueError, match=(
      f'rank={rank}: expected 1 to 4 for a matrix of .6, 4.; the nearest is '
      f'{near}')):
    svd.split(np.zeros((6, 4)), rank)
  with pytest.raises(ValueError, match=r'shape \(4,\), expected'):
    svd.split(np.zeros(4), 1)
