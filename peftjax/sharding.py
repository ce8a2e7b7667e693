"""Where arrays lie: a mesh from the config, rules for params, theta after them.

A mesh has two axes: examples are split over 'data', and the dimensions that
rules name over 'model' (or over 'data' too, which keeps each piece of the base
on one device only). jit inserts the communication.
"""

import contextlib
import math
import re

import flax.linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from peftjax import trees
from peftjax import views as views_lib
from peftjax.method import nearest, SHARED

AXES = ('data', 'model')
_STREAM = ('embed', 'join')  # hooks that return the residual stream


def make_mesh(config, devices=None):
  """Mesh of the axes 'data' and 'model'.

  Args:
    config: `config.mesh`: sizes of 'data' and 'model'; one may be -1, which is
      what the other leaves of the devices.
    devices: Devices to use; by default all, one process' after another's. Their
      first data * model are taken.

  Raises:
    ValueError: a size that does not fit the number of devices.
  """
  if devices is None:  # whose ids need not go by process
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  devices = list(devices)
  n, sizes = len(devices), dict(config)
  for name in sizes:
    if name not in AXES:
      raise ValueError(f'mesh: unknown axis {name!r}{nearest(name, AXES)}')
  sizes = {name: sizes.get(name, 1) for name in AXES}
  there = f'there {"is 1 device" if n == 1 else f"are {n} devices"}'
  divisors = [d for d in range(1, n + 1) if n % d == 0]
  for name, size in sizes.items():
    if size != -1 and size < 1:
      raise ValueError(f'mesh.{name}={size}: expected 1 or more, or -1 for the '
                       f'rest; {there}')
  if list(sizes.values()) == [-1, -1]:
    raise ValueError(f'mesh: data and model are both -1; {there}: give one of '
                     f'them, out of {divisors}')
  for name, other in (AXES, AXES[::-1]):
    if sizes[name] == -1:
      if n % sizes[other]:
        near = min(divisors, key=lambda d: abs(d - sizes[other]))
        raise ValueError(f'mesh.{other}={sizes[other]}: {there}, which it does '
                         f'not divide; the nearest is {near}')
      sizes[name] = n // sizes[other]
  need = sizes['data'] * sizes['model']
  if need > n:
    raise ValueError(
        f'mesh data={sizes["data"]} x model={sizes["model"]} needs {need} '
        f'devices, but {there}; take data=-1 for what there is')
  grid = np.array(devices[:need]).reshape(sizes['data'], sizes['model'])
  return jax.sharding.Mesh(
      grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def replicated(mesh):
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh):
  """Leading axis over 'data'."""
  return NamedSharding(mesh, PartitionSpec('data'))


def rows_stay(mesh, rows):
  """Context in which what layers return stays split over 'data' by examples.

  Where the base is split over 'data' too, XLA else takes the other way to
  multiply: it leaves kernels as they lie, splits activations as the kernels'
  inputs, gives every device all examples, and adds up the outputs. The residual
  stream and what norms make of it stay whole in width: a method that works on
  parts of it (blocks of a rotation) else has it split over 'model', and put
  together again before every kernel. Says where numbers lie, never what they
  are.

  Args:
    mesh: From `make_mesh`.
    rows: Examples in the batch; arrays with another first axis are left alone.
  """
  if mesh.size == 1:
    return contextlib.nullcontext()

  def keep(f, args, kwargs, context):
    norm = 'Norm' in type(context.module).__name__

    def place(y):
      if not hasattr(y, 'shape') or y.shape[:1] != (rows,):
        return y
      # Heads, which may be split, have norms as well, with an axis more.
      whole = context.method_name in _STREAM or norm and len(y.shape) < 4
      other = None if whole else PartitionSpec.UNCONSTRAINED
      return jax.lax.with_sharding_constraint(y, NamedSharding(
          mesh, PartitionSpec('data', *[other] * (len(y.shape) - 1))))

    return jax.tree.map(place, f(*args, **kwargs))

  return nn.intercept_methods(keep)


def data_shard(mesh):
  """(i, n): this process reads the i-th of n parts of every batch.

  Processes whose devices share rows of the 'data' axis, as those of a 'model'
  axis over several processes do, read the same part.

  Raises:
    ValueError: a process without a device in the mesh, or parts that overlap.
  """
  rows = {p: set() for p in range(jax.process_count())}
  for i, row in enumerate(mesh.devices):
    for device in row:
      rows[device.process_index].add(i)
  shape = ' x '.join(f'{name}={n}' for name, n in mesh.shape.items())
  without = [p for p, own in rows.items() if not own]
  if without:
    raise ValueError(
        f'mesh {shape}: process {without[0]} has none of its {mesh.size} '
        f'devices, out of {jax.device_count()}; take data=-1 for all, or start '
        'fewer processes')
  parts = sorted({tuple(sorted(own)) for own in rows.values()})
  if (len({len(p) for p in parts}) > 1
      or sum(map(len, parts)) != mesh.shape['data']):
    raise ValueError(
        f'mesh {shape}: the {jax.local_device_count()} devices of a process do '
        'not hold whole rows of it; expected a model axis that divides them, '
        'or a multiple of them')
  return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def check_batch(mesh, batch):
  """Raises where a batch does not divide over the 'data' axis."""
  n = mesh.shape['data']
  if batch % n:
    raise ValueError(
        f'batch={batch} does not divide over the {n} devices of the data axis; '
        f'the nearest are {max(batch // n, 1) * n} and {(batch // n + 1) * n}')


