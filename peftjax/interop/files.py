"""The safetensors files of a checkpoint folder, read a tensor at a time."""

import contextlib
import json
import os
import re

import safetensors

from peftjax.method import nearest

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
_PACKAGED = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'weights')
# What is fetched of a repository: no pickles, no code.
PATTERNS = ('*.json', 'model*.safetensors', '*.model', '*.txt', '*.jinja')


def packaged(name):
  """The folder of a checkpoint that comes with the package, or None."""
  folder = os.path.join(_PACKAGED, name)
  if os.sep in name or not os.path.isfile(os.path.join(folder, 'config.json')):
    return None
  return folder


def find_folder(path_or_repo_id, revision=None, patterns=PATTERNS):
  """The local folder of a checkpoint, fetched from the hub if need be.

  The name of one that comes with the package ('stories260k') means that one.
  patterns: of the files that are fetched.

  Raises:
    FileNotFoundError: neither a folder nor a repository that can be had.
  """
  name = os.fspath(path_or_repo_id)
  if packaged(name):
    return packaged(name)
  if os.path.isdir(name):
    return name
  if not re.fullmatch(r'[\w.-]+/[\w.-]+', name) or name.startswith('.'):
    parent, base = os.path.split(name.rstrip('/'))
    there = os.listdir(parent or '.') if os.path.isdir(parent or '.') else []
    there += [n for n in os.listdir(_PACKAGED) if packaged(n)]
    raise FileNotFoundError(
        f'no checkpoint folder {name!r}{nearest(base, there)}')
  try:
    import huggingface_hub  # optional: only hub ids need it
  except ImportError as e:
    raise FileNotFoundError(
        f'{name!r} is no folder here; a hub id needs the package '
        'huggingface_hub') from e
  try:
    return huggingface_hub.snapshot_download(
        name, revision=revision, allow_patterns=list(patterns))
  except Exception as e:
    raise FileNotFoundError(
        f'{name!r} is no folder here and could not be had from the hub: {e}'
    ) from e


class Files(contextlib.AbstractContextManager):
  """Names, shapes and tensors of all safetensors files of a folder."""

  def __init__(self, folder):
    self._stack = contextlib.ExitStack()
    self._open = {}
    self._where = _where(folder)
    for file in sorted(set(self._where.values())):
      path = os.path.join(folder, file)
      try:
        self._open[file] = self._stack.enter_context(
            safetensors.safe_open(path, 'numpy'))
      except FileNotFoundError as e:
        raise FileNotFoundError(f'{path} is named in {INDEX} but is not there'
                                ) from e
      except safetensors.SafetensorError as e:
        raise ValueError(f'{path} ({os.path.getsize(path)} bytes) is no '
                         f'complete safetensors file: {e}. Fetch it again'
                         ) from e
    held = {n: file for file, f in self._open.items() for n in f.keys()}
    lost = {n: file for n, file in self._where.items() if held.get(n) != file}
    if None not in self._where and lost:
      raise ValueError(f'{INDEX} names tensors that its files do not hold: '
                       f'{sorted(lost)[:5]}')
    self._where = held

  def __exit__(self, *args):
    self._stack.close()

  @property
  def names(self):
    return set(self._where)

  def shape(self, name):
    return tuple(self._open[self._where[name]].get_slice(name).get_shape())

  def read(self, name, index=None):
    """A tensor, or the part of it that a tuple of slices names."""
    file = self._open[self._where[name]]
    if index is None or not index:
      return file.get_tensor(name)
    return file.get_slice(name)[tuple(index)]


def _where(folder):
  """{name: file}; {None: file} for a single one, whose names are inside."""
  index = os.path.join(folder, INDEX)
  if os.path.isfile(index):
    try:
      with open(index, encoding='utf-8') as f:
        return json.load(f)['weight_map']
    except (ValueError, KeyError) as e:
      raise ValueError(f'{index} is no index of safetensors: {e!r}') from e
  if os.path.isfile(os.path.join(folder, SINGLE)):
    return {None: SINGLE}
  pickles = [n for n in os.listdir(folder)
             if n.endswith(('.bin', '.pt', '.pth', '.ckpt'))]
  if pickles:
    raise ValueError(
        f'{folder} holds pickled weights ({pickles[0]}), which are never read: '
        'unpickling runs code. Convert them to safetensors where they come '
        'from')
  raise FileNotFoundError(
      f'{folder} has neither {SINGLE} nor {INDEX}; it holds '
      f'{sorted(os.listdir(folder))}')
