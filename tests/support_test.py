"""Sparse supports against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import support

RNG = np.random.default_rng(0)


def test_flat_index_of_one_layer_and_of_a_stack():
  mask = RNG.random((3, 4, 5)) < 0.3
  one = support.flat_index(mask[0])
  assert one.dtype == jnp.int32
  np.testing.assert_array_equal(one, np.flatnonzero(mask[0]))
  counts = [int(m.sum()) for m in mask]
  assert len(set(counts)) > 1  # so that padding is needed
  index = support.flat_index(mask, stacked=1)
  assert index.shape == (3, max(counts))
  for row, m, k in zip(index, mask, counts):
    np.testing.assert_array_equal(row[:k], np.flatnonzero(m))
    np.testing.assert_array_equal(row[k:], 20)
  np.testing.assert_array_equal(
      support.flat_index(mask.reshape(3, 2, 2, 5), stacked=2),
      support.flat_index(mask.reshape(6, 2, 5), 1).reshape(3, 2, -1))
  assert support.flat_index(np.zeros((4, 5), bool)).shape == (0,)
  np.testing.assert_array_equal(support.flat_index(np.array(True)), [0])


def test_gather_and_scatter_are_adjoint_and_touch_nothing_else():
  w = jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)
  index = jnp.array([1, 7, 19, 20], jnp.int32)  # the last one is padding
  v = jnp.array([1., 2., 3., 4.])
  dense = np.zeros(20, np.float32)
  dense[[1, 7, 19]] = [1, 2, 3]
  out = support.scatter_add(w, index, v)
  np.testing.assert_array_equal(out, w + dense.reshape(4, 5))
  np.testing.assert_array_equal(
      support.gather(w, index), [*np.asarray(w).ravel()[[1, 7, 19]], 0])
  c = jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)
  dw, dv = jax.grad(lambda w, v: (c * support.scatter_add(w, index, v)).sum(),
                    argnums=(0, 1))(w, v)
  np.testing.assert_array_equal(dw, c)
  np.testing.assert_array_equal(dv, support.gather(c, index))
