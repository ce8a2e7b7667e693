"""Hugging Face checkpoint folders: config.json and safetensors, both ways.

  model, params, config = load('path/to/all-MiniLM-L6-v2')
  model, params, config = load('org/name', head='classify', classes=3)
  save('out', model, params, like=config)          # opens in transformers

Nothing is unpickled, torch is never loaded, and tensors are read one at a time,
with shardings each device's part alone. What is peculiar to an architecture
stands in the module of its family; see families.py.
"""

import re
from typing import Any, NamedTuple

from absl import logging
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftjax import trees
from peftjax.interop import families
from peftjax.interop.files import Files, find_folder
from peftjax.interop.saving import save  # pylint: disable=unused-import
from peftjax.interop.tensors import stored_index, stored_shape, to_ours


class Checkpoint(NamedTuple):
  """What `load` returns; `config` is config.json as a dict."""

  model: nn.Module
  params: Any
  config: dict


def load(path_or_repo_id, head='own', classes=None, scan=False, remat=False,
         dtype=jnp.float32, param_dtype=jnp.float32, shardings=None,
         revision=None):
  """Reads a checkpoint -> Checkpoint(model, params, config).

  Args:
    path_or_repo_id: The name of a checkpoint that comes with the package
      ('stories260k'); a folder with config.json and safetensors (one file, or
      many with an index); or a hub id 'org/name', which needs huggingface_hub
      and a connection, or the hub's cache.
    head: 'own' for the checkpoint's own; else as in the family's model: None,
      'classify', 'tag', 'lm', ... Parts of a head that the file does not hold
      are new: the output layer zeros, others as the model initialises them.
    classes: Outputs of a 'classify' or 'tag' head; None: as many as the config
      names. Where the file's output layer has another size, it is new.
    scan, remat, dtype: Of the model.
    param_dtype: Of the parameters.
    shardings: `f(tree of ShapeDtypeStructs) -> tree of shardings`; each
      device's part is then read from the file by itself.
    revision: Of the repository.

  Raises:
    FileNotFoundError: no such folder or repository, or no config or weights.
    ValueError: a model_type or setting that is not supported, tensors that are
      missing, left over, of another shape or not finite, a damaged file, or
      pickled weights, which are never read.
  """
  folder = find_folder(path_or_repo_id, revision)
  config, module, file_head, options = _described(
      folder, head, classes, remat, dtype)
  model_type, head = config['model_type'], options['head']
  model = module.build(config, **options, scan=False)
  shapes = _shapes(model, config)
  entries = module.names(model, model_type)
  if set(entries) != set(shapes):
    raise AssertionError(
        f'{module.__name__}.names is out of step with the model: '
        f'{sorted(set(entries) ^ set(shapes))}')
  with Files(folder) as files:
    source = _Source(files, module, model, model_type, config)
    fresh = source.check(entries, shapes, folder, classes is not None,
                         head != file_head)
    if fresh:
      logging.info('%s: new %s', folder, ', '.join(sorted(fresh)))
    new = _fresh(model, config, fresh)
    if scan:
      model = module.build(config, **options, scan=True)
      shapes = _shapes(model, config)
    params = _read(source, entries, shapes, new, param_dtype, shardings)
  return Checkpoint(model, params, config)


def shapes(folder, head='own', classes=None, scan=False, remat=False,
           dtype=jnp.float32, param_dtype=jnp.float32):
  """As `load`, but params are ShapeDtypeStructs: only config.json is read."""
  config, module, _, options = _described(folder, head, classes, remat, dtype)
  model = module.build(config, **options, scan=scan)
  return Checkpoint(model, trees.unflatten(
      {p: jax.ShapeDtypeStruct(s.shape, param_dtype)
       for p, s in _shapes(model, config).items()}), config)


def _described(folder, head, classes, remat, dtype):
  """config.json, its family, the file's own head, the model's options."""
  config = families.read_config(folder)
  own = families.own_head(config)
  options = dict(head=own if head == 'own' else head, dtype=dtype, remat=remat)
  if classes is not None:
    options['classes'] = classes
  return config, families.family(config['model_type']), own, options


def _shapes(model, config):
  init = lambda *a: model.init(jax.random.key(0), *a)['params']
  return trees.flatten(jax.eval_shape(init, *families.example(model, config)))


def _is_head(path):
  return path.startswith('head/') or '/head/' in path


def _fresh(model, config, paths):
  """{path: array} of new leaves of a head."""
  if not paths:
    return {}

  @jax.jit  # what is not among the paths is not computed
  def make(key, *inputs):
    params = trees.flatten(model.init(key, *inputs)['params'])
    return {p: params[p] for p in paths}

  try:  # a base's fingerprint covers its new head: the same on all devices
    place = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
    place = None
  with jax.default_device(place):
    made = make(jax.random.key(0), *(
        jnp.zeros(s.shape, s.dtype) for s in families.example(model, config)))
  return {p: np.asarray(v) for p, v in made.items()}


