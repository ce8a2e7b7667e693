"""Cayley blocks, butterflies, block dropout and the COFT ball."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from peftjax.ops import orthogonal
import pytest

SIZES = (1, 2, 3, 8, 16, 17)  # both sides of the elementwise path


skew = jax.jit(orthogonal.skew, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def cayley(v, b):
  return orthogonal.cayley(orthogonal.skew(v, b))


@functools.partial(jax.jit, static_argnums=(1, 2))
def neumann(v, b, terms):
  return orthogonal.cayley_neumann(orthogonal.skew(v, b), terms)


block_rotate = jax.jit(orthogonal.block_rotate)
butterfly_rotate = jax.jit(orthogonal.butterfly_rotate)


def triangles(seed, n, b, scale=1.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=(n, b * (b - 1) // 2))).astype(np.float32)


def skew64(v, b):
  """Q = triu(v) - triu(v)^T by a double loop, float64."""
  q = np.zeros(v.shape[:-1] + (b, b))
  at = 0
  for i in range(b):
    for j in range(i + 1, b):
      q[..., i, j], q[..., j, i] = v[..., at], -v[..., at]
      at += 1
  return q


def cayley64(v, b):
  q, eye = skew64(v, b), np.eye(b)
  return (eye + q) @ np.linalg.inv(eye - q)


def rotations(seed, shape, b):
  """Random Cayley blocks, shape + [b, b]."""
  r = cayley64(triangles(seed, int(np.prod(shape)), b), b)
  return r.reshape(shape + (b, b)).astype(np.float32)


def blockdiag64(r):
  n, b = r.shape[0], r.shape[-1]
  out = np.zeros((n * b, n * b))
  for i in range(n):
    out[i * b:(i + 1) * b, i * b:(i + 1) * b] = r[i]
  return out


def butterfly64(rs):
  """M_{m-1} ... M_0 with explicit permutation matrices, float64."""
  m, n, b, _ = rs.shape
  d, h, product = n * b, b // 2, np.eye(n * b)
  for i in range(m):
    p = np.zeros((d, d))
    for g in range(0, d, b * 2**i):
      for k in range(2**i):
        for e in range(b):  # second half-block: 2^i half-blocks after the first
          p[g + k * h + e + (e >= h) * (2**i - 1) * h, g + k * b + e] = 1
    product = p @ blockdiag64(np.asarray(rs[i], np.float64)) @ p.T @ product
  return product


@pytest.mark.parametrize('b', SIZES)
def test_skew_fills_the_upper_triangle_by_rows(b):
  v = triangles(0, 6, b).reshape(2, 3, -1)
  q = skew(v, b)
  np.testing.assert_array_equal(q, skew64(v, b).astype(np.float32))
  np.testing.assert_array_equal(jax.jit(orthogonal.unskew)(q), v)


def test_skew_gradient_is_upper_minus_lower():
  v = triangles(0, 3, 5)
  w = np.random.default_rng(1).normal(size=(3, 5, 5)).astype(np.float32)
  grad = jax.jit(jax.grad(lambda v: (orthogonal.skew(v, 5) * w).sum()))(v)
  rows, cols = np.triu_indices(5, 1)
  np.testing.assert_array_equal(grad, w[:, rows, cols] - w[:, cols, rows])


def test_skew_refuses_a_wrong_length():
  with pytest.raises(ValueError, match='size 4 take a last axis of 6'):
    orthogonal.skew(np.zeros((2, 5)), 4)


@pytest.mark.parametrize('b', SIZES)
def test_cayley_is_a_rotation_and_equals_the_inverse(b):
  v = np.concatenate([triangles(b, 20, b, s) for s in (0.01, 0.3, 3.0)])
  q, eye = skew64(v, b), np.eye(b)
  r = np.asarray(cayley(v, b), np.float64)
  np.testing.assert_allclose(
      r @ r.swapaxes(-1, -2), np.broadcast_to(eye, r.shape), atol=1e-5)
  np.testing.assert_allclose(np.linalg.det(r), 1, atol=1e-4)
  np.testing.assert_allclose(r, cayley64(v, b), atol=1e-5)
  # The factors commute.
  np.testing.assert_allclose(r, np.linalg.inv(eye - q) @ (eye + q), atol=1e-5)


@pytest.mark.parametrize('n, b', [(200, 16), (50, 33), (20, 64), (2, 260)])
def test_cayley_of_a_large_matrix_is_a_rotation(n, b):
  # Elimination alone, without Newton steps, is off by 1e-3 here.
  v = triangles(0, n, b, 100.0)
  r = cayley(v, b)
  np.testing.assert_allclose(
      r @ r.swapaxes(-1, -2), np.broadcast_to(np.eye(b), r.shape), atol=1e-4)
  np.testing.assert_allclose(r, cayley64(v, b), atol=1e-4)


@pytest.mark.parametrize('b', (4, 32, 260))
def test_cayley_waits_for_no_batch_of_decompositions(b):
  """Batched LUs side by side stop a program on CPUs; see `ops.linalg`."""
  q = jnp.zeros((2, 3, b, b))
  text = jax.jit(jax.grad(lambda q: jax.vmap(
      orthogonal.cayley)(q).sum())).lower(q).as_text()
  calls = [line for line in text.splitlines() if 'lapack' in line]
  assert bool(calls) == (b > 256)
  assert all(f'tensor<{b}x{b}xf32>' in line for line in calls)
  assert not any(f'x{b}x{b}xf32' in line for line in calls)


@pytest.mark.parametrize('t', (-0.7, 0.2, 1.0))
def test_cayley_sign(t):
  r = cayley(np.float32([t]), 2)
  expected = np.array([[1 - t * t, 2 * t], [-2 * t, 1 - t * t]]) / (1 + t * t)
  np.testing.assert_allclose(r, expected, atol=1e-6)


@pytest.mark.parametrize('b', SIZES)
def test_cayley_is_exactly_the_identity_at_zero(b):
  v = np.zeros((3, b * (b - 1) // 2), np.float32)
  eye = np.broadcast_to(np.eye(b, dtype=np.float32), (3, b, b))
  np.testing.assert_array_equal(cayley(v, b), eye)
  np.testing.assert_array_equal(neumann(v, b, 5), eye)


def test_cayley_computes_in_float32_and_refuses_rectangles():
  v = triangles(0, 3, 4).astype(jnp.bfloat16)
  r = cayley(v, 4)
  assert r.dtype == jnp.float32
  np.testing.assert_allclose(r, cayley64(v.astype(np.float64), 4), atol=1e-5)
  with pytest.raises(ValueError, match='square blocks'):
    orthogonal.cayley(jnp.zeros((3, 4, 5)))


@pytest.mark.parametrize('b', (4, 20))
def test_cayley_gradient(b):
  v = triangles(0, 3, b, 0.5)
  w = np.random.default_rng(1).normal(size=(3, b, b)).astype(np.float32)

  def by_solve(v, b):
    q = orthogonal.skew(v, b)
    return jnp.linalg.solve(jnp.eye(b) - q, jnp.eye(b) + q)

  def derivatives(f):  # gradient, and both directional derivatives
    loss = lambda v: (f(v, b) * w).sum()
    value, grad = jax.jvp(loss, (v,), (t,)), jax.grad(loss)
    return value[1], *jax.jvp(grad, (v,), (t,))

  t = triangles(2, 3, b)
  derivatives = jax.jit(derivatives, static_argnums=0)
  slope, grad, hessian = jax.device_get(derivatives(cayley))
  _, grad_solve, hessian_solve = derivatives(by_solve)
  np.testing.assert_allclose(grad, grad_solve, atol=2e-5)
  np.testing.assert_allclose(hessian, hessian_solve, atol=2e-4)
  np.testing.assert_allclose(slope, (grad * t).sum(), rtol=1e-4)
  v64, numeric = v.astype(np.float64), np.zeros(v.shape)
  for at in np.ndindex(v.shape):
    step = np.zeros(v.shape)
    step[at] = 1e-5
    numeric[at] = ((cayley64(v64 + step, b) - cayley64(v64 - step, b)) *
                   w).sum() / 2e-5
  np.testing.assert_allclose(grad, numeric, atol=2e-5)


def test_cayley_under_vmap_and_jit():
  q = skew64(triangles(0, 6, 4).reshape(2, 3, -1), 4).astype(np.float32)
  traces = []

  def both(q):
    traces.append(None)
    return jax.value_and_grad(lambda q: (orthogonal.cayley(q)**3).sum())(q)

  mapped = jax.jit(jax.vmap(both))
  value, grad = mapped(q)
  mapped(2 * q)
  assert len(traces) == 1
  alone = jax.jit(both)
  for i in range(2):
    one, one_grad = alone(q[i])
    np.testing.assert_allclose(value[i], one, rtol=1e-5)
    np.testing.assert_allclose(grad[i], one_grad, atol=1e-5)


# Coefficients of I, Q, Q^2, ...
SERIES = {1: (1,), 2: (1, 2), 3: (1, 2, 2, 1), 4: (1, 2, 2, 1),
          5: (1, 2, 2, 2, 1), 6: (1, 2, 2, 2, 2, 1), 7: (1, 2, 2, 2, 2, 2, 1)}


@pytest.mark.parametrize('terms', SERIES)
def test_neumann_series(terms):
  v = triangles(0, 5, 6, 0.3)
  q = skew64(v, 6)
  expected = sum(c * np.linalg.matrix_power(q, i)
                 for i, c in enumerate(SERIES[terms]))
  got = neumann(v, 6, terms)
  np.testing.assert_allclose(
      got, np.broadcast_to(expected, got.shape), atol=1e-5)


def test_neumann_converges_and_its_defect():
  v = triangles(0, 20, 8)
  v *= (0.2 / np.linalg.norm(skew64(v, 8), 2, (1, 2)))[:, None]
  q, exact, eye = skew64(v, 8), cayley64(v, 8), np.eye(8)
  previous = 2 * 0.2**2 / 0.8
  for terms in (4, 5, 6, 7):
    # The truncated geometric series, exactly, and with it the two errors.
    r = np.asarray(neumann(v, 8, terms), np.float64)
    last = np.linalg.matrix_power(q, terms - 1)
    np.testing.assert_allclose(r, exact @ (eye - last), atol=1e-6)
    np.testing.assert_allclose(
        r @ r.swapaxes(-1, -2),
        (eye - last) @ (eye - last).swapaxes(-1, -2), atol=2e-6)
    error = np.linalg.norm(exact - r, 2, (1, 2)).max()
    assert error < previous / 4
    previous = error
  two = np.asarray(neumann(v, 8, 2), np.float64)
  rest = np.linalg.norm(exact - two - 2 * q @ q, 2, (1, 2))
  assert (rest <= 2 * 0.2**3 / 0.8).all()


def test_neumann_refuses_bad_terms():
  for terms, near in ((0, 1), (2.6, 3), (-3, 1)):
    with pytest.raises(ValueError, match=f'terms={terms}.*choice is {near}'):
      orthogonal.cayley_neumann(jnp.zeros((2, 2)), terms)


@pytest.mark.parametrize('n,b', ((1, 12), (3, 4), (12, 1), (6, 2)))
def test_block_rotate_is_the_block_diagonal_product(n, b):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 12)).astype(np.float32)
  r = rng.normal(size=(n, b, b)).astype(np.float32)
  w = rng.normal(size=x.shape).astype(np.float32)
  y, pull = jax.vjp(block_rotate, x, r)
  y = np.asarray(y)
  dense = blockdiag64(r.astype(np.float64))
  np.testing.assert_allclose(y, x @ dense, atol=1e-5)
  np.testing.assert_allclose(block_rotate(x[0, 0], r), y[0, 0], atol=1e-6)
  dx, dr = pull(w)
  np.testing.assert_allclose(dx, w @ dense.T, atol=1e-5)
  full = x.reshape(-1, 12).astype(np.float64).T @ w.reshape(-1, 12)
  np.testing.assert_allclose(
      blockdiag64(dr), full * blockdiag64(np.ones((n, b, b))), atol=1e-5)


def test_one_block_is_the_dense_cayley_transform():
  x = np.random.default_rng(0).normal(size=(7, 24)).astype(np.float32)
  v = triangles(0, 1, 24, 0.3)
  y = block_rotate(x, cayley(v, 24))
  np.testing.assert_allclose(y, x @ cayley64(v, 24)[0], atol=2e-5)


def test_shared_block_and_dtypes():
  x = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
  r = rotations(0, (1,), 4)
  np.testing.assert_allclose(
      block_rotate(x, r), block_rotate(x, np.tile(r, (3, 1, 1))), atol=1e-6)
  low = x.astype(jnp.bfloat16)
  assert block_rotate(low, r).dtype == jnp.float32
  assert block_rotate(low, r.astype(low.dtype)).dtype == low.dtype


def test_block_rotate_refuses_blocks_that_do_not_fit():
  for shape in ((2, 4, 4), (1, 5, 5), (4, 4), (3, 4, 2)):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
      orthogonal.block_rotate(jnp.zeros((3, 12)), jnp.zeros(shape))


@pytest.mark.parametrize('d,b,m', (
    (12, 3, 1), (12, 2, 2), (16, 2, 4), (32, 8, 2), (48, 4, 3), (32, 2, 3)))
def test_butterfly_equals_permutation_matrices(d, b, m):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, d)).astype(np.float32)
  rs = rotations(0, (m, d // b), b)
  dense = butterfly64(rs)
  np.testing.assert_allclose(dense @ dense.T, np.eye(d), atol=1e-5)
  y = butterfly_rotate(x, rs)
  np.testing.assert_allclose(y, x @ dense, atol=1e-5)
  if m == 1:
    np.testing.assert_array_equal(y, block_rotate(x, rs[0]))


@pytest.mark.parametrize('d,b,m', ((8, 2, 3), (32, 4, 4)))
def test_enough_butterflies_connect_everything(d, b, m):
  assert m == np.log2(d / b) + 1
  rs = rotations(0, (m, d // b), b)
  eye = np.eye(d, dtype=np.float32)
  full = np.asarray(butterfly_rotate(eye, rs))
  assert (full != 0).all()
  short = np.asarray(butterfly_rotate(eye, rs[:-1]))
  assert (short != 0).sum() == d * b * 2**(m - 2)


def test_check_butterfly():
  for d, b, m in ((12, 3, 1), (16, 2, 4), (48, 4, 3), (12, 12, 1)):
    orthogonal.check_butterfly(d, b, m)
  bad = ((12, 3, 2), (12, 5, 1), (16, 4, 4), (12, 12, 2), (12, 4, 2), (7, 2, 2))
  for d, b, m in bad:
    with pytest.raises(ValueError, match=f'block_size={b} with factors={m} '
                       f'.*width {d}: .*nearest valid choice') as error:
      orthogonal.check_butterfly(d, b, m)
    advice = str(error.value).split('nearest valid choice is ')[1]
    for name, first, other, second in re.findall(
        r'(block_size|factors)=(\d+) with (\w+)=(\d+)', advice):
      choice = {name: int(first), other: int(second)}
      orthogonal.check_butterfly(d, **choice)
  with pytest.raises(ValueError, match='block_size=4 with factors=2'):
    orthogonal.butterfly_rotate(jnp.zeros((3, 12)), jnp.zeros((2, 3, 4, 4)))
  for bad in (dict(block_size=0, factors=1), dict(block_size=2, factors=0)):
    with pytest.raises(ValueError, match='=0, expected at least 1'):
      orthogonal.check_butterfly(12, **bad)


drop_blocks = jax.jit(orthogonal.drop_blocks, static_argnums=2)
drop_factor_blocks = jax.jit(orthogonal.drop_factor_blocks, static_argnums=2)
project_ball = jax.jit(orthogonal.project_ball)


def dropped(before, after):
  """Which blocks became the identity; all others must be untouched."""
  after = np.asarray(after)
  eye = (after == np.eye(before.shape[-1])).all((-2, -1))
  np.testing.assert_array_equal(after[~eye], before[~eye])
  return eye


def test_drop_blocks_takes_an_exact_share_uniformly():
  r = rotations(0, (2, 7), 3)
  keys = jax.random.split(jax.random.key(0), 2000)
  which = jax.jit(jax.vmap(lambda k: orthogonal.drop_blocks(k, r, 0.45)))(keys)
  which = dropped(np.broadcast_to(r, which.shape), which)
  np.testing.assert_array_equal(which.sum(-1), 3)  # floor(0.45 * 7)
  # Binomial with p = 3/7: 5 standard deviations of a mean of 2000.
  spread = np.sqrt(3 / 7 * 4 / 7 / 2000)
  np.testing.assert_allclose(which.mean(0), 3 / 7, atol=5 * spread)
  assert (which[:, 0] != which[:, 1]).any(-1).mean() > 0.9  # independent rows


def test_drop_blocks_edge_cases():
  key = jax.random.key(0)
  r = rotations(0, (100,), 2)
  np.testing.assert_array_equal(drop_blocks(key, r, 0.0), r)
  assert dropped(r, drop_blocks(key, r, 0.29)).sum() == 29  # not 28.99...
  np.testing.assert_array_equal(drop_blocks(key, r[:1], 0.9), r[:1])
  grad = np.asarray(jax.jit(
      jax.grad(lambda r: (drop_blocks(key, r, 0.29)**3).sum()))(r))
  gone = dropped(r, drop_blocks(key, r, 0.29))
  assert (grad[gone] == 0).all() and (grad[~gone] != 0).any((-2, -1)).all()
  assert jax.eval_shape(lambda r: orthogonal.drop_blocks(
      key, r, 0.1), r.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  for rate in (-0.1, 1.0):
    with pytest.raises(ValueError, match=f'rate={rate}, expected'):
      orthogonal.drop_blocks(key, r, rate)


def test_drop_factor_blocks_picks_one_factor():
  rs = rotations(0, (3, 8), 2)
  keys = jax.random.split(jax.random.key(0), 600)
  which = jax.jit(
      jax.vmap(lambda k: orthogonal.drop_factor_blocks(k, rs, 0.3)))(keys)
  count = dropped(np.broadcast_to(rs, which.shape), which).sum(-1)
  np.testing.assert_array_equal(np.sort(count, -1), [[0, 0, 2]] * 600)
  tolerance = 5 * np.sqrt(1 / 3 * 2 / 3 / 600)
  np.testing.assert_allclose((count > 0).mean(0), 1 / 3, atol=tolerance)


def test_project_ball_uses_the_norm_of_the_whole_matrix():
  v = triangles(0, 50, 5) * np.linspace(0, 0.4, 50, dtype=np.float32)[:, None]
  got = np.asarray(project_ball(v, 0.9))
  for before, after in zip(v, got):
    norm = np.linalg.norm(skew64(before, 5))
    if norm <= 0.9:
      np.testing.assert_array_equal(after, before)
    else:
      np.testing.assert_allclose(after, before * 0.9 / norm, rtol=1e-6)
      assert np.linalg.norm(skew64(after, 5)) <= 0.9 * (1 + 1e-6)
  norms = np.linalg.norm(skew64(v, 5), axis=(1, 2))
  assert 5 < (norms > 0.9).sum() < 45  # both branches were taken
  np.testing.assert_array_equal(project_ball(v, np.inf), v)
  np.testing.assert_array_equal(project_ball(v, 0.0), np.zeros_like(v))
  with pytest.raises(ValueError, match='eps=-1'):
    orthogonal.project_ball(v, -1)


def test_project_ball_has_a_gradient_at_zero():
  for v, eps in ((np.zeros((2, 3)), 1.0), (np.zeros((2, 3)), np.inf),
                 (np.ones((2, 3)), np.inf)):
    grad = jax.jit(jax.grad(lambda v, e: project_ball(v, e).sum()))(v, eps)
    np.testing.assert_array_equal(grad, np.ones_like(v))
