"""Pretrained models, whichever way they are stored.

`load` takes the name of a model that comes with the package ('vit_s'), the path
of a weight file of this library ('runs/model.safetensors'), a folder in the
layout of the Hugging Face hub, or a hub id ('org/name').
"""

import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftjax import trees
from peftjax.interop import families
from peftjax.interop import huggingface
from peftjax.interop.files import find_folder, packaged
from peftjax.models.weights import load_weights, read_config


class Base(NamedTuple):
  """A pretrained model."""

  model: nn.Module
  params: Any  # numpy arrays; on devices where `load` was given shardings
  config: dict  # of the weight file, or config.json
  folder: str  # where its tokenizer and preprocessor are; '' for one file
  fingerprint: str  # of params


def is_folder(weights):
  """Whether `weights` means a Hugging Face folder or hub id."""
  weights = os.fspath(weights)
  return not weights.endswith('.safetensors') and (
      os.sep in weights or os.path.isdir(find(weights)))


def find(weights):
  """The packaged folder of that name, where there is one; else `weights`."""
  return packaged(os.fspath(weights)) or os.fspath(weights)


def load(weights, head=None, classes=None, scan=False, remat=False,
         dtype=jnp.float32, name='', shardings=None,
         param_dtype=jnp.float32):
  """Reads a base.

  Args:
    weights: As above.
    head: What the model's attribute `head` is to be.
    classes: Outputs of a new head; None keeps the stored one.
    scan, remat, dtype: Of the model.
    name: Module of peftjax.models that is expected; '': any.
    shardings: As of `huggingface.load`: a folder's tensors go to the devices
      as they are read, each device's part by itself. A weight file, which is
      small, is read whole all the same. None: params stay on the host.
    param_dtype: Of the params.

  Raises:
    FileNotFoundError, ValueError: as `load_weights` and `huggingface.load`; a
      model of another module than `name`.
  """
  if is_folder(weights):
    folder = find_folder(weights)
    model, params, config = huggingface.load(
        folder, head=head, classes=classes, scan=scan, remat=remat, dtype=dtype,
        param_dtype=param_dtype, shardings=shardings)
  else:
    folder, config = '', read_config(weights)
    model, params = load_weights(
        weights, classes=classes, scan=scan, head=head)
    more = dict(dtype=jnp.dtype(dtype), **(dict(remat=True) if remat else {}))
    for key in more:
      if key not in model.__dataclass_fields__:
        raise ValueError(
            f'{type(model).__name__} of {weights!r} has no {key!r} to set')
    model = model.clone(**more)
    params = jax.tree.map(lambda v: v.astype(param_dtype), params)
  _check_name(name, model, weights)
  if shardings is None or not folder:
    params = jax.tree.map(np.asarray, params)
  return Base(model, params, config, folder, trees.fingerprint(params))


def shapes(weights, head=None, classes=None, scan=False, remat=False,
           dtype=jnp.float32, name='', param_dtype=jnp.float32):
  """As `load`, but params are ShapeDtypeStructs and there is no fingerprint.

  Of a folder or a hub id config.json is read and no weights, which need not be
  there.
  """
  if not is_folder(weights):
    base = load(weights, head, classes, scan, remat, dtype, name,
                param_dtype=param_dtype)
    return base._replace(params=jax.eval_shape(lambda: base.params),
                         fingerprint='')
  folder = find_folder(weights, patterns=('*.json',))
  model, params, config = huggingface.shapes(
      folder, head, classes, scan, remat, dtype, param_dtype)
  _check_name(name, model, weights)
  return Base(model, params, config, folder, '')


def _check_name(name, model, weights):
  """Raises where a model is of another module than it should be."""
  module = type(model).__module__.rsplit('.', 1)[-1]
  if name and name != module:
    raise ValueError(f'model.name={name!r}, but the weights {weights!r} are of '
                     f'{module!r}: expected model.name={module!r} or ""')


def image_size(base):
  """(H, W) in pixels of the images that a base was trained on."""
  if 'input' in base.config:  # of a weight file
    return tuple(base.config['input'][1:3])
  return families.image_size(base.config)


def positions(base):
  """How many tokens a base can read; None: no limit (relative positions)."""
  model = base.model
  if hasattr(model, 'positions'):  # encoders
    first = 0 if model.padding is None else model.padding + 1
    return model.positions - first
  if getattr(model, 'position', '') == 'learned':
    return model.max_positions
  return base.config.get('max_position_embeddings')  # what it was trained on
