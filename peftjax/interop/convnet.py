"""Checkpoints of ResNet and ConvNeXt, and the int8 file of MobileNetV2.

A batch norm with fixed statistics is an affine map of channels, and one leaf of
ours comes from several stored tensors. So this family has, beside the names, a
pair of functions that `huggingface` calls:

  before_load   scale = weight / sqrt(running_var + eps)
                bias = bias - running_mean * scale
  after_save    weight = scale, bias = bias, running_mean = 0, running_var = 1 -
                eps, num_batches_tracked = 0: the same map in transformers,
                where it is in eval mode

A ConvNeXt saved with head None has no norm after the mean, which transformers'
ConvNextModel then makes anew; head 'pool' keeps it.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import trees
from peftjax.interop.tensors import Tensor
from peftjax.method import nearest
from peftjax.models.convnet import ConvNeXt, needs_shortcut, ResNet
from peftjax.models.layers import ACTIVATIONS
from peftjax.models.mobilenet import MobileNetV2

_CLASS = {'resnet': 'ResNet', 'convnext': 'ConvNext'}
MODEL_TYPES = tuple(_CLASS)
IGNORED = ()

EPS = 1e-5  # torch's for batch norm; ResNet's config cannot change it.


def build(config, *, head=None, classes=None, scan=False, **options):
  """Settings of a checkpoint (the dict of config.json) -> ResNet or ConvNeXt.

  classes: None: as many as the checkpoint has labels, 2 if it does not say.

  Raises:
    ValueError: a setting that the model has no counterpart of, or scan.
  """
  if scan:
    raise ValueError('scan=True: blocks of a convolutional network differ in '
                     'shape and have no scanned form; use scan=False')
  if config.get('num_channels', 3) != 3:
    raise ValueError(f"num_channels is {config['num_channels']}: only 3 is "
                     'supported')
  resnet = config['model_type'] == 'resnet'
  act = config.get('hidden_act', 'relu' if resnet else 'gelu')
  if act not in ACTIVATIONS:
    raise ValueError(f'hidden_act is {act!r}: expected one of '
                     f'{sorted(ACTIVATIONS)}{nearest(act, ACTIVATIONS)}')
  labels = config.get('id2label') or range(config.get('num_labels', 2))
  args = dict(act=act, head=head, **options,
              classes=len(labels) if classes is None else classes)
  widths, depths = (config.get(k, d) for k, d in (
      ('hidden_sizes', (256, 512, 1024, 2048) if resnet else (
          96, 192, 384, 768)),
      ('depths', (3, 4, 6, 3) if resnet else (3, 3, 9, 3))))
  if len(widths) != len(depths):
    raise ValueError(f'hidden_sizes {widths} and depths {depths}: expected as '
                     'many of the one as of the other')
  args |= dict(widths=tuple(widths), depths=tuple(depths))
  if resnet:
    kind = config.get('layer_type', 'bottleneck')
    if kind not in ('basic', 'bottleneck'):
      raise ValueError(f"layer_type is {kind!r}: expected 'basic' or "
                       "'bottleneck'")
    return ResNet(
        stem=config.get('embedding_size', 64), bottleneck=kind == 'bottleneck',
        stride_first=config.get('downsample_in_first_stage', False),
        early=config.get('downsample_in_bottleneck', False), **args)
  patch = config.get('patch_size', 4)
  if not isinstance(patch, int):
    raise ValueError(f'patch_size is {patch}: expected one number')
  if config.get('num_stages', len(widths)) != len(widths):
    raise ValueError(f"num_stages is {config['num_stages']}: expected the "
                     f'number of hidden_sizes, {len(widths)}')
  start = config.get('layer_scale_init_value', 1e-6)
  return ConvNeXt(patch=patch, eps=config.get('layer_norm_eps', 1e-12),
                  layer_scale=start if start > 0 else None, **args)


def names(model, model_type):
  """{our path: Tensor} of every parameter of the model."""
  return (_resnet if model_type == 'resnet' else _convnext)(model)


def _resnet(model):
  out = _conv('stem', 'embedder.embedder')
  layers = ('down', 'conv', 'up') if model.bottleneck else ('conv1', 'conv2')
  for ours, *shape in model.plan():
    _, i, _, j = ours.split('_')
    theirs = f'encoder.stages.{i}.layers.{j}'
    for n, layer in enumerate(layers):
      out |= _conv(f'{ours}/{layer}', f'{theirs}.layer.{n}')
    if needs_shortcut(*shape):
      out |= _conv(f'{ours}/shortcut', f'{theirs}.shortcut')
  return out | _head(model, '/classifier.1')


def _conv(ours, theirs):
  """Leaves of a convolution without bias and its norm."""
  return {f'{ours}/kernel': Tensor(f'{theirs}.convolution.weight', 'conv'),
          f'{ours}_norm/scale': Tensor(f'{theirs}.normalization.weight'),
          f'{ours}_norm/bias': Tensor(f'{theirs}.normalization.bias')}


def _convnext(model):
  out = _layer('patch', 'embeddings.patch_embeddings', 'conv')
  out |= _layer('patch_norm', 'embeddings.layernorm')
  for i, depth in enumerate(model.depths):
    stage = f'encoder.stages.{i}'
    if i:
      out |= _layer(f'reduce_{i}/norm', f'{stage}.downsampling_layer.0')
      out |= _layer(f'reduce_{i}/conv', f'{stage}.downsampling_layer.1', 'conv')
    for j in range(depth):
      ours, theirs = f'stage_{i}_layer_{j}', f'{stage}.layers.{j}'
      out |= _layer(f'{ours}/depthwise', f'{theirs}.dwconv', 'conv')
      out |= _layer(f'{ours}/norm', f'{theirs}.layernorm')
      out |= _layer(f'{ours}/up', f'{theirs}.pwconv1', 'linear')
      out |= _layer(f'{ours}/down', f'{theirs}.pwconv2', 'linear')
      if model.layer_scale is not None:
        out[f'{ours}/scale/scale'] = Tensor(f'{theirs}.layer_scale_parameter')
  if model.head is not None:
    out |= _layer('norm', 'layernorm')
  return out | _head(model, '/classifier')


def _layer(ours, theirs, kind='same'):
  """Leaves of one layer with a bias; kind 'same' is a norm's."""
  weight = 'scale' if kind == 'same' else 'kernel'
  return {f'{ours}/{weight}': Tensor(f'{theirs}.weight', kind),
          f'{ours}/bias': Tensor(f'{theirs}.bias')}