def put_batch(batch, sharding):
  """This process's part of a batch -> global arrays."""
  return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v))
          for k, v in batch.items()}


def put_global(tree, shardings):
  """Arrays that every process has whole -> global arrays.

  Args:
    tree: Nested mapping of arrays; those that lie as they are to stay.
    shardings: One sharding, or a tree like it of shardings.
  """
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)

  def put(value, sharding):
    if isinstance(value, jax.Array) and value.sharding == sharding:
      return value
    value = np.asarray(value)
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: value[index])

  return jax.tree.map(put, tree, shardings)


def params_sharding(mesh, rules, params):
  """Shardings of a params tree by ordered rules; the first match wins.

  Args:
    mesh: From `make_mesh`.
    rules: ((regex on a path, axes), ...): axes has for every dimension, from
      the first, an axis' name or None. What no rule matches is replicated.
    params: Nested mapping of arrays or shapes.

  Raises:
    ValueError: an unknown axis, a rule that is never used, more axes than
      dimensions, or a dimension that an axis does not divide.
  """
  flat, unused = trees.flatten(params), {pattern for pattern, _ in rules}
  out = {}
  for path, value in flat.items():
    spec = ()
    for pattern, axes in rules:
      if re.search(pattern, path):
        spec = tuple(axes)
        unused.discard(pattern)
        break
    if len(spec) > len(value.shape):
      raise ValueError(f'shard_rules: {spec} for {path!r}, which has only the '
                       f'dimensions {tuple(value.shape)}')
    for dim, axis in zip(value.shape, spec):
      if axis is None:
        continue
      if axis not in AXES:
        raise ValueError(f'shard_rules: unknown axis {axis!r} for {path!r}'
                         f'{nearest(axis, AXES)}')
      if dim % mesh.shape[axis]:
        raise ValueError(
            f'shard_rules: {path!r} has the dimensions {tuple(value.shape)}, '
            f'of which {dim} does not divide over the {mesh.shape[axis]} '
            f'devices of axis {axis!r}')
    out[path] = NamedSharding(mesh, PartitionSpec(*spec))
  for pattern in unused:
    raise ValueError(f'shard_rules: {pattern!r} decides no parameter: it '
                     'matches none, or an earlier rule has them'
                     f'{nearest(pattern, flat)}')
  return trees.unflatten(out)


def theta_sharding(mesh, sites, params_shardings, theta):
  """Shardings of theta: what runs along a kernel's axis lies as the kernel.

  A leaf whose first or last dimension is the kernel's d_in or d_out is split
  as that axis of the kernel is, so that a factored method costs no further
  communication; whole leaves (`Method.replaces`) are split as the leaf they
  stand for; all else is replicated. This decides where numbers lie, never what
  they are.

  Args:
    mesh: From `make_mesh`.
    sites: What `describe` returned.
    params_shardings: From `params_sharding`.
    theta: {method: {path: {leaf: array or shape}}}.
  """
  flat = trees.flatten(params_shardings)

  def one(path, leaf, value):
    spec = ()
    if path != SHARED and path in sites:
      spec = _leaf_spec(sites[path], flat, leaf, value.shape)
    fits = []
    for dim, axis in zip(value.shape, spec):
      ok = (axis is not None and axis not in fits
            and dim % mesh.shape[axis] == 0)
      fits.append(axis if ok else None)
    return NamedSharding(mesh, PartitionSpec(*fits))

  return {name: {path: {leaf: one(path, leaf, v) for leaf, v in t.items()}
                 for path, t in by_path.items()}
          for name, by_path in theta.items()}


def _leaf_spec(site, flat, leaf, shape):
  """Axes of one leaf of theta, before divisibility is looked at."""
  base, _ = views_lib.split_path(site.path)
  n = len(site.stack)

  def stored(view):
    key = f'{base}/{view.leaf}' if base else view.leaf
    spec = tuple(flat[key].spec) if key in flat else ()
    return spec + (None,) * (n + len(view.shape) - len(spec))

  for view in site.leaves.values():
    if view.leaf == leaf and (*site.stack, *view.shape) == tuple(shape):
      return stored(view)
  kernel = site.leaves.get('kernel')
  if kernel is None or not kernel.n_in or tuple(shape[:n]) != site.stack:
    return ()
  axes = stored(kernel)
  ordered = [axes[n + i] for i in kernel.perm]
  ins, outs = ordered[:kernel.n_in], ordered[kernel.n_in:]
  # Merged dimensions lie in blocks only where the first alone is split.
  d_in, d_out = map(math.prod, kernel.dims)
  along = {'in': (d_in, None if any(ins[1:]) else ins[0]),
           'out': (d_out, None if any(outs[1:]) else outs[0])}
  if kernel.span:
    along['out'] = (kernel.span[1] - kernel.span[0], None)

  def axis(dim, order):
    return next((along[k][1] for k in order if along[k][0] == dim), None)

  dims = shape[n:]
  spec = [None] * len(dims)
  if len(dims) > 1:
    spec[0] = axis(dims[0], ('in', 'out'))
  if dims:
    spec[-1] = axis(dims[-1], ('out', 'in'))
  return (*axes[:n], *spec)
