"""Gates: hard-concrete ones, indicators, and exact global top-k masks.

An indicator, 1[u >= threshold], is a gate without noise. A hard-concrete gate,
that of diff pruning, with logit alpha is a stretched and clipped binary
concrete variable:

  s = sigmoid(log u - log(1 - u) + alpha),   u ~ U(0, 1),
  z = min(1, max(0, s (r - l) + l)),         l < 0 < 1 < r,

so that z is exactly 0 or 1 with positive probability:

  P(z > 0) = sigmoid(alpha - log(-l / r)),
  P(z = 1) = sigmoid(alpha - log((1 - l) / (r - 1))).

All in float32 at least; the caller casts back.

Sources: "Learning Sparse Neural Networks through L0 Regularization" (arXiv
1712.01312); constants of "Parameter-Efficient Transfer Learning with Diff
Pruning" (arXiv 2012.07463) and its released code: temperature 1, l = -1.5,
r = 1.5, u clipped to [1e-4, 1 - 1e-4]. Straight-through gradients: "Estimating
or Propagating Gradients Through Stochastic Neurons" (arXiv 1308.3432).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def hard_concrete(key, logits, low=-1.5, high=1.5):
  """Samples one gate per logit.

  dz/dalpha = (r - l) s (1 - s) where 0 < z < 1, and 0 where z is clipped.

  The clip of u bounds the noise at |log u - log(1 - u)| <= 9.21: gates whose
  logit is further than that from a threshold of P(z > 0) or P(z = 1) are
  certain, where the closed forms leave up to 1e-4.

  Args:
    key: random key.
    logits: [...], alpha.
    low: l, below 0.
    high: r, above 1.

  Returns:
    [...], z in [0, 1].

  Raises:
    ValueError: unless low < 0 and high > 1.
  """
  logits = _checked(logits, low, high)
  u = jax.random.uniform(key, logits.shape, logits.dtype)
  return hard_concrete_from(u, logits, low, high)


def hard_concrete_from(u, logits, low=-1.5, high=1.5):
  """The gates for given noise: u in [0, 1), logits [...] -> [...].

  For many gates that share one draw, which compiles faster than many draws.
  Same errors as `hard_concrete`.
  """
  logits = _checked(logits, low, high)
  u = jnp.clip(u, 1e-4, 1 - 1e-4)
  return _stretch(jnp.log(u) - jnp.log1p(-u) + logits, low, high)


def hard_concrete_deterministic(logits, low=-1.5, high=1.5):
  """The gate at the median of its noise, u = 1/2: [...] -> [...].

  Not the mean of z: the clip is not linear. Same errors as `hard_concrete`.
  """
  return _stretch(_checked(logits, low, high), low, high)


def open_probability(logits, low=-1.5, high=1.5):
  """P(z > 0), the expected L0 norm of each gate: [...] -> [...]."""
  return jax.nn.sigmoid(_checked(logits, low, high) - math.log(-low / high))


def saturated_probability(logits, low=-1.5, high=1.5):
  """P(z = 1), the share of gates that are fully open: [...] -> [...]."""
  return jax.nn.sigmoid(
      _checked(logits, low, high) - math.log((1 - low) / (high - 1)))


def _stretch(noisy, low, high):
  return jnp.clip(jax.nn.sigmoid(noisy) * (high - low) + low, 0, 1)


def _checked(logits, low, high):
  if not low < 0:
    raise ValueError(
        f'low={low}, expected a number below 0 (diff pruning: -1.5); the '
        'nearest valid choice is a number just below 0.')
  if not high > 1:
    raise ValueError(
        f'high={high}, expected a number above 1 (diff pruning: 1.5); the '
        'nearest valid choice is a number just above 1.')
  logits = jnp.asarray(logits)
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def indicator(u, threshold):
  """1[u >= threshold], with the straight-through gradient d/du = 1.

  Args:
    u: [...].
    threshold: A number.

  Returns:
    [...], exactly 0 or 1, float32 at least.
  """
  u = jnp.asarray(u)
  u = u.astype(jnp.promote_types(u.dtype, jnp.float32))
  hard = (u >= threshold).astype(u.dtype)
  return hard + (u - jax.lax.stop_gradient(u))  # the bracket is exactly 0


def kth_threshold(values_list, k):
  """Masks of the k largest values over several arrays together.

  One global threshold at the k-th largest value, with an exact count: among
  entries equal to it, those earlier in the list, and in row-major order within
  an array, come first.

  Args:
    values_list: arrays of any shapes, without NaN; pass magnitudes to rank by
      magnitude.
    k: how many entries to keep, from 0 to the total size.

  Returns:
    List of boolean arrays of the same shapes, k True in total.

  Raises:
    ValueError: if k is not a whole number from 0 to the total size.
  """
  values_list = [jnp.asarray(v) for v in values_list]
  sizes = [v.size for v in values_list]
  total = sum(sizes)
  if k != int(k) or not 0 <= k <= total:
    raise ValueError(
        f'kth_threshold: k={k}, expected a whole number from 0 to {total}; the '
        f'nearest valid choice is {min(max(round(k), 0), total)}.')
  k = int(k)
  if k in (0, total):  # no sort, and nothing to concatenate when empty
    return [jnp.full(v.shape, k > 0) for v in values_list]
  flat = jnp.concatenate([v.ravel() for v in values_list])
  _, index = jax.lax.top_k(flat, k)  # lower index first among equals
  mask = jnp.zeros(total, bool).at[index].set(True)
  parts = jnp.split(mask, np.cumsum(sizes)[:-1])
  return [m.reshape(v.shape) for m, v in zip(parts, values_list)]
