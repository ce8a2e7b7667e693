"""Checkpoints of ViT, DeiT and DINOv2 (with or without registers).

DINOv2's gate and up projections are one tensor in the files and one layer here.
What only pretraining needs is left alone: mask tokens, ViT's and DeiT's
poolers, the decoders of masked image modelling. Saved DINOv2s get the mask
token that transformers expects, as zeros; a ViT or DeiT saved without a head
has no pooler, which transformers' ViTModel makes anew unless it is told
add_pooling_layer=False.
"""

import numpy as np

from peftjax.interop.tensors import Tensor
from peftjax.method import nearest
from peftjax.models.layers import ACTIVATIONS
from peftjax.models.vit import ViT

# model_type -> class name in `architectures`.
_CLASS = {'vit': 'ViT', 'deit': 'DeiT', 'dinov2': 'Dinov2',
          'dinov2_with_registers': 'Dinov2WithRegisters'}
MODEL_TYPES = tuple(_CLASS)

IGNORED = (r'^pooler\.', r'embeddings\.mask_token$', r'^decoder\.')

_SHARED = {'attn/query': 'attention.attention.query',
           'attn/key': 'attention.attention.key',
           'attn/value': 'attention.attention.value',
           'attn/out': 'attention.output.dense'}
_VIT = {**_SHARED, 'norm1': 'layernorm_before', 'norm2': 'layernorm_after',
        'mlp/up': 'intermediate.dense', 'mlp/down': 'output.dense'}
_DINO = {**_SHARED, 'norm1': 'norm1', 'norm2': 'norm2',
         'mlp/up': 'mlp.fc1', 'mlp/down': 'mlp.fc2'}
_GATED = {**{k: v for k, v in _DINO.items() if k != 'mlp/up'},
          'mlp/gate_up': 'mlp.weights_in', 'mlp/down': 'mlp.weights_out'}


