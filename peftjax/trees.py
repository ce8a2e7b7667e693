"""Trees of arrays by '/'-paths: rules, counts, stacking, fingerprints."""

from collections.abc import Mapping
import hashlib
import re

from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np


def _children(tree):
  """(name, value) of what a mapping or a list holds; None for a leaf."""
  if isinstance(tree, Mapping):
    return tree.items()
  return enumerate(tree) if isinstance(tree, list) else None


def flatten(tree):
  """Nested mappings and lists -> {'a/b/0': leaf}."""
  flat = {}
  for name, value in _children(tree) or ():
    if _children(value) is None:
      flat[str(name)] = value
    else:
      flat.update({f'{name}/{p}': v for p, v in flatten(value).items()})
  return flat


def refill(tree, flat, path=''):
  """A tree of the structure of `tree`, with the leaves that `flat` names.

  Lists, and keys that are no strings, come back as they were.
  """
  if _children(tree) is None:
    return flat[path]
  new = {k: refill(v, flat, f'{path}/{k}' if path else str(k))
         for k, v in _children(tree)}
  return new if isinstance(tree, Mapping) else list(new.values())


def unflatten(flat):
  """{'a/b/c': leaf} -> nested dicts."""
  return traverse_util.unflatten_dict(flat, sep='/')


def first_match(rules, path, default):
  """Value of the first (regex, value) whose regex is found in `path`."""
  for pattern, value in rules:
    try:
      found = re.search(pattern, path)
    except re.error as e:
      raise ValueError(f'{pattern!r} is not a regular expression: {e}') from e
    if found:
      return value
  return default


class Rules(Mapping):
  """Ordered (regex, value) rules as a mapping from every name they match.

  For names that are not known beforehand: Rules((r'^alpha', 'gate')) has the
  value 'gate' for 'alpha.kernel' and for the alpha of any other leaf. Iterating
  gives the patterns.
  """

  def __init__(self, *rules):
    self.rules = rules

  def __getitem__(self, name):
    for pattern, value in self.rules:
      if re.search(pattern, name):
        return value
    raise KeyError(name)

  def __iter__(self):
    return iter(pattern for pattern, _ in self.rules)

  def __len__(self):
    return len(self.rules)

  def __eq__(self, other):
    return isinstance(other, Rules) and self.rules == other.rules

  def __hash__(self):
    return hash(self.rules)

  def __repr__(self):
    return f'Rules{self.rules}'


def count(tree):
  """How many numbers a tree holds."""
  return sum(int(np.prod(jnp.shape(v))) for v in jax.tree.leaves(tree))


def size(tree):
  """How many bytes a tree holds."""
  return sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(tree))


def nonfinite(tree):
  """Paths of the leaves that hold a NaN or an infinity.

  Leaves without values (tracers, shapes) are passed over.
  """
  flat = {p: v for p, v in (flatten(tree) or {'': tree}).items()
          if isinstance(v, (np.ndarray, jax.Array))
          and not isinstance(v, jax.core.Tracer)
          and jnp.issubdtype(v.dtype, jnp.floating)}
  ok = jax.jit(lambda f: {p: jnp.isfinite(v).all() for p, v in f.items()})(flat)
  return [p for p, good in ok.items() if not good]


def stack(params, pattern=r'(^|.*/)block_(\d+)', name='blocks'):
  """Unrolled layers 'block_0', 'block_1', ... -> one stacked 'blocks'.

  Args:
    params: Nested mapping (params, or one method's theta by flat paths).
    pattern: Regex whose first group is what stands before the layer's name and
      whose second group is its number.
    name: Name of the stacked layer.
  """
  out, layers = {}, {}
  for path, v in flatten(params).items():
    found = re.match(pattern + r'(?=/|$)', path)
    if found:
      new = f'{found[1]}{name}{path[found.end():]}'
      layers.setdefault(new, {})[int(found[2])] = v
    else:
      out[path] = v
  for path, each in layers.items():
    if sorted(each) != list(range(len(each))):
      raise ValueError(f'{path}: layers {sorted(each)} are not 0, 1, 2, ...')
    out[path] = jnp.stack([each[i] for i in range(len(each))])
  return unflatten(out)


def unstack(params, name='blocks', prefix='block_'):
  """Inverse of `stack`."""
  out = {}
  for path, v in flatten(params).items():
    parts = path.split('/')
    if name in parts:
      at = parts.index(name)
      for i in range(v.shape[0]):
        new = [*parts[:at], f'{prefix}{i}', *parts[at + 1:]]
        out['/'.join(new)] = v[i]
    else:
      out[path] = v
  return unflatten(out)


def difference(a, b):
  """How far two trees of floats are apart: (largest |a - b|, the same in ulps).

  One unit in the last place (ulp) is the distance from the largest magnitude
  among all numbers of a and b to the next float32. It is one unit for the whole
  tree: rounding errors scale with the largest terms of a sum, and a number that
  cancels to nearly 0 has an ulp of its own that says nothing about them.
  """
  pairs = [(np.asarray(x, np.float32), np.asarray(y, np.float32))
           for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
  far = np.max([np.abs(x.astype(float) - y).max(initial=0) for x, y in pairs])
  top = np.max([np.abs(v).max(initial=0) for pair in pairs for v in pair])
  return float(far), float(far / np.spacing(np.float32(top)))


def fingerprint(params, most=2 ** 26):
  """SHA-256 over the paths, shapes, dtypes and bytes of a tree of arrays.

  Args:
    params: Nested mapping of arrays, on the host or on devices. Of arrays of
      which other processes hold parts, all processes have to ask.
    most: Bytes of an array on devices that are on the host at a time; only a
      single row along the first axis may be larger.
  """
  digest = hashlib.sha256()
  flat = flatten(params)
  for path in sorted(flat):
    value = flat[path]
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    digest.update(f'{path} {value.shape} {value.dtype}\n'.encode())
    for rows in _rows(value, most):
      digest.update(np.ascontiguousarray(rows).tobytes())
  return digest.hexdigest()


def _rows(value, most):
  """An array in parts along its first axis, on the host; see `fingerprint`."""
  n = len(value) if value.ndim else 0
  if isinstance(value, jax.Array) and not value.is_fully_addressable:
    yield multihost_utils.process_allgather(value, tiled=True)
    return
  if isinstance(value, np.ndarray) or n < 2 or value.nbytes <= most:
    yield np.asarray(value)
    return
  step = max(1, n * most // value.nbytes)
  for first in range(0, n, step):
    last = min(first + step, n)
    out = np.empty((last - first, *value.shape[1:]), value.dtype)
    # Of each device its own rows: no device is sent another's.
    for shard in value.addressable_shards:
      if shard.replica_id:
        continue
      start, stop, _ = shard.index[0].indices(n)
      a, b = max(first, start), min(last, stop)
      if a < b:
        out[a - first:b - first, *shard.index[1:]] = (
            jax.lax.dynamic_slice_in_dim(shard.data, a - start, b - a))
    yield out
