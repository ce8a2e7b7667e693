"""Pretrained models, whichever way they are stored.

`load` takes the name or the path of a weight file of this library ('vit_s',
'runs/model.safetensors') or a folder in the layout of the Hugging Face hub.
"""

import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftjax import trees
from peftjax.interop import huggingface
from peftjax.models.weights import load_weights, read_config


class Base(NamedTuple):
  """A pretrained model."""

  model: nn.Module
  params: Any  # numpy arrays
  config: dict  # of the weight file, or config.json
  folder: str  # where its tokenizer and preprocessor are; '' for one file
  fingerprint: str  # of params


def is_folder(weights):
  """Whether `weights` means a Hugging Face folder or hub id."""
  weights = os.fspath(weights)
  return not weights.endswith('.safetensors') and (
      os.sep in weights or os.path.isdir(weights))


def load(weights, head=None, classes=None, scan=False, remat=False,
         dtype=jnp.float32, name=''):
  """Reads a base.

  Args:
    weights: As above.
    head: Of a model in a folder; a weight file has the head it was made with.
    classes: Outputs of a new head; None keeps the stored one.
    scan, remat, dtype: Of the model.
    name: Module of peftjax.models that is expected; '': any.

  Raises:
    FileNotFoundError, ValueError: as `load_weights` and `huggingface.load`; a
      model of another module than `name`.
  """
  if is_folder(weights):
    folder = os.fspath(weights)
    model, params, config = huggingface.load(
        folder, head=head, classes=classes, scan=scan, remat=remat, dtype=dtype)
  else:
    folder, config = '', read_config(weights)
    model, params = load_weights(weights, classes=classes, scan=scan)
    more = dict(dtype=jnp.dtype(dtype), **(dict(remat=True) if remat else {}))
    for key in more:
      if key not in model.__dataclass_fields__:
        raise ValueError(
            f'{type(model).__name__} of {weights!r} has no {key!r} to set')
    model = model.clone(**more)
  module = type(model).__module__.rsplit('.', 1)[-1]
  if name and name != module:
    raise ValueError(f'model.name={name!r}, but the weights {weights!r} are of '
                     f'{module!r}: expected model.name={module!r} or ""')
  params = jax.tree.map(np.asarray, params)
  return Base(model, params, config, folder, trees.fingerprint(params))


def image_side(base):
  """Side in pixels of the images that a base was trained on."""
  config = base.config
  if 'input' in config:
    return config['input'][1]
  side = config.get('image_size') or config.get(
      'vision_config', {}).get('image_size') or 224
  return side if isinstance(side, int) else side[0]


def vocabulary(base):
  """Rows of the table of token vectors."""
  return base.model.vocab


def positions(base):
  """How many tokens a base can read; None: no limit (relative positions)."""
  model = base.model
  if hasattr(model, 'positions'):  # encoders
    first = 0 if model.padding is None else model.padding + 1
    return model.positions - first
  if getattr(model, 'position', '') == 'learned':
    return model.max_positions
  return base.config.get('max_position_embeddings')  # what it was trained on
