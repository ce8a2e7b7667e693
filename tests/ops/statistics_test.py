"""Reducers of inputs: numpy's float64 as the oracle, batch by batch."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from peftjax.ops import statistics
import pytest

RNG = np.random.default_rng(0)


def rows(n, d, scale=1.0):
  """Rows with directions of unlike variance, around a mean that is not 0."""
  x = RNG.normal(size=(n, d)) * np.linspace(1, 3, d) + RNG.normal(size=d)
  return np.float32(scale * x)


def reduced(reducer, batches, d):
  """(stats, state) after batches (x, keep)."""
  kernel = jax.ShapeDtypeStruct((d, 3), jnp.float32)
  state = reducer.init(types.SimpleNamespace(params=dict(kernel=kernel)))
  for x, keep in batches:
    new = jax.jit(reducer.update)(state, x, keep)
    assert {n: (v.shape, v.dtype) for n, v in new.items()} == {
        n: (v.shape, v.dtype) for n, v in state.items()}
    state = new
  return jax.device_get(reducer.finish(state)), state


def whole(batches):
  """[(x, keep)] of batches without padding, and with two rows of it each."""
  plain = [(x, np.ones(len(x), bool)) for x in batches]
  padded = [(np.concatenate([x[:3], np.full((2, x.shape[1]), np.nan), x[3:]]),
             np.insert(np.ones(len(x), bool), 3, [False, False]))
            for x in batches]
  return plain, padded


# ----------------------------------------------------------------- covariance
def test_covariance_over_rows():
  batches = [rows(7, 5), rows(4, 5)]
  every = np.float64(np.concatenate(batches))
  for found in whole(batches):
    got, _ = reduced(statistics.covariance(), found, 5)
    np.testing.assert_allclose(
        got['covariance'], every.T @ every / 11, atol=2e-6 * 9)


def test_covariance_over_calls_of_largest_magnitude_1():
  batches = [rows(7, 5), -rows(4, 5, 100.)]
  want = sum(np.float64(x).T @ x / np.abs(x).max() ** 2 for x in batches) / 2
  for found in whole(batches):
    # A call of padding alone is none.
    nothing = (np.ones((6, 5), np.float32), np.zeros(6, bool))
    got, _ = reduced(
        statistics.covariance('call', 'call'), [*found, nothing], 5)
    np.testing.assert_allclose(got['covariance'], want, atol=2e-6)


def test_covariance_of_zeros():
  for per, scale in (('row', 'none'), ('call', 'call')):
    got, _ = reduced(statistics.covariance(per, scale), whole(
        [np.zeros((4, 5), np.float32)])[0], 5)
    np.testing.assert_array_equal(got['covariance'], 0)


@pytest.mark.parametrize('kwargs, message', [
    (dict(per='rows'), "unknown 'rows'.*'row'"),
    (dict(scale='calls'), "unknown 'calls'.*'call'")])
def test_covariance_of_an_unknown_kind(kwargs, message):
  with pytest.raises(ValueError, match=message):
    statistics.covariance(**kwargs)


# ----------------------------------------------------------------- components
def test_components_of_one_batch_are_those_of_the_centred_rows():
  x = rows(30, 6)
  centred = np.float64(x) - x.mean(0)
  _, s, vt = np.linalg.svd(centred, full_matrices=False)
  vt *= np.sign(vt[np.arange(6), np.abs(vt).argmax(1)])[:, None]
  for found in whole([x]):
    got, _ = reduced(statistics.components(4, 2, 0.99), found, 6)
    np.testing.assert_allclose(got['directions'], vt[:4], atol=5e-6)
    np.testing.assert_allclose(got['values'], s[:4], rtol=2e-6)
    np.testing.assert_allclose(got['total'], (centred ** 2).sum(), rtol=2e-6)
    assert got['rows'] == 30


def test_components_of_batches_are_those_of_all_rows_where_nothing_is_cut():
  batches = [rows(9, 6), rows(12, 6), rows(8, 6)]  # each of another mean
  every = np.float64(np.concatenate(batches))
  every -= every.mean(0)
  _, s, vt = np.linalg.svd(every, full_matrices=False)
  vt *= np.sign(vt[np.arange(6), np.abs(vt).argmax(1)])[:, None]
  for found in whole(batches):
    got, state = reduced(statistics.components(9, 2, 0.99), found, 6)
    np.testing.assert_allclose(got['directions'], vt, atol=1e-5)
    np.testing.assert_allclose(got['values'], s, rtol=5e-6)
    np.testing.assert_allclose(got['total'], (every ** 2).sum(), rtol=5e-6)
    np.testing.assert_allclose(
        state['mean'], np.concatenate(batches).mean(0), rtol=1e-5)


def test_total_counts_what_is_cut_off():
  batches = [rows(9, 6), rows(12, 6)]
  every = np.float64(np.concatenate(batches))
  got, _ = reduced(statistics.components(2, 2, 0.99), whole(batches)[0], 6)
  np.testing.assert_allclose(
      got['total'], ((every - every.mean(0)) ** 2).sum(), rtol=5e-6)
  assert got['directions'].shape == (2, 6)
  np.testing.assert_allclose(
      got['directions'] @ got['directions'].T, np.eye(2), atol=2e-6)


def test_batches_of_few_rows_are_left_out():
  reducer = statistics.components(4, 2, 0.99)
  plain, padded = whole([rows(9, 6), rows(3, 6)])
  want, _ = reduced(reducer, plain[:1], 6)
  for found in (plain, padded, plain[::-1]):
    got, _ = reduced(reducer, found, 6)
    for n, v in want.items():
      np.testing.assert_allclose(got[n], v, rtol=5e-6, atol=2e-6)
  assert reduced(reducer, plain[1:], 6)[0]['rows'] == 0


def test_done_where_the_first_directions_keep_still():
  x = np.float32(RNG.normal(size=(40, 6)) * [30, 9, 1, 1, 1, 1])
  other = np.float32(RNG.normal(size=(40, 6)) * [30, 9, 1, 1, 1, 1])
  turned = x[:, ::-1].copy()
  reducer = statistics.components(4, 2, 0.99)
  done = lambda *batches: bool(reducer.done(
      reduced(reducer, whole(batches)[0], 6)[1]))
  assert not done(x)  # there is nothing to compare with
  assert done(x, other)
  assert not done(x, 3 * turned)
  every = statistics.components(4, 4, 0.99)  # the others have no direction
  assert not every.done(reduced(every, whole([x, other])[0], 6)[1])


def test_large_matrices_are_decomposed_by_random_products(monkeypatch):
  batches = [rows(40, 24) @ np.diag(0.8 ** np.arange(24)).astype(np.float32)
             for _ in range(2)]
  reducer = lambda: statistics.components(4, 2, 0.99)
  want, _ = reduced(reducer(), whole(batches)[0], 24)
  monkeypatch.setattr(statistics, 'WHOLE', 8)
  got, _ = reduced(reducer(), whole(batches)[0], 24)
  assert not np.array_equal(got['directions'], want['directions'])
  np.testing.assert_allclose(got['values'], want['values'], rtol=1e-3)
  np.testing.assert_allclose(got['directions'], want['directions'], atol=2e-2)


def test_components_of_mapped_layers_give_lapack_one_matrix_at_a_time():
  """As of the experts of a mixture, whose layers are mapped."""
  reducer = statistics.components(2, 2, 0.99)
  kernel = jax.ShapeDtypeStruct((4, 3), jnp.float32)
  state = reducer.init(types.SimpleNamespace(params=dict(kernel=kernel)))
  many = jax.tree.map(lambda v: jnp.stack([v] * 3), state)
  text = jax.jit(jax.vmap(reducer.update, (0, None, None))).lower(
      many, rows(9, 4), np.ones(9, bool)).as_text()
  calls = [line for line in text.splitlines() if 'lapack' in line]
  assert any('12x4xf32' in line for line in calls)  # [2 + 9 + 1, 4]
  assert not any('3x12x4xf32' in line for line in calls)
