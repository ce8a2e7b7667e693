"""Hard-concrete gates against closed forms, and exact top-k masks."""

import jax
import jax.numpy as jnp
import numpy as np
from peftjax.ops import gates
import pytest

DRAWS = 40_000
LOGITS = np.float32([-6, -2, -0.5, 0, 1, 2.5, 5])
STRETCHES = ((-1.5, 1.5), (-0.1, 1.1), (-0.4, 2.0))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def logit(p):
  return np.log(p) - np.log1p(-p)


@pytest.fixture(scope='module', params=STRETCHES, ids=str)
def sample(request):
  low, high = request.param
  logits = jnp.broadcast_to(LOGITS, (DRAWS, LOGITS.size))
  z = jax.jit(lambda k: gates.hard_concrete(k, logits, low, high))(
      jax.random.key(0))
  return low, high, np.asarray(z, np.float64)


def test_probabilities_of_both_ends(sample):
  low, high, z = sample
  assert z.min() == 0 and z.max() == 1
  opened = np.asarray(gates.open_probability(LOGITS, low, high))
  full = np.asarray(gates.saturated_probability(LOGITS, low, high))
  for share, p in (((z > 0).mean(0), opened), ((z == 1).mean(0), full)):
    # Binomial: 5 standard deviations, and 5 counts for the rare ends.
    allowed = 5 * np.sqrt(p * (1 - p) / DRAWS) + 5 / DRAWS
    assert (np.abs(share - p) <= allowed).all(), (share, p)
  # And by the threshold that u has to pass.
  np.testing.assert_allclose(
      opened, 1 - sigmoid(logit(-low / (high - low)) - LOGITS), rtol=1e-5)
  np.testing.assert_allclose(
      full, 1 - sigmoid(logit((1 - low) / (high - low)) - LOGITS), rtol=1e-5)


def test_mean_and_distribution_between_the_ends(sample):
  low, high, z = sample
  # Mean by the midpoint rule over u in float64.
  u = ((np.arange(200_000) + 0.5) / 200_000)[:, None]
  exact = np.clip(sigmoid(logit(np.clip(u, 1e-4, 1 - 1e-4)) + LOGITS) *
                  (high - low) + low, 0, 1)
  allowed = 5 * exact.std(0) / np.sqrt(DRAWS) + 1e-5
  assert (np.abs(z.mean(0) - exact.mean(0)) <= allowed).all()
  for level in (0.25, 0.5, 0.75):
    p = sigmoid(LOGITS - logit((level - low) / (high - low)))
    allowed = 5 * np.sqrt(p * (1 - p) / DRAWS) + 5 / DRAWS
    assert (np.abs((z > level).mean(0) - p) <= allowed).all()


def test_probabilities_at_the_default_stretch():
  np.testing.assert_allclose(
      gates.open_probability(LOGITS), sigmoid(LOGITS), rtol=1e-6)
  np.testing.assert_allclose(
      gates.saturated_probability(LOGITS), sigmoid(LOGITS - np.log(5)),
      rtol=1e-5)


@pytest.mark.parametrize('low,high', STRETCHES)
def test_gradient_is_the_logistic_slope_inside_and_zero_outside(low, high):
  logits = np.tile(LOGITS, (200, 1))
  gate = lambda a: gates.hard_concrete(jax.random.key(1), a, low, high)
  step = 1e-2
  z, up, down, grad = jax.jit(lambda a: (
      gate(a), gate(a + step), gate(a - step),
      jax.grad(lambda a: gate(a).sum())(a)))(logits)
  z, up, down, grad = (np.asarray(g, np.float64) for g in (z, up, down, grad))
  inside = (z > 0) & (z < 1)
  s = (z - low) / (high - low)
  np.testing.assert_allclose(
      grad, np.where(inside, (high - low) * s * (1 - s), 0), atol=1e-5)
  assert inside.sum() > 50 and (z == 0).sum() > 50 and (z == 1).sum() > 50
  # Central differences in the same draw.
  same = (up > 0) & (up < 1) & (down > 0) & (down < 1)
  np.testing.assert_allclose(
      grad[same], ((up - down) / (2 * step))[same], atol=2e-4)
  ends = (up == down) & ((up == 0) | (up == 1))
  assert ends.any() and (grad[ends] == 0).all()


