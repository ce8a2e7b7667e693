"""How a stored tensor of a Hugging Face checkpoint becomes one of our leaves.

  kind        stored                  ours
  same        any shape               as it is
  linear      [d_out, d_in]           kernel [d_in, d_out]
  conv        [d_out, d_in, kh, kw]   kernel [kh, kw, d_in, d_out]
  reshape     any shape               the same entries in the leaf's shape

A leaf whose `name` is a tuple holds those tensors on a new leading axis: the
experts of a mixture.
"""

from typing import NamedTuple, Union

import numpy as np

# kind: axes of the stored tensor in the order of ours; the inverse on the way
# back. Kinds that keep the order are not listed.
_PERM = {'linear': (1, 0), 'conv': (2, 3, 1, 0)}
KINDS = ('same', 'reshape', *_PERM)


class Tensor(NamedTuple):
  """Where one of our leaves stands in a checkpoint.

  name: Of the stored tensor, without the prefix that a body has in files with
    a head; with a leading '/', a name that never has the prefix. A tuple of
    names is stacked on a new leading axis.
  kind: See the module docstring.
  shape: Of the stored tensor; needed for 'reshape' alone.
  """

  name: Union[str, tuple[str, ...]]
  kind: str = 'same'
  shape: tuple[int, ...] = ()

  @property
  def names(self):
    return (self.name,) if isinstance(self.name, str) else self.name

  @property
  def stacked(self):
    return not isinstance(self.name, str)


def stored_shape(tensor, shape):
  """Shape of each stored tensor for a leaf of `shape`."""
  shape = tuple(shape[1:] if tensor.stacked else shape)
  if tensor.kind == 'reshape':
    return tuple(tensor.shape)
  perm = _PERM.get(tensor.kind)
  if perm is None:
    return shape
  if len(shape) != len(perm):
    raise ValueError(f'{tensor.name}: kind {tensor.kind!r} is for leaves with '
                     f'{len(perm)} axes, not of shape {shape}')
  out = [0] * len(perm)
  for ours, theirs in enumerate(perm):
    out[theirs] = shape[ours]
  return tuple(out)


def stored_index(kind, index):
  """Slices of a leaf -> slices of the stored tensor; None for 'reshape'."""
  if kind == 'reshape':
    return None
  perm = _PERM.get(kind)
  if perm is None:
    return tuple(index)
  out = [None] * len(perm)
  for ours, theirs in enumerate(perm):
    out[theirs] = index[ours]
  return tuple(out)


def to_ours(kind, stored, shape):
  """Stored tensor (or a slice of it) -> leaf; `shape` is read for 'reshape'."""
  if kind == 'reshape':
    return stored.reshape(shape)
  return stored.transpose(_PERM[kind]) if kind in _PERM else stored


def to_stored(kind, leaf, shape=None):
  """Leaf -> stored tensor, of `shape` for 'reshape'."""
  if kind == 'reshape':
    return leaf if shape is None else leaf.reshape(shape)
  if kind in _PERM:
    leaf = leaf.transpose(np.argsort(_PERM[kind]))
  return np.asarray(leaf, order='C')  # keeps a scalar's shape
