"""Writes Hugging Face checkpoint folders."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from peftjax import trees
from peftjax.interop.families import family
from peftjax.interop.tensors import to_stored
from peftjax.version import VERSION

# Tokenizer and preprocessor files, carried along by `save`.
COMPANIONS = ('tokenizer.json', 'tokenizer_config.json', 'vocab.txt',
              'special_tokens_map.json', 'vocab.json', 'merges.txt',
              'tokenizer.model', 'spiece.model', 'chat_template.jinja',
              'preprocessor_config.json', 'generation_config.json')


def save(path, model, params, model_type=None, like=None, companions=None,
         dtype=jnp.float32, shard_bytes=5 * 2**30, overwrite=False):
  """Writes config.json and safetensors that transformers opens.

  Args:
    path: Folder to make.
    model: One of peftjax.models.
    params: Its params tree, unrolled or scanned, folded: without adapters.
    model_type: As in config.json; by default that of `like`.
    like: config.json of the checkpoint that the model came from, whose other
      settings are kept.
    companions: Folder whose tokenizer and preprocessor files are copied.
    dtype: Of the stored tensors.
    shard_bytes: Largest size of a file; more are split, with an index.
    overwrite: Replace a folder that is there.

  Raises:
    FileExistsError: the folder holds something and overwrite is False.
    ValueError: a leaf that the model does not have, lacks or that is not
      finite, or no model_type.
  """
  model_type = model_type or (like or {}).get('model_type')
  if model_type is None:
    raise ValueError('model_type is not given, nor a `like` that names it')
  module = family(model_type)
  if os.path.isdir(path) and os.listdir(path) and not overwrite:
    raise FileExistsError(f'{path} holds {sorted(os.listdir(path))[:5]}; give '
                          'overwrite=True, or another path')
  if getattr(model, 'scan', False):
    model, params = model.clone(scan=False), trees.unstack(params)
  flat = trees.flatten(params)
  entries = module.names(model, model_type)
  if set(flat) != set(entries):
    raise ValueError(
        'params are not those of the model: '
        f'missing {sorted(set(entries) - set(flat))}, '
        f'left over {sorted(set(flat) - set(entries))}')
  config = {**(like or {}), **module.export(model, model_type),
            'model_type': model_type, 'dtype': str(jnp.dtype(dtype)),
            'peftjax_version': VERSION}
  if like and len(like.get('id2label') or ()) == len(
      config.get('id2label') or ()):  # the names of the labels, not LABEL_0
    config |= {k: like[k] for k in ('id2label', 'label2id') if k in like}
  config.pop('torch_dtype', None)  # the same key's older name
  headed = getattr(model, 'head', None) not in (None, 'pool')
  prefix = module.prefix(model_type) if headed else ''
  tensors = {}
  for p, tensor in entries.items():
    value = np.asarray(jax.device_get(flat[p]))
    for i, name in enumerate(tensor.names):
      one = to_stored(tensor.kind, value[i] if tensor.stacked else value,
                      tensor.shape or None)
      stored = np.asarray(one, dtype, order='C')
      if not np.isfinite(stored.astype(np.float32)).all():
        raise ValueError(f'{p}: not finite, or too large for {dtype}')
      tensors[name] = stored
  if hasattr(module, 'after_save'):
    tensors = module.after_save(tensors, model, config)
  tensors = {n[1:] if n.startswith('/') else prefix + n: v
             for n, v in tensors.items()}
  part = f'{os.fspath(path).rstrip("/")}.{os.getpid()}.part'
  shutil.rmtree(part, ignore_errors=True)
  os.makedirs(part)
  try:
    with open(os.path.join(part, 'config.json'), 'w', encoding='utf-8') as f:
      json.dump(config, f, indent=2, sort_keys=True)
      f.write('\n')
    _write(part, tensors, shard_bytes)
    for name in COMPANIONS if companions else ():
      there = os.path.join(companions, name)
      if os.path.isfile(there):
        shutil.copy(there, part)
    if os.path.isdir(path):
      shutil.rmtree(path)
    os.replace(part, path)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _write(folder, tensors, shard_bytes):
  """One file, or several and an index, none above shard_bytes if it can be."""
  shards, size = [{}], 0
  for name, value in tensors.items():
    if size + value.nbytes > shard_bytes and shards[-1]:
      shards.append({})
      size = 0
    shards[-1][name] = value
    size += value.nbytes
  total = sum(v.nbytes for v in tensors.values())
  where = {}
  for i, shard in enumerate(shards, 1):
    file = 'model.safetensors' if len(shards) == 1 else (
        f'model-{i:05}-of-{len(shards):05}.safetensors')
    path = os.path.join(folder, file)
    safetensors.numpy.save_file(shard, path, {'format': 'pt'})
    os.chmod(path, 0o644)  # as its config; safetensors makes it private
    where |= {n: file for n in shard}
  if len(shards) > 1:
    with open(os.path.join(folder, 'model.safetensors.index.json'), 'w',
              encoding='utf-8') as f:
      json.dump(dict(metadata=dict(total_size=total), weight_map=where), f,
                indent=1)