def test_deterministic_gate_is_the_median_draw(sample):
  low, high, z = sample
  fixed = np.asarray(gates.hard_concrete_deterministic(LOGITS, low, high))
  np.testing.assert_allclose(
      fixed, np.clip(sigmoid(LOGITS) * (high - low) + low, 0, 1), atol=1e-6)
  # Half of the draws lie on either side; the ends count on both.
  allowed = 5 * 0.5 / np.sqrt(DRAWS)
  assert ((z <= fixed + 1e-6).mean(0) >= 0.5 - allowed).all()
  assert ((z >= fixed - 1e-6).mean(0) >= 0.5 - allowed).all()


def test_noise_is_clipped_and_gates_are_float32():
  logits = jnp.full((200_000,), logit(0.75) + 9.3, jnp.bfloat16)
  gate = jax.jit(lambda a: gates.hard_concrete(
      jax.random.key(0), a, -0.5, 1.5))
  z = gate(logits)
  assert z.dtype == jnp.float32
  # Without the clip of u about 18 of these draws would fall below 1.
  assert (z == 1).all()
  low = gate(-logits)
  assert (low == 0).all()


def test_bad_stretch():
  for function in (gates.open_probability, gates.saturated_probability,
                   gates.hard_concrete_deterministic):
    with pytest.raises(ValueError, match='low=0.1, expected'):
      function(LOGITS, 0.1, 1.5)
    with pytest.raises(ValueError, match='high=1.0, expected'):
      function(LOGITS, -0.1, 1.0)


def ranked(values, k):
  """Same masks by a stable sort."""
  flat = np.concatenate([np.ravel(v) for v in values])
  mask = np.zeros(flat.size, bool)
  mask[np.argsort(-flat, kind='stable')[:k]] = True
  parts = np.split(mask, np.cumsum([np.size(v) for v in values])[:-1])
  return [m.reshape(np.shape(v)) for m, v in zip(parts, values)]


@pytest.mark.parametrize('ties', (False, True))
def test_kth_threshold_is_an_exact_stable_global_top_k(ties):
  rng = np.random.default_rng(0)
  shapes = ((4, 5), (), (3,), (2, 1, 6), (0, 3))
  values = [np.abs(rng.normal(size=s)).astype(np.float32) for s in shapes]
  if ties:
    values = [np.round(v).astype(np.float32) for v in values]
  total = sum(v.size for v in values)
  assert total == 36
  for k in (0, 1, 20, total - 1, total):
    masks = jax.device_get(
        jax.jit(lambda v: gates.kth_threshold(v, k))(values))
    for got, expected in zip(masks, ranked(values, k), strict=True):
      assert got.dtype == bool
      np.testing.assert_array_equal(got, expected)
    assert sum(int(m.sum()) for m in masks) == k


def test_kth_threshold_under_jit_and_with_equal_values():
  values = [jnp.ones((2, 3)), jnp.ones(4)]
  first, second = jax.jit(lambda v: gates.kth_threshold(v, 7))(values)
  assert first.all()
  np.testing.assert_array_equal(second, [True, False, False, False])


def test_kth_threshold_refuses_impossible_counts():
  for k, near in ((-1, 0), (11, 10), (2.4, 2)):
    with pytest.raises(ValueError, match=f'k={k}, .*0 to 10; .*is {near}'):
      gates.kth_threshold([np.ones((2, 3)), np.ones(4)], k)
  assert gates.kth_threshold([], 0) == []


def test_an_indicator_passes_its_gradient_straight_through():
  u = jnp.float32([-3, 0.0999, 0.1, 0.15, 7])
  value, slope = jax.jit(lambda u: (
      gates.indicator(u, 0.1),
      jax.grad(lambda u: (2 * gates.indicator(u, 0.1)).sum())(u)))(u)
  np.testing.assert_array_equal(value, [0, 0, 1, 1, 1])
  np.testing.assert_array_equal(slope, 2)
  low = gates.indicator(jnp.bfloat16(0.5), 0.1)
  assert low == 1 and low.dtype == jnp.float32
