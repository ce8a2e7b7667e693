"""The two files of a PEFT adapter: read with distrust, written whole.

  adapter_config.json          settings; peft_type says of which kind
  adapter_model.safetensors    base_model.model.<module>.<suffix>: a tensor

Pickles (adapter_model.bin) are refused and never opened.
"""

import importlib
import json
import os
import pkgutil

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from peftjax.artifact import replace_folder
from peftjax.method import nearest

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
# Whose conventions are written. PEFT changed the Neumann series of OFT in 0.18.
VERSION = '0.21.0'
CARD = 'README.md'  # which PEFT writes beside them

# Keys of every kind, which are read where they matter.
COMMON = ('peft_type', 'base_model_name_or_path', 'task_type', 'inference_mode',
          'revision', 'auto_mapping', 'peft_version', 'target_modules',
          'exclude_modules', 'modules_to_save', 'bias',
          'trainable_token_indices')
# They say which modules were chosen, or how training went, and change nothing
# about a trained adapter: the tensors say which modules there are.
SPENT = ('layers_to_transform', 'layers_pattern', 'eva_config', 'corda_config',
         'lora_ga_config', 'megatron_core', 'runtime_config',
         'ephemeral_gpu_offload', 'qalora_group_size', 'tokenizer_name_or_path',
         'tokenizer_kwargs', 'ensure_weight_tying')


def types():
  """{peft_type: module of types/}."""
  package = importlib.import_module('peftjax.interop.peft.types')
  return {m.name.upper(): importlib.import_module(
      f'{package.__name__}.{m.name}')
          for m in pkgutil.iter_modules(package.__path__)}


# ------------------------------------------------------------------------ read
def read(folder):
  """(config, {full name: array}, metadata) of a PEFT adapter folder.

  Raises:
    FileNotFoundError: no folder, or no config in it.
    ValueError: a file that is damaged or a pickle, a peft_type that is not
      known, a setting that is not known, or tensors that are not finite.
  """
  folder = os.fspath(folder)
  if not os.path.isdir(folder):
    raise FileNotFoundError(
        f'{folder!r}: expected a folder with {CONFIG} and {TENSORS}; adapters '
        'on the hub are downloaded first (huggingface_hub.snapshot_download)')
  here = sorted(os.listdir(folder))
  path = os.path.join(folder, TENSORS)
  if TENSORS not in here:
    pickles = [n for n in here if n.endswith(('.bin', '.pt', '.pth', '.pkl'))]
    if pickles:
      raise ValueError(
          f'{folder} holds {", ".join(pickles)}: pickles can run code and are '
          f'never read; save it again with safe_serialization=True ({TENSORS})')
  for name in (CONFIG, TENSORS):
    if name not in here:
      raise FileNotFoundError(f'{folder} has no {name}; it holds {here}')
  config = _config(os.path.join(folder, CONFIG))
  try:
    with safetensors.safe_open(path, 'numpy') as f:
      metadata = dict(f.metadata() or {})
      tensors = {name: f.get_tensor(name) for name in f.keys()}
  except (safetensors.SafetensorError, KeyError, TypeError) as e:
    raise ValueError(f'{path} is no complete safetensors file: {e}') from e
  if not tensors:
    raise ValueError(f'{path} holds no tensors')
  out = {}
  for name, value in tensors.items():
    # What PEFT stores in halves is exact in float32, which theta is kept in.
    if value.dtype in (np.float16, ml_dtypes.bfloat16):
      value = value.astype(np.float32)
    if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
      raise ValueError(f'{path}: {name} holds NaN or infinity')
    out[name] = value
  return config, out, metadata


def _config(path):
  try:
    with open(path, encoding='utf-8') as f:
      config = json.load(f)
  except ValueError as e:
    raise ValueError(f'{path} is not JSON: {e}') from e
  known = types()
  kind = config.get('peft_type') if isinstance(config, dict) else None
  if kind not in known:
    raise ValueError(f'{path}: peft_type {kind!r} is not supported'
                     f'{nearest(str(kind), known)}')
  module = known[kind]
  for key, value in config.items():
    if key in module.CONFIG or key in COMMON or key in SPENT:
      continue
    if value in (None, False, '', 0, 0.0) or value == {} or value == []:
      continue  # switched off
    raise ValueError(
        f'{path}: {key}={value!r} is a setting of {kind} that is not supported '
        f'here; it may be newer{nearest(key, (*module.CONFIG, *COMMON))}')
  return {**module.CONFIG, **{k: v for k, v in config.items()
                              if v is not None or k not in module.CONFIG}}


def grouped(tensors, suffixes):
  """Tensors by module: ({module: {suffix: array}}, {whole name: array}).

  The second are what no suffix fits: whole modules, biases, and what prompts
  hold. Prefixes of PEFT are taken off.
  """
  modules, rest = {}, {}
  for name, value in tensors.items():
    bare = name
    for prefix in ('base_model.model.', 'base_model.'):
      if name.startswith(prefix):
        bare = name.removeprefix(prefix)
        break
    for suffix in suffixes:
      if bare.endswith(f'.{suffix}'):
        modules.setdefault(bare.removesuffix(f'.{suffix}'), {})[suffix] = value
        break
    else:
      rest[bare] = value
  return modules, rest


# ----------------------------------------------------------------------- write
def write(folder, config, tensors, metadata):
  """Writes an adapter folder; one that is there is replaced as a whole.

  Args:
    folder: Where; it may hold an adapter of PEFT and nothing else.
    config: Of adapter_config.json.
    tensors: {full name: array}.
    metadata: {str: str} beside the tensors.

  Raises:
    ValueError: a folder that holds something else, or numbers not finite.
  """
  folder = os.path.realpath(folder)
  if os.path.lexists(folder):
    if not os.path.isdir(folder):
      raise ValueError(f'{folder!r} exists and is no folder; choose another')
    other = sorted(set(os.listdir(folder)) - {CONFIG, TENSORS, CARD})
    if other:
      raise ValueError(f'{folder!r} holds files that are no PEFT adapter\'s '
                       f'({", ".join(other[:5])}); choose another folder')
  for name, value in tensors.items():
    if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
      raise ValueError(f'{name} holds NaN or infinity; nothing was written')
  text = json.dumps(config, indent=2, sort_keys=True) + '\n'
  payload = safetensors.numpy.save(tensors, {'format': 'pt', **metadata})
  replace_folder(folder, {CONFIG: text.encode(), TENSORS: payload})
