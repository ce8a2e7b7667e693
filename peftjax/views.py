"""How the layers of Linen reach a method: kernels as [d_in, d_out] views.

Dense, DenseGeneral, Einsum, Conv and Embed keep their weights in many shapes. A
`View` records how one stored leaf becomes the matrix (or vector) that a method
sees, and back; a `Layout` records how the layer's activations are flattened to
match. A slice of a fused kernel is a view of some of its columns.

  Dense         kernel [d_in, d_out]                 as it is
  DenseGeneral  kernel [in dims..., out dims...]     reshaped
  Einsum        kernel axes in any order             permuted and reshaped
  Conv          kernel [kh, kw, c_in, c_out]         [c_in*kh*kw, c_out]
  Embed         embedding [vocabulary, d]            as it is, called 'kernel'
"""

import inspect
import math
import re
from typing import NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax.ops import products

SPAN = re.compile(r'\[(\d+):(\d+)\]$')


def split_path(path):
  """'a/qkv[0:64]' -> ('a/qkv', (0, 64)); a whole layer has no span."""
  found = SPAN.search(path)
  if not found:
    return path, None
  return path[:found.start()], (int(found[1]), int(found[2]))


class View(NamedTuple):
  """A stored leaf of one layer as a method sees it."""

  leaf: str  # its stored name
  shape: tuple[int, ...]  # its stored shape, without stacked axes
  perm: tuple[int, ...]  # axes in the order inputs, outputs
  n_in: Optional[int]  # how many are inputs; 0: a vector; None: as it is stored
  span: Optional[tuple[int, int]] = None  # columns, for a fused kernel

  @property
  def dims(self):
    """(input dimensions, output dimensions) of a kernel."""
    dims = tuple(self.shape[i] for i in self.perm)
    return dims[:self.n_in], dims[self.n_in:]

  @property
  def full(self):
    """Shape of the view before columns are taken."""
    if self.n_in is None:
      return self.shape
    ins, outs = map(math.prod, self.dims)
    return (ins, outs) if self.n_in else (outs,)

  def get(self, value):
    """[stored shape] -> [d_in, d_out] or [d_out]."""
    if self.n_in is None:
      return value
    value = value.transpose(self.perm).reshape(self.full)
    return value[..., slice(*self.span)] if self.span else value

  def put(self, stored, value):
    """The stored leaf with this view's entries replaced by `value`.

    `stored` may be None for a whole leaf.
    """
    if self.n_in is None:
      return value
    if self.span:
      whole = jnp.asarray(stored).transpose(self.perm).reshape(self.full)
      value = whole.at[..., slice(*self.span)].set(value.astype(whole.dtype))
    dims = tuple(self.shape[i] for i in self.perm)
    back = tuple(self.perm.index(i) for i in range(len(self.perm)))
    return value.reshape(dims).transpose(back)


class Layout(NamedTuple):
  """How a layer's activations meet the two-dimensional view of its kernel.

  route: 'flat' where y = x K + b holds for the flattened x and y; 'dot' where
    the layer is linear but x is not a matrix of rows (Conv, Embed); 'opaque'
    where a kernel is used in a way that is not known here; 'plain' where the
    layer has no kernel.
  """

  route: str
  x_axes: tuple[int, ...] = (-1,)
  y_axes: tuple[int, ...] = (-1,)


def matrix_view(leaf, value, perm=None, n_in=None):
  ndim = len(value.shape)
  return View(leaf, tuple(value.shape), perm or tuple(range(ndim)),
              ndim - 1 if n_in is None else n_in)


def native_view(leaf, value):
  """A leaf exactly as it is stored."""
  return View(leaf, tuple(value.shape), tuple(range(len(value.shape))), None)


LINEAR = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvTranspose)


def positional(module, called, args, kwargs):
  """(args, kwargs) of a call, its first input among args if given by name."""
  if args or not kwargs:
    return args, kwargs
  names = list(inspect.signature(getattr(type(module), called)).parameters)
  if len(names) < 2 or names[1] not in kwargs:
    return args, kwargs
  kwargs = dict(kwargs)
  return (kwargs.pop(names[1]),), kwargs


def _shape(own, name, *dims):
  """The leaf, or its shape where a method has dropped it from the params."""
  return own.get(name, jax.ShapeDtypeStruct(dims, jnp.float32))


def _einsum(module, args):
  """Layout, axis order and input count of nn.Einsum's kernel; its bias's order.

  None where an axis is shared by kernel, input and output: many products.
  """
  equation = args[1] if len(args) > 1 else module.einsum_str
  left, out = equation.replace(' ', '').split('->')
  x, k = left.split(',')
  if '.' in k or any('.' in s.removeprefix('...') for s in (x, out)):
    return None
  x, out = x.removeprefix('...'), out.removeprefix('...')
  ins = [c for c in k if c in x and c not in out]
  outs = [c for c in k if c in out and c not in x]
  if len(ins) + len(outs) != len(k) or not ins or not outs:
    return None
  layout = Layout('flat', tuple(x.index(c) - len(x) for c in ins),
                  tuple(out.index(c) - len(out) for c in outs))
  # Rows of x and y match only where their other axes are the same, in order.
  if [c for c in x if c not in ins] != [c for c in out if c not in outs]:
    layout = Layout('opaque')
  stored = [c for c in out if c in outs]  # axes of the bias, as Flax keeps it
  return (layout, tuple(k.index(c) for c in ins + outs), len(ins),
          tuple(stored.index(c) for c in outs))


