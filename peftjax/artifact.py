"""Adapters on disk: one folder with theta and what it was made for.

  adapter.safetensors   theta, every leaf under 'method/path/leaf', bit for bit
  adapter.json          how to make the methods again, the sites, the base

A folder is written beside its place and moved there whole, so that a reader
never meets half an adapter, and nothing is overwritten before everything was
checked. Loading refuses whatever theta was not trained for: another base,
another shape, a format or a method that this version does not know, and files
that were damaged or changed since.
"""

from collections.abc import Mapping, Sequence
import hashlib
import inspect
import json
import math
import os
import re
import secrets
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from peftjax import method as method_lib
from peftjax import sites as sites_lib
from peftjax import theta as theta_lib
from peftjax import trees
from peftjax.folding import over_stack
from peftjax.method import as_methods, nearest, SHARED
from peftjax.version import VERSION

FORMAT = 1
TENSORS, META = 'adapter.safetensors', 'adapter.json'
FIELDS = ('format', 'peftjax', 'methods', 'sites', 'base', 'tensors',
          'trained', 'stored', 'sha256', 'digest')


class Adapter(NamedTuple):
  """A loaded adapter."""

  methods: tuple[method_lib.Method, ...]  # as they were given to save_adapter
  theta: Mapping[str, Any]
  meta: Mapping[str, Any]  # adapter.json; meta['base'] names the base


# ------------------------------------------------------------------- save
def save_adapter(path, methods, theta, sites, params, base=''):
  """Writes an adapter folder.

  Args:
    path: Folder to make; an adapter already there is replaced.
    methods: As given to `init`, each made by `load`.
    theta: What was trained.
    sites: What `describe` returned.
    params: The base's params tree that theta was trained on, to the bit.
    base: How to find the base again: a name or path for `load_weights`, or a
      mapping of JSON values with such an entry 'weights' (also 'classes', the
      size of a new head, 'scan', and 'data', the data set).

  Raises:
    ValueError: methods not made by `load`, or with a hyper-parameter that is
      no JSON; theta of other methods or sites, or with NaN; params that do not
      fit; a path that cannot be written or holds something else.
  """
  path = os.path.realpath(path)
  named = as_methods(methods)
  trained, _ = theta_lib.partition(methods, theta)
  sites_lib.check_fits(sites, params)
  arrays = {n: np.asarray(v) for n, v in _flat(theta).items()}
  _check_finite(arrays, 'theta')
  base = dict(base) if hasattr(base, 'items') else dict(weights=base)
  payload = safetensors.numpy.save({n: _raw(a) for n, a in arrays.items()})
  meta = dict(
      format=FORMAT, peftjax=VERSION,
      methods=[_spec(n, m) for n, m in named.items()],
      sites={n: _chosen(n, t, sites) for n, t in theta.items()},
      base=dict(_plain(base, 'base'), fingerprint=trees.fingerprint(params)),
      tensors={n: dict(shape=list(a.shape), dtype=str(a.dtype))
               for n, a in arrays.items()},
      trained=trees.count(trained), stored=trees.count(theta),
      sha256=hashlib.sha256(payload).hexdigest())
  meta['digest'] = _digest(meta)
  # Shapes on one line; a JSON string holds no line breaks.
  text = re.sub(r'\[\n[\d\s,]*\]', lambda m: ' '.join(m[0].split()),
                json.dumps(meta, indent=1))
  try:
    _check_target(path)
    replace_folder(path, {TENSORS: payload, META: text.encode()})
  except OSError as e:
    raise ValueError(f'cannot write an adapter to {path!r}: {e}; choose a '
                     'folder that can be written') from e


def _flat(theta):
  """{'method/path/leaf': array}; neither method nor leaf holds a '/'."""
  return {f'{name}/{path}/{leaf}': v for name, by_path in theta.items()
          for path, t in by_path.items() for leaf, v in t.items()}


def _nested(flat, sites):
  """Inverse; `sites` brings back methods and sites that hold no arrays."""
  theta = {name: {path: {} for path in paths} for name, paths in sites.items()}
  for key, value in flat.items():
    name, _, rest = key.partition('/')
    path, _, leaf = rest.rpartition('/')
    theta.setdefault(name, {}).setdefault(path, {})[leaf] = value
  return theta


def _check_finite(arrays, what):
  bad = [n for n, a in arrays.items()
         if jnp.issubdtype(a.dtype, jnp.floating)
         and not np.isfinite(a.astype(np.float32)).all()]
  if bad:
    raise ValueError(f'{what} holds NaN or infinity in {", ".join(bad)}')


def _raw(value):
  """bfloat16, float8 and int4 are stored as the integers of their bits."""
  if value.dtype.isbuiltin != 1:
    value = value.view(f'u{value.dtype.itemsize}')
  return np.ascontiguousarray(value).reshape(value.shape)  # keeps scalars


def _spec(name, method):
  """Keywords for `load`, as JSON values."""
  if not method.spec:
    raise ValueError(
        f'method {name!r} was not made by peftjax.load, so that it could not '
        'be made again from a file; put its factory under peftjax/methods, or '
        'fold it and save the weights')
  spec = dict(method.spec)
  known = inspect.signature(method_lib.factory(spec['name'])).parameters
  if 'sites' in spec and spec['sites'] is known['sites'].default:
    del spec['sites']
  return {k: _plain(v, f'{k} of method {name!r}') for k, v in spec.items()}