def _head(model, theirs):
  return _layer('head', theirs, 'linear') if model.head == 'classify' else {}


def ignored(model, model_type):
  """Regexes of stored names that the model does not read."""
  # ConvNeXt's norm follows the mean, which only a head or 'pool' takes.
  bare = model_type == 'convnext' and model.head is None
  return IGNORED + ((r'^layernorm\.',) if bare else ())


def prefix(model_type):
  """Of the body's tensors in files that hold a head."""
  return f'{model_type}.'


def before_load(read, stored, config):
  """Folds the statistics of batch norms into weight and bias.

  Args:
    read: f(name) -> stored tensor.
    stored: Names of all stored tensors.
    config: Not used.

  Returns:
    ({name: array} in float32, names of the statistics that went into it).

  Raises:
    ValueError: a norm of which a tensor is missing.
  """
  del config
  out, used = {}, set()
  for name in sorted(stored):
    norm, _, leaf = name.rpartition('.')
    if leaf != 'running_var':
      continue
    parts = {n: f'{norm}.{n}' for n in (
        'weight', 'bias', 'running_mean', 'running_var')}
    missing = [n for n in parts.values() if n not in stored]
    if missing:
      raise ValueError(f'batch norm {norm!r} lacks {missing}')
    # In float64: a small variance makes a large scale, and the bias is a
    # difference.
    weight, bias, mean, var = (
        np.asarray(read(n)).astype(np.float64) for n in parts.values())
    scale = weight / np.sqrt(var + EPS)
    out[parts['weight']] = scale.astype(np.float32)
    out[parts['bias']] = (bias - mean * scale).astype(np.float32)
    used |= {parts['running_mean'], parts['running_var'],
             f'{norm}.num_batches_tracked'} & stored
  return out, used