class _Source:
  """The stored tensors by the names that a family uses."""

  def __init__(self, files, module, model, model_type, config):
    self.files, self.computed, consumed = files, {}, set()
    self.prefix = module.prefix(model_type)
    self.prefixed = bool(self.prefix) and any(
        n.startswith(self.prefix) for n in files.names)
    if hasattr(module, 'before_load'):
      self.computed, consumed = module.before_load(
          lambda n: files.read(self.stored(n)),
          {self.bare(n) for n in files.names}, config)
    self.consumed = {self.stored(n) for n in consumed}
    self.ignored = families.ignored(module, model, model_type)

  def stored(self, name):
    """Name in the files of a name in `names`."""
    if name.startswith('/'):
      return name[1:]
    return self.prefix + name if self.prefixed else name

  def bare(self, stored):
    """The inverse of `stored`."""
    if not self.prefixed:
      return stored
    if stored.startswith(self.prefix):
      return stored[len(self.prefix):]
    return '/' + stored

  def has(self, name):
    return name in self.computed or self.stored(name) in self.files.names

  def shape(self, name):
    if name in self.computed:
      return tuple(self.computed[name].shape)
    return self.files.shape(self.stored(name))

  def read(self, name, index=None):
    if name in self.computed:
      value = self.computed[name]
      return value if index is None else value[index]
    return self.files.read(self.stored(name), index)

  def check(self, entries, shapes, folder, resize, other_head):
    """Leaves that must be made new; raises with every difference there is."""
    wrong, fresh = [], set()
    used = set(self.consumed)
    for path, tensor in entries.items():
      want = stored_shape(tensor, shapes[path].shape)
      for name in tensor.names:
        used.add(self.stored(name))
        if not self.has(name):
          if _is_head(path):
            fresh.add(path)
          else:
            wrong.append(f'missing {self.stored(name)} {want}')
        elif self.shape(name) != want:
          if _is_head(path) and resize:
            fresh.add(path)
          else:
            wrong.append(f'{self.stored(name)} {self.shape(name)}, '
                         f'expected {want}')
    left = []
    for name in sorted(self.files.names - used):
      bare = self.bare(name).lstrip('/')
      if any(re.search(p, bare) for p in self.ignored):
        continue
      if other_head and self.prefixed and not name.startswith(self.prefix):
        left.append(name)
        continue
      wrong.append(f'left over {name} {self.files.shape(name)}')
    if wrong:
      raise ValueError(f'{folder} does not fit its config.json:\n  '
                       + '\n  '.join(wrong))
    if left:
      logging.info('%s: another head is left out: %s', folder, ', '.join(left))
    return fresh


def _read(source, entries, shapes, new, dtype, shardings):
  """Params tree, read one leaf at a time; scanned where `shapes` are."""
  layers = {}  # stacked path -> unrolled paths in order
  for path in entries:
    found = re.search(r'(^|/)block_(\d+)(?=/)', path)
    if found and path not in shapes:
      whole = f'{path[:found.start()]}{found[1]}blocks{path[found.end():]}'
      layers.setdefault(whole, {})[int(found[2])] = path

  def part(path, shape, index):
    """One unrolled leaf, or the part of it that `index` names."""
    if path in new:
      return np.asarray(new[path])[index].astype(dtype)
    tensor = entries[path]
    inner = index[1:] if tensor.stacked else index
    names = tensor.names[index[0]] if tensor.stacked else tensor.names
    inner_shape = shape[1:] if tensor.stacked else shape
    at = stored_index(tensor.kind, inner)
    values = []
    for name in names:
      value = to_ours(tensor.kind, source.read(name, at), inner_shape)
      value = value[inner] if at is None else value
      value = np.asarray(value).astype(dtype)
      if not np.isfinite(value).all():
        raise ValueError(f'{source.stored(name)} holds numbers that are not '
                         'finite')
      values.append(value)
    return np.stack(values) if tensor.stacked else values[0]

  def leaf(path, shape, index):
    if path not in layers:
      return part(path, shape, index)
    each = [layers[path][i] for i in sorted(layers[path])]
    # Filled in place: a list of layers and its stack would be there at once.
    out = None
    for i, one in enumerate(each[index[0]]):
      value = part(one, shape[1:], index[1:])
      if out is None:
        out = np.empty((len(each[index[0]]), *value.shape), value.dtype)
      out[i] = value
    return out

  at = None
  if shardings is not None:
    at = trees.flatten(shardings(trees.unflatten(
        {p: jax.ShapeDtypeStruct(s.shape, dtype) for p, s in shapes.items()})))
  params = {}
  for path, s in shapes.items():
    everything = tuple(slice(0, n) for n in s.shape)
    if at is None:
      params[path] = jnp.asarray(leaf(path, s.shape, everything))
    else:
      params[path] = jax.make_array_from_callback(
          s.shape, at[path], lambda index, path=path, s=s: leaf(
              path, s.shape, tuple(
                  slice(*i.indices(n)) for i, n in zip(index, s.shape))))
  return trees.unflatten(params)