def _plain(value, what):
  """A JSON value equal to `value`, or a ValueError that names `what`."""
  if isinstance(value, sites_lib.Select):
    value = value.keywords
  if isinstance(value, np.generic):
    value = value.item()
  if hasattr(value, 'items'):
    return {str(k): _plain(v, f'{k} of {what}') for k, v in value.items()}
  if isinstance(value, Sequence) and not isinstance(value, str):
    return [_plain(v, what) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f'{what} is {value!r}: expected a finite number')
  if value is None or isinstance(value, (str, bool, int, float)):
    return value
  if callable(value):
    hint = ('a function cannot be written to a file; say the same with '
            'peftjax.select(roles=, kind=, path=, leaf=, exclude=)')
  else:
    hint = 'expected numbers, strings, and lists and mappings of them'
  raise ValueError(f'{what} is {value!r}: {hint}')


def _chosen(name, by_path, sites):
  """{path: what theta was made for} of one method."""
  out = {}
  for path in by_path:
    if path == SHARED:
      continue
    if path not in sites:
      raise ValueError(f'{name}: no site {path!r}{nearest(path, sites)}')
    out[path] = _form(sites[path])
  return out


def _form(site):
  return dict(kind=site.kind, role=site.role, stack=list(site.stack),
              params={n: list(v.shape) for n, v in site.params.items()})


