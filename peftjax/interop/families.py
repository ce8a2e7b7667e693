"""Which module knows which Hugging Face architecture, and what a config says.

Every family of backbones has a module here that knows its names:

  MODEL_TYPES                    values of config.json's model_type
  build(config, **options)       our model for a config
  names(model, model_type)       {path of a leaf: `tensors.Tensor`}
  prefix(model_type)             what body tensors start with in files with a
                                 head
  IGNORED                        regexes of stored tensors that no model needs;
                                 or a function ignored(model, model_type)
  export(model, model_type)      config.json for a model
  before_load, after_save        optional: leaves computed from many tensors
"""

import importlib
import inspect
import json
import os

import jax
import jax.numpy as jnp

from peftjax.method import nearest

FAMILIES = ('encoder', 'decoder', 'encdec', 'vit', 'clip', 'convnet')

# What the class in config.json's `architectures` ends with -> our head.
_HEADS = (('ForSequenceClassification', 'classify'),
          ('ForImageClassification', 'classify'),
          ('ForImageClassificationWithTeacher', 'classify'),
          ('ForTokenClassification', 'tag'), ('ForMaskedLM', 'mlm'),
          ('ForPreTraining', None), ('ForCausalLM', 'lm'),
          ('LMHeadModel', 'lm'), ('ForConditionalGeneration', 'lm'))


def family(model_type):
  """The module that knows a model_type; an unknown one is a ValueError."""
  known = {}
  for name in FAMILIES:
    module = importlib.import_module(f'peftjax.interop.{name}')
    known |= {t: module for t in module.MODEL_TYPES}
  if model_type not in known:
    raise ValueError(f'config.json: model_type {model_type!r} is not supported'
                     f'{nearest(str(model_type), known)}')
  return known[model_type]


def own_head(config):
  """The head that a checkpoint's first architecture names, or None."""
  for name in (config.get('architectures') or ())[:1]:
    for ending, head in _HEADS:
      if name.endswith(ending):
        return head
  return None


def image_size(config):
  """(H, W) in pixels that config.json names, 224 where it does not."""
  side = config.get('image_size') or config.get('vision_config', {}).get(
      'image_size') or 224
  return (side, side) if isinstance(side, int) else tuple(side)


def example(model, config=None):
  """Example inputs of a backbone as ShapeDtypeStructs, for `describe`.

  Args:
    model: One of peftjax.models.
    config: config.json, where the size of images stands; 224 otherwise.
  """
  config = config or {}
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  kinds = dict(ids=ids, targets=ids, images=jax.ShapeDtypeStruct(
      (1, *image_size(config), config.get('num_channels', 3)), jnp.float32))
  needed = [p.name for p in inspect.signature(model.__call__).parameters.values()
            if p.default is p.empty]
  return tuple(kinds[name] for name in needed)


def read_config(folder):
  """config.json of a folder; errors as in `load`."""
  path = os.path.join(folder, 'config.json')
  if not os.path.isfile(path):
    raise FileNotFoundError(
        f'{folder} has no config.json; it holds {sorted(os.listdir(folder))}')
  try:
    with open(path, encoding='utf-8') as f:
      config = json.load(f)
  except ValueError as e:
    raise ValueError(f'{path} is not JSON: {e}') from e
  if 'model_type' not in config:
    raise ValueError(f"{path} has no 'model_type', only {sorted(config)}")
  return config


def ignored(module, model, model_type):
  """Regexes of stored tensors that a model does not need."""
  if hasattr(module, 'ignored'):
    return tuple(module.ignored(model, model_type))
  return tuple(module.IGNORED)