def build(config, *, head=None, classes=None, **options):
  """Settings of a checkpoint (the dict of config.json) -> ViT.

  classes: None: as many as the checkpoint has labels, 2 if it does not say.

  Raises:
    ValueError: a setting that ViT has no counterpart of.
  """
  dino = config['model_type'].startswith('dinov2')
  width = config.get('hidden_size', 768)
  heads = config.get('num_attention_heads', 12)
  if config.get('num_channels', 3) != 3:
    raise ValueError(f"num_channels is {config['num_channels']}: only 3 is "
                     'supported')
  if config.get('head_dim', width // heads) != width // heads:
    raise ValueError(f"head_dim is {config['head_dim']}: expected hidden_size /"
                     f' num_attention_heads = {width // heads}')
  args = dict(
      width=width, depth=config.get('num_hidden_layers', 12), heads=heads,
      patch=_pair(config, 'patch_size',
                  14 if config['model_type'] == 'dinov2' else 16)[0],
      image=_pair(config, 'image_size', 224), act=config.get(
          'hidden_act', 'gelu'), qkv_bias=config.get('qkv_bias', True),
      eps=config.get('layer_norm_eps', 1e-6 if dino else 1e-12),
      tokens=('cls',), pool='class')
  if args['act'] not in ACTIVATIONS:
    raise ValueError(f'hidden_act is {args["act"]!r}: expected one of '
                     f'{sorted(ACTIVATIONS)}'
                     f'{nearest(args["act"], ACTIVATIONS)}')
  if dino:
    ratio, gated = config.get('mlp_ratio', 4), config.get('use_swiglu_ffn')
    args |= dict(pool='class_mean', gated=bool(gated),
                 mlp_dim=_mlp_dim(width, ratio, gated),
                 layer_scale=float(config.get('layerscale_value', 1.)))
    if config['model_type'] == 'dinov2_with_registers':
      args['registers'] = config.get('num_register_tokens', 4)
  else:
    args['mlp_dim'] = config.get('intermediate_size', 3072)
  if config['model_type'] == 'deit':
    args['tokens'] = ('cls', 'distilled')
    if (config.get('architectures') or [''])[0].endswith('WithTeacher'):
      args['pool'] = 'pair'
  labels = config.get('id2label') or range(config.get('num_labels', 2))
  return ViT(**args, head=head, **options,
             classes=len(labels) if classes is None else classes)


def _pair(config, key, default):
  """A size of config.json, one number or two -> (height, width)."""
  value = config.get(key, default)
  pair = (value, value) if isinstance(value, int) else tuple(value)
  if len(pair) != 2 or key == 'patch_size' and pair[0] != pair[1]:
    raise ValueError(f'{key} is {value}: expected one number' + (
        '' if key == 'patch_size' else ', or height and width'))
  return pair


def _mlp_dim(width, ratio, gated):
  """DINOv2's hidden width: two thirds, in eights, where it is gated."""
  dim = int(width * ratio)
  return (int(dim * 2 / 3) + 7) // 8 * 8 if gated else dim


def names(model, model_type):
  """{our unrolled path: Tensor} of every parameter of the model."""
  dino = model_type.startswith('dinov2')
  block = (_GATED if model.gated else _DINO) if dino else _VIT
  stored = {'cls': 'cls_token', 'distilled': 'distillation_token',
            'registers': 'register_tokens'}
  tokens = (*model.tokens, *(['registers'] if model.registers else ()))
  out = {t: Tensor(f'embeddings.{stored[t]}') for t in tokens}
  out['pos'] = Tensor('embeddings.position_embeddings')
  patch = 'embeddings.patch_embeddings.projection'
  out['patch/kernel'] = Tensor(f'{patch}.weight', 'conv')
  out['patch/bias'] = Tensor(f'{patch}.bias')
  for i in range(model.depth):
    for ours, theirs in block.items():
      bias = model.qkv_bias or theirs.split('.')[-1] not in (
          'query', 'key', 'value')
      out |= _layer(f'block_{i}/{ours}', f'encoder.layer.{i}.{theirs}', bias)
    if model.layer_scale is not None:
      for n in '12':
        out[f'block_{i}/scale{n}/scale'] = Tensor(
            f'encoder.layer.{i}.layer_scale{n}.lambda1')
  out |= _layer('norm', 'layernorm')
  if model.head == 'classify':
    heads = {'head': '/classifier'} if model.pool != 'pair' else {
        'head/cls': '/cls_classifier',
        'head/distilled': '/distillation_classifier'}
    for ours, theirs in heads.items():
      out |= _layer(ours, theirs)
  return out


def _layer(ours, theirs, bias=True):
  """Leaves of one dense layer or norm."""
  norm = 'norm' in ours
  out = {f'{ours}/{"scale" if norm else "kernel"}': Tensor(
      f'{theirs}.weight', 'same' if norm else 'linear')}
  return out | ({f'{ours}/bias': Tensor(f'{theirs}.bias')} if bias else {})


def prefix(model_type):
  """Of the body's tensors in files that hold a head."""
  return f'{model_type}.'


def after_save(tensors, model, config):
  """Adds the mask token that transformers' DINOv2 has, as zeros."""
  if not config['model_type'].startswith('dinov2'):
    return tensors
  some = tensors['embeddings.cls_token']
  mask = np.zeros((1, model.width), some.dtype)
  return {**tensors, 'embeddings.mask_token': mask}


def export(model, model_type):
  """The dict of config.json for a model, such that transformers opens it.

  Raises:
    ValueError: a model that this model_type has no settings for.
  """
  cls = _CLASS[model_type] + (
      'ForImageClassification' if model.head == 'classify' else 'Model')
  if model.head == 'classify' and model.pool == 'pair':
    cls += 'WithTeacher'
  if model.image is None:
    raise ValueError('image is None: give the model the image size that its '
                     'positions are for')
  high, wide = model.image
  config = dict(
      model_type=model_type, architectures=[cls], hidden_size=model.width,
      num_hidden_layers=model.depth, num_attention_heads=model.heads,
      image_size=high if high == wide else [high, wide],
      patch_size=model.patch, num_channels=3, hidden_act=model.act,
      qkv_bias=model.qkv_bias, layer_norm_eps=model.eps)
  if not model_type.startswith('dinov2'):
    config['intermediate_size'] = model.mlp_dim
  else:
    ratios = [r for r in range(1, 65) if model.mlp_dim == _mlp_dim(
        model.width, r, model.gated)]
    if not ratios:
      raise ValueError(f'mlp_dim {model.mlp_dim}: {model_type} has whole '
                       f'multiples of the width, {model.width}, alone')
    config |= dict(mlp_ratio=ratios[0], use_swiglu_ffn=model.gated,
                   layerscale_value=model.layer_scale)
    if model_type == 'dinov2':
      config['use_mask_token'] = True
    else:
      config['num_register_tokens'] = model.registers
  if model.head == 'classify':
    labels = {f'LABEL_{i}': i for i in range(model.classes)}
    config |= dict(label2id=labels, id2label={
        str(i): name for name, i in labels.items()})
  return config
