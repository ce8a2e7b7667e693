"""Weight files: one safetensors file a model, its configuration inside.

Tensors are named by their path in the parameter tree, 'block_0/attn/out/bias',
always in the unrolled form; `load_weights(..., scan=True)` stacks them. The
metadata entry 'config' is a JSON object:

  module  where the Linen class is, below peftjax.models: 'vit.ViT'
  args    its arguments
  input   shape of the array it is called on, used to check every tensor
  dtype   of that array (optional, float32)

Other entries are free: what the file was trained on, how inputs are scaled.
"""

import difflib
import importlib
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from peftjax import trees

_FOLDER = os.path.join(os.path.dirname(os.path.dirname(__file__)), 'weights')


def load_weights(path_or_name, classes=None, key=None, scan=False,
                 head='own'):
  """Reads a weight file -> (Linen model, params in float32).

  Args:
    path_or_name: a path that ends in '.safetensors', or the name of a file
      that comes with the package ('vit_s').
    classes: give the model a new head of so many outputs, which starts at
      zero. None keeps the file's own head; a file without one then gets a
      zero head of the size the class has by default.
    key: draw the new head's kernel from N(0, 0.02^2) instead of zeros.
    scan: build the model with scan=True and stack block_0, block_1, ... into
      'blocks'.
    head: 'own' for the head that the file was made with; else what the model's
      attribute `head` is to be; a model without one classifies. Another head
      than the file's is new.

  Raises:
    FileNotFoundError: no such path.
    ValueError: a head that the model does not have, unknown name, unreadable
      file, or tensors that are missing, left over or of another shape than the
      model's.
  """
  path = _resolve(path_or_name)
  tensors, config = _read(path)
  model_class = _model_class(config, path)
  args = dict(config['args'])
  if scan and 'scan' not in model_class.__dataclass_fields__:
    raise ValueError(
        f'scan=True: {config["module"]} has no scanned form; use scan=False')
  fresh = classes is not None or not any(_is_head(n) for n in tensors)
  if head != 'own':
    fields = model_class.__dataclass_fields__
    if 'head' in fields:
      fresh |= head != args.get('head', fields['head'].default)
      args['head'] = head
    elif head != 'classify':
      raise ValueError(f'head={head!r}: {config["module"]} has a head that '
                       "classifies and no other; expected 'classify'")
  if classes is not None:
    args['classes'] = classes
  if fresh:
    tensors = {n: a for n, a in tensors.items() if not _is_head(n)}
  # Checked unrolled, so that messages name the tensors as the file does.
  shapes = _expected(model_class(**args), config)
  if fresh:
    tensors |= _new_head(shapes, key)
  _check(tensors, shapes, path)
  params = trees.unflatten(
      {n: jnp.asarray(a, jnp.float32) for n, a in tensors.items()})
  if not scan:
    return model_class(**args), params
  return model_class(**args, scan=True), trees.stack(params)


def read_config(path_or_name):
  """The 'config' entry of a weight file; errors as in `load_weights`."""
  return _read(_resolve(path_or_name))[1]


def save_weights(path, params, config, dtype=jnp.float16):
  """Writes params (unrolled or scanned) and config to a safetensors file.

  Args:
    path: where; a file already there is replaced in one step.
    params: tree of arrays, without the 'params' level.
    config: see the module docstring; must be JSON.
    dtype: of the stored tensors.

  Raises:
    ValueError: a tensor does not fit into dtype, or config lacks an entry.
  """
  for entry in ('module', 'args', 'input'):
    if entry not in config:
      raise ValueError(f'config has no entry {entry!r}, only {sorted(config)}')
  tensors = {}
  for name, a in trees.flatten(trees.unstack(params)).items():
    a = np.asarray(a)
    # Overflow is reported below, by name.
    with np.errstate(over='ignore'):
      tensors[name] = np.ascontiguousarray(a.astype(dtype))
    if not np.isfinite(tensors[name]).all():
      raise ValueError(
          f'{name}: largest magnitude {np.abs(a).max():.3g} does not fit into '
          f'{np.dtype(dtype)}; use dtype=jnp.float32')
  data = safetensors.numpy.save(tensors, {'config': json.dumps(config)})
  part = f'{path}.{os.getpid()}.part'
  with open(part, 'wb') as f:
    f.write(data)
  os.replace(part, path)


def _resolve(path_or_name):
  name = os.fspath(path_or_name)
  if name.endswith('.safetensors') or os.sep in name:
    if not os.path.isfile(name):
      folder = os.path.dirname(name) or '.'
      there = os.listdir(folder) if os.path.isdir(folder) else []
      raise FileNotFoundError(
          f'no weight file {name!r}; '
          f'nearest: {_nearest(os.path.basename(name), there)}')
    return name
  known = sorted(n.removesuffix('.safetensors') for n in os.listdir(_FOLDER)
                 if n.endswith('.safetensors'))
  if name not in known:
    raise ValueError(
        f'unknown weights {name!r}; nearest: {_nearest(name, known)}. '
        "A path must end in '.safetensors'")
  return os.path.join(_FOLDER, name + '.safetensors')


def _read(path):
  """Path -> ({name: array}, config)."""
  try:
    with safetensors.safe_open(path, 'numpy') as f:
      metadata = f.metadata() or {}
      tensors = {name: f.get_tensor(name) for name in f.keys()}
  except safetensors.SafetensorError as e:
    raise ValueError(
        f'{path} ({os.path.getsize(path)} bytes) is no complete safetensors '
        f'file: {e}. Fetch it again') from e
  if 'config' not in metadata:
    raise ValueError(
        f"{path} has no metadata entry 'config', only {sorted(metadata)}; "
        'write the file with save_weights')
  return tensors, json.loads(metadata['config'])


def _model_class(config, path):
  """Class named by config['module'], 'file.Class' below peftjax.models."""
  if not re.fullmatch(r'[a-z_0-9]+\.\w+', config['module']):
    raise ValueError(
        f"{path}: module {config['module']!r} is not of the form 'vit.ViT'")
  file, name = config['module'].split('.')
  return getattr(importlib.import_module(f'peftjax.models.{file}'), name)


def _expected(model, config):
  """{name: shape} of the model's parameters, nothing computed."""
  x = jax.ShapeDtypeStruct(config['input'], config.get('dtype', 'float32'))
  params = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  return {name: a.shape for name, a in trees.flatten(params).items()}


def _new_head(shapes, key):
  """Tensors of a new head: zeros, or a small random kernel."""
  head = {n: jnp.zeros(s) for n, s in shapes.items() if _is_head(n)}
  if key is not None:
    kernel = head['head/kernel']
    head['head/kernel'] = 0.02 * jax.random.normal(key, kernel.shape)
  return head


def _check(tensors, shapes, path):
  """Raises a ValueError that lists every difference in names and shapes."""
  wrong = [f'missing {n} {s}' for n, s in sorted(shapes.items())
           if n not in tensors]
  wrong += [f'left over {n} {a.shape}, nearest: {_nearest(n, shapes)}'
            for n, a in sorted(tensors.items()) if n not in shapes]
  wrong += [f'{n} {tensors[n].shape}, expected {s}'
            for n, s in sorted(shapes.items())
            if n in tensors and tensors[n].shape != s]
  if wrong:
    raise ValueError(f'{path} does not fit its model:\n  ' +
                     '\n  '.join(wrong))


def _is_head(name):
  return name.startswith('head/')


def _nearest(name, known):
  known = sorted(known)
  return ', '.join(difflib.get_close_matches(name, known, 3, 0.3) or known[:8])