def after_save(tensors, model, config):
  """Adds the statistics that make transformers' batch norms the same map."""
  del model, config
  out = dict(tensors)
  for name, scale in tensors.items():
    norm, _, leaf = name.rpartition('.')
    if leaf == 'weight' and norm.endswith('normalization'):
      out[f'{norm}.running_mean'] = np.zeros_like(scale)
      out[f'{norm}.running_var'] = np.full_like(scale, 1 - EPS)
      out[f'{norm}.num_batches_tracked'] = np.zeros((), np.int64)
  return out


def export(model, model_type):
  """The dict of config.json for a model, such that transformers opens it."""
  ending = 'ForImageClassification' if model.head == 'classify' else 'Model'
  config = dict(
      model_type=model_type, architectures=[_CLASS[model_type] + ending],
      num_channels=3, hidden_sizes=list(model.widths),
      depths=list(model.depths), hidden_act=model.act)
  if model_type == 'resnet':
    config |= dict(
        embedding_size=model.stem,
        layer_type='bottleneck' if model.bottleneck else 'basic',
        downsample_in_first_stage=model.stride_first,
        downsample_in_bottleneck=model.early)
  else:
    config |= dict(
        num_stages=len(model.widths), patch_size=model.patch,
        layer_norm_eps=model.eps,
        layer_scale_init_value=model.layer_scale or 0.)
  if model.head == 'classify':
    labels = {f'LABEL_{i}': i for i in range(model.classes)}
    config |= dict(label2id=labels, id2label={
        str(i): name for name, i in labels.items()})
  return config


# ------------------------------------------------------------ MobileNetV2


def load_mobilenet(path, head='classify', classes=None, **options):
  """Reads the int8 file of MobileNetV2, width 1 -> (model, params).

  The file is an npz of `<layer>.w_int8` [kh, kw, c_in, c_out] (of a depthwise
  one c_in is 1), a scale an output channel, `<layer>.scale`, and a float bias,
  `<layer>.b`, with batch norm folded in. Images are pixel / 127.5 - 1; output 0
  of the 1001 is background.

  Args:
    path: The npz file.
    head: As in `MobileNetV2`.
    classes: Give it a new head of so many outputs, which starts at zero.
    **options: Other attributes of `MobileNetV2`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: no npz, or arrays that are missing, left over or of another
      shape than the model's.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(f'no weight file {path!r}')
  try:
    with np.load(path) as z:
      stored = {n: z[n] for n in z.files}
  except Exception as e:
    raise ValueError(f'{path} ({os.path.getsize(path)} bytes) is no npz file: '
                     f'{e}') from e
  model = MobileNetV2(head=head, classes=1001 if classes is None else classes,
                      **options)
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = trees.flatten(jax.eval_shape(
      model.init, jax.random.key(0), x)['params'])
  params, wrong, used = {}, [], {
      n for n in stored if n.startswith('classifier.')}
  for leaf, shape in ((n, s.shape) for n, s in shapes.items()):
    ours, _, kind = leaf.rpartition('/')
    if ours == 'head' and classes is not None:
      params[leaf] = jnp.zeros(shape)
      continue
    theirs = _mobilenet_layer(ours)
    parts = ['b'] if kind == 'bias' else ['w_int8', 'scale']
    parts = [f'{theirs}.{p}' for p in parts]
    used |= set(parts)
    missing = [n for n in parts if n not in stored]
    if missing:
      wrong += [f'missing {n}' for n in missing]
      continue
    value = stored[parts[0]]
    if kind == 'kernel':
      value = value * stored[parts[1]]
      value = value[0, 0] if ours == 'head' else value
    if value.shape != shape:
      wrong.append(f'{parts[0]} {stored[parts[0]].shape}, expected {shape}')
    params[leaf] = jnp.asarray(value, jnp.float32)
  wrong += [f'left over {n} {stored[n].shape}'
            for n in sorted(set(stored) - used)]
  if wrong:
    raise ValueError(f'{path} does not fit MobileNetV2:\n  ' +
                     '\n  '.join(wrong))
  return model, trees.unflatten(params)


def _mobilenet_layer(ours):
  """Our path of a layer -> its name in the file."""
  name, _, inner = ours.partition('/')
  if not inner:
    return {'last': 'head', 'head': 'classifier'}.get(name, name)
  inner = {'up': 'expand', 'depthwise': 'dw', 'down': 'project'}[inner]
  return f'block{name.removeprefix("layer_")}.{inner}'
