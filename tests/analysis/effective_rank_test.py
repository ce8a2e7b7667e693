"""Effective rank: known spectra, invariances, Marchenko and Pastur's law."""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax.analysis import effective_rank as lib
import pytest
from scipy import integrate
from scipy import optimize


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def orthonormal(rng, d, r):
  return np.linalg.qr(rng.normal(size=(d, r)))[0]


def rank_of(w, p=0.9):
  return int(lib.effective_rank(np.linalg.svd(w, compute_uv=False), p))


# ---------------------------------------------------------------- closed forms
@pytest.mark.parametrize('n', [1, 2, 9, 10, 11, 100, 4096])
@pytest.mark.parametrize('p', [0.5, 0.9])
def test_a_flat_spectrum(n, p):
  want = -(-n * round(100 * p) // 100)  # ceil(p n), in whole numbers
  assert lib.effective_rank(np.full(n, 0.3), p) == want
  assert jax.jit(lib.effective_rank, static_argnums=1)(
      jnp.full((2, n), 7e3), p).tolist() == [want] * 2


@pytest.mark.parametrize('spectrum, p, want', [
    ([3, 1], 0.9, 1), ([3, 1], 0.91, 2), ([2, 1, 1, 1], 0.5, 1),
    ([2, 1, 1, 1], 0.6, 2), ([1, 0, 0], 0.99, 1), ([0, 0, 0], 0.9, 0)])
def test_by_hand(spectrum, p, want):
  assert lib.effective_rank(np.array(spectrum), p) == want


def test_of_a_matrix_that_is_made_of_its_terms(rng):
  s = 0.8 ** np.arange(20)  # squares are geometric
  w = orthonormal(rng, 30, 20) * s @ orthonormal(rng, 25, 20).T
  for p in (0.5, 0.9, 0.99):
    want = np.log(1 - p * (1 - 0.64 ** 20)) / np.log(0.64)
    assert rank_of(np.float32(w), p) == np.ceil(want)


# ------------------------------------------------------------------ properties
def test_scale_and_rotations_do_not_matter(rng):
  w = np.float32(rng.normal(size=(40, 24)) * 0.7 ** np.arange(24))
  left, right = (np.float32(orthonormal(rng, d, d)) for d in (40, 24))
  want = rank_of(w)
  assert 1 < want < 24
  for other in (1e-3 * w, 50 * w, left @ w, w @ right, left @ w @ right, w.T):
    assert rank_of(other) == want


def test_a_loras_change_has_at_most_its_rank(rng):
  base = {n: dict(kernel=np.float32(rng.normal(size=(20, 30)) / 5))
          for n in ('one', 'two', 'head')}
  sites = peftjax.describe(base)
  lora = peftjax.load('lowrank.lora', rank=4)
  theta = peftjax.init(lora, jax.random.key(0), sites, base)
  theta = jax.tree.map(
      lambda v: v + np.float32(rng.normal(size=v.shape)), theta)
  found = lib.of_theta(lora, base, theta, sites, p=0.999)
  assert set(found) == {'one', 'two'}
  for name, row in found.items():
    t = jax.tree.map(np.float64, theta['lora'][name])
    s = np.linalg.svd(2 * t['a'] @ t['b'] * 2, compute_uv=False)  # 16 / 4
    np.testing.assert_allclose(row['spectra']['delta'][:4], s[:4], rtol=1e-5)
    np.testing.assert_allclose(row['norm']['delta'], np.linalg.norm(s),
                               rtol=1e-5)
    assert 1 <= row['rank']['delta'] <= 4 < row['rank']['noise']
    assert row['rank']['base'] > 4 and all(
        s.shape == (20,) for s in row['spectra'].values())
  again = lib.of_theta(lora, base, theta, sites, p=0.999)
  assert again['one']['rank'] == found['one']['rank']
  with pytest.raises(ValueError, match='no fold'):
    lib.of_theta(lora._replace(fold=None), base, theta, sites)


# ----------------------------------------------------------------- the control
def quantile(y, p=0.9):
  """Share of the directions of an i.i.d. matrix, y = n / m <= 1, that hold p.

  Eigenvalues follow Marchenko and Pastur's density; their mean is 1.
  """
  low, high = (1 - y ** 0.5) ** 2, (1 + y ** 0.5) ** 2
  density = lambda x: np.sqrt(max((high - x) * (x - low), 0)) / (
      2 * np.pi * y * x)
  held = lambda t: integrate.quad(lambda x: x * density(x), t, high)[0]
  at = optimize.brentq(lambda t: held(t) - p, low, high)
  return integrate.quad(density, at, high)[0]


@pytest.mark.parametrize('shape', [(300, 300), (150, 600), (400, 200)])
def test_the_noise_control_is_marchenko_pasturs(rng, shape):
  base = dict(one=dict(kernel=np.float32(rng.normal(size=shape))))
  tuned = dict(one=dict(kernel=base['one']['kernel'] + np.float32(
      0.01 * rng.normal(size=shape))))
  row = lib.report(base, tuned, peftjax.describe(base))['one']
  n = min(shape)
  want = n * quantile(n / max(shape))
  for kind in ('noise', 'delta', 'base', 'noised'):
    assert abs(row['rank'][kind] - want) < 0.015 * n, kind
  np.testing.assert_allclose(row['norm']['noise'], row['norm']['delta'],
                             rtol=0.02)
  # The edge of the spectrum, too.
  edge = 0.01 * (shape[0] ** 0.5 + shape[1] ** 0.5)
  np.testing.assert_allclose(row['spectra']['noise'][0], edge, rtol=0.03)


@pytest.mark.parametrize('p', [0, 1, -1, 1.5])
def test_bad_shares(p):
  with pytest.raises(ValueError, match=f'p={p}: expected a share above 0'):
    lib.effective_rank(np.ones(3), p)