def look(module, own, args):
  """Layout and views of a Linen layer's own leaves.

  Args:
    module: The bound layer.
    own: Its own leaves, {name: array or shape}.
    args: Positional arguments of its call; args[0] is the input.

  Returns:
    (Layout, {the method's name of a leaf: View}).
  """
  views = {n: native_view(n, v) for n, v in own.items()}
  if isinstance(module, nn.Embed):
    return Layout('dot'), {'kernel': matrix_view(
        'embedding', _shape(own, 'embedding', module.num_embeddings,
                            module.features))}
  if 'bias' in own and isinstance(module, LINEAR):
    views['bias'] = matrix_view('bias', own['bias'], n_in=0)
  x = args[0] if args else None
  if isinstance(module, nn.Dense):
    kernel = _shape(own, 'kernel', x.shape[-1], module.features)
    return Layout('flat'), views | {'kernel': matrix_view('kernel', kernel)}
  if isinstance(module, nn.Einsum):
    found = _einsum(module, args)
    if not found:
      return Layout('opaque'), views
    layout, perm, n_in, order = found
    kernel = _shape(own, 'kernel', *module.shape)
    if 'bias' in own:
      views['bias'] = matrix_view('bias', own['bias'], order, 0)
    return layout, views | {
        'kernel': matrix_view('kernel', kernel, perm, n_in)}
  if isinstance(module, nn.DenseGeneral) and not module.batch_dims:
    axis, features = (v if isinstance(v, (tuple, list)) else (v,)
                      for v in (module.axis, module.features))
    axis = tuple(sorted(a % x.ndim - x.ndim for a in axis))
    kernel = _shape(own, 'kernel', *(x.shape[a] for a in axis), *features)
    layout = Layout('flat', axis, tuple(range(-len(features), 0)))
    return layout, views | {
        'kernel': matrix_view('kernel', kernel, n_in=len(axis))}
  if isinstance(module, (nn.Conv, nn.ConvTranspose)):
    sizes, c_in = module.kernel_size, x.shape[-1]
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    c_in //= getattr(module, 'feature_group_count', 1)
    n = len(sizes) + 2
    if getattr(module, 'transpose_kernel', False):  # stored [..., c_out, c_in]
      dims, perm = (module.features, c_in), (n - 1, *range(n - 2), n - 2)
    else:
      dims, perm = (c_in, module.features), (n - 2, *range(n - 2), n - 1)
    kernel = _shape(own, 'kernel', *sizes, *dims)
    grouped = getattr(module, 'feature_group_count', 1) != 1
    plain = isinstance(module, nn.Conv) and not grouped and module.mask is None
    return Layout('dot' if plain else 'opaque'), views | {
        'kernel': matrix_view('kernel', kernel, perm)}
  opaque = any(len(v.shape) > 1 for v in own.values())
  return Layout('opaque' if opaque else 'plain'), views


def flatten(value, axes):
  """Moves `axes` to the end and merges them: [..., d]."""
  n = len(axes)
  if axes != tuple(range(-n, 0)):
    value = jnp.moveaxis(value, axes, tuple(range(-n, 0)))
  if n == 1:
    return value
  return value.reshape(*value.shape[:-n], -1)


def unflatten(value, dims, axes):
  """Inverse of `flatten`: the last axis becomes `dims`, moved to `axes`."""
  n = len(axes)
  if n > 1:
    value = value.reshape(*value.shape[:-1], *dims)
  if axes != tuple(range(-n, 0)):
    value = jnp.moveaxis(value, tuple(range(-n, 0)), axes)
  return value


def dot(module, layout, views, x, a):
  """x times a [d_in, r], applied the way the layer applies its kernel.

  For a flat layer x is [..., d_in] and the result [..., r]; a convolution
  slides `a` with its own strides and padding; an embedding looks rows up.
  """
  if layout.route == 'flat':
    return products.thin(x, a)
  if isinstance(module, nn.Embed):
    return jnp.take(a, x, axis=0)
  if layout.route != 'dot':
    raise ValueError(f'{type(module).__name__} is not a linear layer of x')
  view = views['kernel']
  back = [view.perm.index(i) for i in range(len(view.perm))]
  kernel = a.reshape(*view.dims[0], a.shape[-1]).transpose(back)
  thin = module.clone(
      features=a.shape[-1], use_bias=False, parent=None, name=None)
  return thin.apply({'params': {'kernel': kernel}}, x)


def shapes(tree):
  return jax.tree.map(
      lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype)
      if hasattr(v, 'shape') else v, tree)
