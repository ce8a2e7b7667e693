"""Truncated decompositions: closed forms, signs, optimality; numpy's float64 as
the oracle of everything that is made of them."""

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


def normal(*shape):
  return np.float32(RNG.normal(size=shape))


def nearest64(w, rank):
  """The nearest matrix of a rank, and what it leaves, in float64."""
  u, s, vt = np.linalg.svd(np.float64(w), full_matrices=False)
  return u[:, :rank] * s[:rank] @ vt[:rank], np.linalg.norm(s[rank:])


# ----------------------------------------------------------------------- sides
@pytest.mark.parametrize('side, left, right', [
    ('both', .5, .5), ('left', 1, 0), ('right', 0, 1)])
def test_sides_take_the_singular_values(side, left, right):
  w = normal(9, 7)
  s = np.linalg.svd(w, compute_uv=False)[:3]
  a, b = svd.factors(w, 3, side)
  np.testing.assert_allclose(a.T @ a, np.diag(s ** (2 * left)), atol=2e-5)
  np.testing.assert_allclose(b @ b.T, np.diag(s ** (2 * right)), atol=2e-5)
  np.testing.assert_allclose(a @ b, nearest64(w, 3)[0], atol=5e-6)
  with pytest.raises(ValueError, match="unknown side 'lefft'.*'left'"):
    svd.factors(w, 3, 'lefft')


def test_numpy_stays_numpy_in_float64():
  w = RNG.normal(size=(8, 6))
  u, s, vt = svd.signed(*np.linalg.svd(w, full_matrices=False))
  for got, want in zip((u, s, vt), svd.split(np.float32(w), 6)):
    assert isinstance(got, np.ndarray) and got.dtype == np.float64
    np.testing.assert_allclose(got, want, atol=5e-6)
  for side in svd.SIDES:
    a, b = svd.weighed(u, s, vt, side)
    assert a.dtype == b.dtype == np.float64
    np.testing.assert_allclose(a @ b, w, atol=1e-13)


def test_truncate_is_the_nearest_and_residual_the_rest():
  w = normal(8, 11)
  want, rest = nearest64(w, 4)
  got = svd.truncate(w, 4)
  assert got.shape == w.shape and np.linalg.matrix_rank(got, 1e-4) == 4
  np.testing.assert_allclose(got, want, atol=5e-6)
  np.testing.assert_allclose(
      np.linalg.norm(svd.residual(w, 4)), rest, rtol=1e-5)
  np.testing.assert_allclose(svd.truncate(w, 8), w, atol=5e-6)


# ------------------------------------------------------------------ randomised
@pytest.mark.parametrize('shape', [(60, 40), (40, 60)])
def test_randomised_finds_a_matrix_of_low_rank(shape):
  w = normal(shape[0], 5) @ normal(5, shape[1])
  got = svd.randomised(w, 5, key=jax.random.key(0))
  for g, want in zip(got, svd.split(w, 5)):
    np.testing.assert_allclose(g, want, atol=2e-5 * max(1, np.abs(want).max()))


def test_randomised_with_all_columns_is_the_decomposition():
  w = normal(9, 7)
  for g, want in zip(svd.randomised(w, 7, 3, 0, key=jax.random.key(0)),
                     svd.split(w, 7)):
    np.testing.assert_allclose(g, want, atol=1e-5)


def test_power_iterations_bring_randomised_to_the_optimum():
  s = 1 / np.arange(1, 81.)
  w = np.float32(orthonormal(120, 80) * s @ orthonormal(80, 80).T)
  best = np.linalg.norm(s[10:])

  def gap(oversample, iterations):
    u, s, vt = svd.randomised(w, 10, oversample, iterations,
                              key=jax.random.key(0))
    return np.linalg.norm(w - u * s @ vt) / best - 1

  gaps = [gap(5, n) for n in (0, 1, 2, 6)]
  assert gaps == sorted(gaps, reverse=True) and gaps[0] > .05, gaps
  assert abs(gaps[-1]) < 1e-4, gaps
  # Halko, Martinsson and Tropp, theorem 10.5, of the expectation; one draw.
  assert gap(10, 0) < np.sqrt(1 + 10 / 9) - 1


def test_randomised_keeps_small_singular_values_in_float32():
  """Without orthonormal bases powers of 1e-3 would be rounding by the third."""
  s = np.array([1, 1e-1, 1e-2, 1e-3] + [1e-6] * 36)
  w = np.float32(orthonormal(50, 40) * s @ orthonormal(40, 40).T)
  _, got, _ = svd.randomised(w, 4, 2, 6, key=jax.random.key(0))
  np.testing.assert_allclose(got, s[:4], rtol=1e-3)


