"""Checkpoints of CLIP, both towers in one file: names and settings."""

import math

from peftjax.interop.tensors import Tensor
from peftjax.method import nearest
from peftjax.models.clip import Clip, Sizes
from peftjax.models.layers import ACTIVATIONS

MODEL_TYPES = ('clip',)
IGNORED = (r'\.embeddings\.position_ids$',)

# Settings of a tower by our name: key.
_SIZES = dict(width='hidden_size', depth='num_hidden_layers',
              heads='num_attention_heads', mlp_dim='intermediate_size',
              act='hidden_act', eps='layer_norm_eps')
# What a key has where a config leaves it out.
_TEXT = dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8,
             intermediate_size=2048, hidden_act='quick_gelu',
             layer_norm_eps=1e-5, vocab_size=49408, max_position_embeddings=77,
             eos_token_id=49407)
_IMAGE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
              intermediate_size=3072, hidden_act='quick_gelu',
              layer_norm_eps=1e-5, image_size=224, patch_size=32,
              num_channels=3)
# Checkpoints made before the end-of-text token was put right name this one.
_WRONG_END = 2

_TOWERS = dict(text_tower='text_model', image_tower='vision_model')
_BLOCK = {
    'attn/query': 'self_attn.q_proj',
    'attn/key': 'self_attn.k_proj',
    'attn/value': 'self_attn.v_proj',
    'attn/out': 'self_attn.out_proj',
    'norm1': 'layer_norm1',
    'mlp/up': 'mlp.fc1',
    'mlp/down': 'mlp.fc2',
    'norm2': 'layer_norm2',
}


def _tower(config, name, defaults):
  """Settings of a tower; the older key '<name>_dict' replaces all of them."""
  given = config.get(f'{name}_dict')
  if given is None:
    given = config.get(name) or {}
  return {**defaults, **{k: v for k, v in given.items() if k in defaults}}


def _sizes(tower, name):
  act = tower['hidden_act']
  if act not in ACTIVATIONS:
    raise ValueError(f'{name}.hidden_act is {act!r}: expected one of '
                     f'{sorted(ACTIVATIONS)}{nearest(str(act), ACTIVATIONS)}')
  return Sizes(**{ours: tower[key] for ours, key in _SIZES.items()})


def build(config, *, head=None, classes=None, **options):
  """Settings of a checkpoint (the dict of config.json) -> Clip.

  Raises:
    ValueError: a setting that Clip has no counterpart of.
  """
  if head is not None or classes is not None:
    raise ValueError(f'head={head!r}, classes={classes!r}: CLIP has no heads, '
                     'expected None; classify with texts of the class names')
  text = _tower(config, 'text_config', _TEXT)
  image = _tower(config, 'vision_config', _IMAGE)
  if image['num_channels'] != 3:
    raise ValueError('vision_config.num_channels is '
                     f'{image["num_channels"]!r}: only 3 is supported')
  for tower, name, keys in (
      (text, 'text_config', ('eos_token_id',)),
      (image, 'vision_config', ('image_size', 'patch_size'))):
    for key in keys:
      if not isinstance(tower[key], int):
        raise ValueError(f'{name}.{key} is {tower[key]!r}: only one whole '
                         'number is supported')
  end = text['eos_token_id']
  return Clip(
      _sizes(text, 'text_config'), _sizes(image, 'vision_config'),
      vocab=text['vocab_size'], positions=text['max_position_embeddings'],
      end=None if end == _WRONG_END else end, image_side=image['image_size'],
      patch=image['patch_size'], dim=config.get('projection_dim', 512),
      scale_init=config.get('logit_scale_init_value', math.log(1 / 0.07)),
      **options)


def _layer(ours, theirs):
  """Leaves of one dense layer or norm with its bias."""
  weight = Tensor(f'{theirs}.weight', 'linear')
  if 'norm' in ours:
    weight = Tensor(f'{theirs}.weight')
  return {f'{ours}/{"scale" if "norm" in ours else "kernel"}': weight,
          f'{ours}/bias': Tensor(f'{theirs}.bias')}


def names(model, model_type):
  """{our unrolled path: Tensor} of every parameter of the model."""
  del model_type
  text, image = 'text_model.embeddings', 'vision_model.embeddings'
  out = {
      'logit_scale': Tensor('logit_scale'),
      'text_projection/kernel': Tensor('text_projection.weight', 'linear'),
      'image_projection/kernel': Tensor('visual_projection.weight', 'linear'),
      'text_tower/token_embed/embedding': Tensor(
          f'{text}.token_embedding.weight'),
      'text_tower/position_embed/embedding': Tensor(
          f'{text}.position_embedding.weight'),
      'image_tower/class_token': Tensor(f'{image}.class_embedding'),
      'image_tower/patches/kernel': Tensor(
          f'{image}.patch_embedding.weight', 'conv'),
      'image_tower/position_embed/embedding': Tensor(
          f'{image}.position_embedding.weight'),
  }
  out |= _layer('text_tower/norm', 'text_model.final_layer_norm')
  # The checkpoints spell it so.
  out |= _layer('image_tower/first_norm', 'vision_model.pre_layrnorm')
  out |= _layer('image_tower/norm', 'vision_model.post_layernorm')
  depths = dict(text_tower=Sizes(*model.text_sizes).depth,
                image_tower=Sizes(*model.image_sizes).depth)
  for tower, theirs in _TOWERS.items():
    for i in range(depths[tower]):
      for layer, other in _BLOCK.items():
        out |= _layer(f'{tower}/block_{i}/{layer}',
                      f'{theirs}.encoder.layers.{i}.{other}')
  return out


def prefix(model_type):
  """Of the body's tensors in files that hold a head: none."""
  del model_type
  return ''


def export(model, model_type):
  """The dict of config.json for a model, such that transformers opens it."""
  del model_type
  text, image = ({key: getattr(Sizes(*sizes), ours)
                  for ours, key in _SIZES.items()}
                 for sizes in (model.text_sizes, model.image_sizes))
  text |= dict(model_type='clip_text_model', vocab_size=model.vocab,
               max_position_embeddings=model.positions,
               projection_dim=model.dim,
               eos_token_id=_WRONG_END if model.end is None else model.end)
  image |= dict(model_type='clip_vision_model', image_size=model.image_side,
                patch_size=model.patch, num_channels=3,
                projection_dim=model.dim)
  return dict(architectures=['CLIPModel'], text_config=text,
              vision_config=image, text_config_dict=None,
              vision_config_dict=None, projection_dim=model.dim,
              logit_scale_init_value=model.scale_init)
