"""Sparse supports: which entries of an array a method touches, as flat indices.

A support of k entries of an array w is `index` int32 [k], positions in w laid
out row by row. Positions past the end are padding: they read as zero and are
dropped when written, so that the layers of a stack can share one k.
"""

import jax.numpy as jnp
import numpy as np


def flat_index(mask, stacked=0):
  """Positions of a mask's True entries, in increasing order.

  Runs outside jit: k depends on the values.

  Args:
    mask: booleans [*stack, ...].
    stacked: how many leading axes are stacked layers, each with positions of
      its own.

  Returns:
    int32 [*stack, k], k being the largest count of any layer; shorter layers
    are padded with the layer's size.
  """
  mask = np.asarray(mask)
  stack, one = mask.shape[:stacked], mask.shape[stacked:]
  layers = [np.flatnonzero(m) for m in mask.reshape(-1, *one)]
  size = int(np.prod(one))
  index = np.full((len(layers), max(map(len, layers))), size, np.int32)
  for row, found in zip(index, layers):
    row[:len(found)] = found
  return jnp.asarray(index.reshape(*stack, -1))


def gather(w, index):
  """Entries of w [*stack, ...] at index [*stack, k] -> [*stack, k]; 0 where
  padded."""
  flat = w.reshape(*index.shape[:-1], -1)
  flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, 1)])
  return jnp.take_along_axis(flat, index, -1)


def scatter_add(w, index, values):
  """w [...] with values [k] added at index [k]; no other entry is touched."""
  return w.reshape(-1).at[index].add(values, mode='drop').reshape(w.shape)