def test_randomised_under_jit_and_vmap():
  w = normal(3, 12, 4) @ normal(3, 4, 9)
  keys = jax.random.split(jax.random.key(0), 3)
  run = jax.jit(jax.vmap(lambda w, k: svd.randomised(w, 4, 2, 1, key=k)))
  for i, (u, s, vt) in enumerate(zip(*run(w, keys))):
    np.testing.assert_allclose(s, np.linalg.svd(w[i])[1][:4], rtol=1e-5)
    np.testing.assert_allclose(u * s @ vt, w[i], atol=2e-5)


# -------------------------------------------------------------------- adapters
def test_refactor_is_for_an_adapter_of_its_scale():
  w = normal(9, 7)
  a, b = svd.refactor(w, 3, 4.0)
  np.testing.assert_allclose(4 * a @ b, nearest64(w, 3)[0], atol=5e-6)
  np.testing.assert_allclose(a.T @ a, b @ b.T, atol=5e-6)
  a, b = svd.refactor(normal(9, 2) @ normal(2, 7), 4)  # of rank 2: two of zeros
  assert np.abs(a[:, 2:]).max() < 2e-3 and np.abs(b[2:]).max() < 2e-3


@pytest.mark.parametrize('d_in, m, d_out', [(9, 4, 7), (5, 8, 7), (6, 9, 4)])
def test_refactor_of_factors_equals_that_of_the_dense_matrix(d_in, m, d_out):
  a, b = normal(d_in, m), normal(m, d_out)
  w = np.float64(a) @ b
  for rank in (1, 3, min(d_in, m, d_out)):
    x, y = svd.refactor_factors(a, b, rank)
    assert x.shape == (d_in, rank) and y.shape == (rank, d_out)
    for got, want in zip((x, y), svd.refactor(np.float32(w), rank)):
      np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(x @ y, nearest64(w, rank)[0], atol=1e-5)


def test_refactor_of_factors_never_makes_the_dense_matrix():
  a, b = normal(2000, 3), normal(3, 1500)
  text = jax.jit(lambda a, b: svd.refactor_factors(a, b, 2)).lower(
      a, b).as_text()
  assert '2000x1500' not in text and '1500x2000' not in text


def test_concatenated_adapters_are_their_sum():
  adapters = [(normal(6, r), normal(r, 5), s)
              for r, s in ((2, 2.0), (1, -0.5), (3, 0.3))]
  a, b = svd.concatenate(adapters)
  want = sum(s * np.float64(a) @ b for a, b, s in adapters)
  assert a.shape == (6, 6) and b.shape == (6, 5)
  np.testing.assert_allclose(a @ b, want, atol=2e-6)
  np.testing.assert_array_equal(a[:, :2], 2 * adapters[0][0])
  np.testing.assert_array_equal(b[2:3], adapters[1][1])
  small = svd.refactor_factors(a, b, 5)  # [6, 5] has no more
  np.testing.assert_allclose(small[0] @ small[1], want, atol=5e-6)


@pytest.mark.parametrize('run, match', [
    (lambda: svd.refactor_factors(np.ones((4, 2)), np.ones((2, 5)), 3),
     r'rank=3: expected 1 to 2 for the product of .4, 2. and .2, 5.; the near'),
    (lambda: svd.refactor_factors(np.ones((4, 2)), np.ones((3, 5)), 1),
     r'a .4, 2. and b .3, 5. have no product'),
    (lambda: svd.concatenate([]), 'at least one'),
    (lambda: svd.concatenate([(np.ones((4, 2)), np.ones((2, 5)), 1.),
                              (np.ones((4, 2)), np.ones((2, 6)), 1.)]),
     r'adapter 1 has a .4, 2. and b .2, 6., expected .4, r. and .r, 5.'),
    (lambda: svd.randomised(np.ones((4, 3)), 4, key=jax.random.key(0)),
     'randomised: rank=4: expected 1 to 3'),
    (lambda: svd.randomised(np.ones((4, 3)), 1, -1, key=jax.random.key(0)),
     'oversample=-1: expected'),
    (lambda: svd.randomised(np.ones((4, 3)), 1, 1, -1, key=jax.random.key(0)),
     'iterations=-1: expected')])
def test_what_is_refused(run, match):
  with pytest.raises(ValueError, match=match):
    run()