def _digest(meta):
  rest = {k: v for k, v in meta.items() if k != 'digest'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_target(path):
  """Raises unless `path` is free or an adapter and nothing else."""
  if not os.path.lexists(path):
    return
  if not os.path.isdir(path):
    raise ValueError(f'{path!r} exists and is no folder; choose another path')
  other = sorted(set(os.listdir(path)) - {TENSORS, META})
  if other:
    raise ValueError(f'{path!r} holds files that are no adapter\'s '
                     f'({", ".join(other[:5])}); choose another folder, such '
                     f'as {os.path.join(path, "adapter")!r}')


def replace_folder(path, files):
  """Puts a folder of files in place of what is at `path`."""
  parent, name = os.path.split(path)
  os.makedirs(parent, exist_ok=True)
  # Hidden names in the same folder: a rename stays within one file system.
  mark = os.path.join(parent, f'.{name}.{secrets.token_hex(4)}')
  part, old = f'{mark}.part', f'{mark}.old'
  os.mkdir(part)
  try:
    for file, data in files.items():
      with open(os.path.join(part, file), 'wb') as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    if not os.path.lexists(path):
      os.rename(part, path)
      return
    os.rename(path, old)
    try:
      os.rename(part, path)
    except OSError:
      os.rename(old, path)
      raise
    shutil.rmtree(old, ignore_errors=True)
  finally:
    shutil.rmtree(part, ignore_errors=True)


# ------------------------------------------------------------------- load
def load_adapter(path, sites=None, params=None):
  """Reads an adapter folder.

  Args:
    path: What `save_adapter` wrote.
    sites: What `describe` returned for the model it is meant for; given, every
      site must be there and of the shape that theta was made for.
    params: The base it is meant for; given, it must be the one that theta was
      trained on, to the bit.

  Returns:
    An `Adapter`. Nothing in the files is executed; a method is made by `load`.

  Raises:
    ValueError: whatever does not hold; the message says what and where.
  """
  path = os.fspath(path)
  meta = _read_meta(path)
  methods = tuple(_method(spec, path) for spec in meta['methods'])
  if _digest(meta) != meta['digest']:
    raise ValueError(
        f'{os.path.join(path, META)} was changed after it was written (its '
        'digest does not fit); save the adapter again')
  theta = _read_theta(path, meta)
  named = as_methods(methods)
  if set(theta) != set(named):
    raise ValueError(f'{path}: theta holds {sorted(theta)}, its methods are '
                     f'{sorted(named)}')
  check_base(path, meta, sites, params)
  return Adapter(methods, theta, meta)


def _describe_base(base):
  rest = {k: v for k, v in base.items() if k != 'fingerprint' and v != ''}
  return ', '.join(f'{k}={v!r}' for k, v in rest.items()) or 'not named'


def _read_meta(path):
  """adapter.json, known to be complete."""
  if not os.path.isdir(path):
    there = 'a file' if os.path.exists(path) else 'not there'
    raise ValueError(f'{path!r} is {there}: expected an adapter folder with '
                     f'{TENSORS} and {META}; pickles are not read')
  file = os.path.join(path, META)
  for name in (META, TENSORS):
    if not os.path.isfile(os.path.join(path, name)):
      raise ValueError(f'{path!r} has no {name}, only '
                       f'{sorted(os.listdir(path))}; pickles are not read')
  try:
    with open(file, encoding='utf-8') as f:
      meta = json.load(f)
  except ValueError as e:  # JSON or UTF-8
    raise ValueError(f'{file} is no JSON: {e}; save the adapter again') from e
  if not isinstance(meta, dict) or 'format' not in meta:
    raise ValueError(f'{file} is no description of an adapter: it has no '
                     "entry 'format'")
  if meta['format'] != FORMAT:
    raise ValueError(
        f'{file} has format {meta["format"]!r}, written by peftjax '
        f'{meta.get("peftjax", "of unknown version")}; this version '
        f'({VERSION}) reads format {FORMAT}; install the one that wrote it')
  missing = [k for k in FIELDS if k not in meta]
  if missing:
    raise ValueError(f'{file} has no entry {missing[0]!r}; save it again')
  return meta


def _method(spec, path):
  try:
    return method_lib.load(**spec)
  except (TypeError, ValueError) as e:
    raise ValueError(f'{path}: cannot make the method {spec!r}: {e}') from e


def _read_theta(path, meta):
  file = os.path.join(path, TENSORS)
  with open(file, 'rb') as f:
    data = f.read()
  try:
    flat = safetensors.numpy.load(data)
  except (safetensors.SafetensorError, KeyError) as e:
    raise ValueError(
        f'{file} ({len(data)} bytes) is no complete safetensors file: {e}; '
        'copy or save the adapter again') from e
  wanted = meta['tensors']
  for names, what in ((set(wanted) - set(flat), 'misses'),
                      (set(flat) - set(wanted), 'has an unknown')):
    if names:
      raise ValueError(f'{file} {what} tensor {sorted(names)[0]!r}'
                       f'{nearest(sorted(names)[0], wanted)}')
  out = {}
  for name, form in wanted.items():
    dtype = jnp.dtype(form['dtype'])
    value = flat[name]
    if value.dtype != dtype:
      value = value.view(dtype)
    if list(value.shape) != form['shape']:
      raise ValueError(f'{file}: {name!r} has shape {list(value.shape)}, '
                       f'{META} says {form["shape"]}')
    out[name] = value
  _check_finite(out, file)
  if hashlib.sha256(data).hexdigest() != meta['sha256']:
    raise ValueError(f'{file} was changed after it was written (its SHA-256 '
                     'does not fit); copy or save the adapter again')
  return _nested(jax.tree.map(jnp.asarray, out), meta['sites'])


def start_from(path, methods, theta, sites, params):
  """Theta of an adapter folder, for training to go on with.

  Args:
    path: What `save_adapter` wrote, or `python -m peftjax.convert`.
    methods, theta: What training starts with otherwise; of theta, shapes.
    sites, params: As of `load_adapter`.

  Raises:
    ValueError: an adapter of another base, of other methods, on other sites, or
      whose numbers the config's settings (an alpha, a scaling) would use
      otherwise than the adapter's own.
  """
  adapter = load_adapter(path, sites, params)
  have, want = as_methods(adapter.methods), as_methods(methods)
  if set(have) != set(want):
    raise ValueError(f'start={path!r} holds {sorted(have)}, the config trains '
                     f'{sorted(want)}: expected the same methods')
  old, new = _flat(adapter.theta), _flat(theta)
  for name in sorted(set(old) ^ set(new)):
    where = 'the adapter' if name in old else 'the config'
    raise ValueError(f'start={path!r}: {name!r} is only in {where}; choose the '
                     'same sites for each method')
  for name, value in old.items():
    if value.shape != new[name].shape:
      raise ValueError(f'start={path!r}: {name!r} has shape {value.shape}, the '
                       f'config makes {new[name].shape}')
  for name, by_path in adapter.theta.items():
    common = by_path.get(SHARED, {})
    for at, t in by_path.items():
      if at == SHARED:
        continue
      used = [over_stack(
          lambda t, m=m: m.prepare({**common, **t}, method_lib.Context(at)),
          sites[at].stack)(t) for m in (have[name], want[name])]
      a, b = (jax.tree.leaves(u) for u in used)
      if len(a) != len(b) or not all(map(np.array_equal, a, b)):
        raise ValueError(
            f'start={path!r}: {name} at {at!r} was trained with '
            f'{have[name].spec}, the config says {want[name].spec}, which makes '
            'another function of it; use the settings of the adapter')
  return jax.tree.map(lambda v, like: jnp.asarray(v, like.dtype),
                      adapter.theta, theta)


def check_base(path, meta, sites=None, params=None):
  """Raises where an adapter's description does not fit a base; as load."""
  for name, by_path in meta['sites'].items() if sites is not None else ():
    for at, form in by_path.items():
      if at not in sites:
        raise ValueError(
            f'{name}: the model has no site {at!r}{nearest(at, sites)}')
      have = _form(sites[at])
      for what in ('stack', 'params'):
        if have[what] != form[what]:
          raise ValueError(
              f'{name}: another shape at {at!r}: the adapter was made for '
              f'{what} {form[what]}, the model has {have[what]}')
  if params is None:
    return
  have, want = trees.fingerprint(params), meta['base']['fingerprint']
  if have != want:
    raise ValueError(
        f'{path} was trained on another base: on {want[:12]}..., the params '
        f'given are {have[:12]}... (fingerprints); its base is '
        f'{_describe_base(meta["base"])}')
