"""Folders of data sets that are described by a manifest.json.

  open_set('sst2', 'train', path='data')
  verify('data', 'sst2')                # sha256 of its files

The folder: $PEFTJAX_DATA if no path is given. manifest.json holds {'sets':
[...]}, and every set

  name, group ('text', 'tokens', 'nlg', 'lm', 'vision' or 'tabular'), metric,
  label_names (null if there are none), and files: {split: {path, sha256}},
  with the one key 'all' for what holds all splits (vision) or has none
  (tabular).

By group, the files and the examples made of them:

  text     jsonl.gz: text or text_a, text_b; label. A float label makes it
           regression, in the file's own scale: STS sets keep their 0 .. 5,
           nothing is divided by 5.
  tokens   jsonl.gz: tokens, and tags or upos. With upos come heads and deprels.
  nlg      jsonl.gz: source, target; references, answer and task where given
  lm       jsonl.gz: text; doc and part where given
  vision   npz: x_train, y_train, x_val, y_val, x_test, y_test
  tabular  csv.gz: numbers, the column target last: features float32 [F], label
"""

import hashlib
import json
import os
import pathlib

import numpy as np

from peftjax.data.examples import checked
from peftjax.data.examples import part
from peftjax.data.examples import Source
from peftjax.data.examples import split_name
from peftjax.data.files import open_file
from peftjax.data.files import read_table
from peftjax.method import nearest

_KINDS = dict(tokens='tagging', nlg='seq2seq', lm='lm', vision='image',
              tabular='tabular')
# Their names in a file -> in an example.
_NAMES = dict(text_a='text', upos='tags')
GROUPS = ('text', *_KINDS)


def open_set(name, split, path=''):
  """One split of one set of a manifest.

  Args:
    name: of the set.
    split: 'train', 'validation' or 'test'; 'all' for a tabular set; a part of
      one as in 'train[:80%]'.
    path: of the folder; $PEFTJAX_DATA if empty.

  Returns:
    A `Source`; labels and metric are the manifest's.

  Raises:
    FileNotFoundError: no folder, no manifest, no such file.
    ValueError: unknown set or split, unreadable or empty file, a label outside
      the label set.
  """
  folder = find_folder(path)
  entry = _entry(folder, name)
  group, files = entry['group'], entry['files']
  full = f'data:{name} {split}'
  labels = tuple(entry.get('label_names') or ())
  metric = entry.get('metric') or ''
  if group == 'vision':
    source = open_file(folder / files['all']['path'], split, labels=labels)
    return source._replace(metric=metric, name=full)
  base = split_name(split, files, f'data:{name}')
  rows = part(read_table(folder / files[base]['path']), split)
  if group == 'tabular':
    rows = [_features(row, i, full) for i, row in enumerate(rows)]
    return Source(checked(rows, 'tabular', labels, full), 'tabular', labels,
                  metric, full)
  rows = [{_NAMES.get(k, k): v for k, v in row.items()} for row in rows]
  kind = _KINDS.get(group)
  if group == 'text':
    kind = 'classification' if labels else 'regression'
  return Source(checked(rows, kind, labels, full), kind, labels, metric, full)


def find_folder(path=''):
  """The folder of a manifest as a path; see `open_set`."""
  place = path or os.environ.get('PEFTJAX_DATA')
  if not place:
    raise FileNotFoundError(
        "no folder for 'data:' sets: give path= or set PEFTJAX_DATA")
  folder = pathlib.Path(place)
  if not (folder / 'manifest.json').is_file():
    raise FileNotFoundError(f'no manifest.json in {folder}')
  return folder


def set_names(path=''):
  """{name: group} of the sets that `open_set` reads."""
  return {s['name']: s['group'] for s in _sets(find_folder(path))
          if s['group'] in GROUPS}


def verify(path='', name=''):
  """Checks the sha256 of a set's files, or of all sets'.

  Raises:
    ValueError: lists the files that are not as the manifest says.
    FileNotFoundError: a file is missing.
  """
  folder = find_folder(path)
  entries = [_entry(folder, name)] if name else _sets(folder)
  wrong = []
  for entry in entries:
    for file in entry['files'].values():
      place = folder / file['path']
      if not place.is_file():
        raise FileNotFoundError(f'no file {place}')
      if hashlib.sha256(place.read_bytes()).hexdigest() != file['sha256']:
        wrong.append(file['path'])
  if wrong:
    raise ValueError(f'{folder}: another sha256 than in manifest.json: '
                     f'{", ".join(wrong)}')


def _sets(folder):
  path = folder / 'manifest.json'
  try:
    return json.loads(path.read_text('utf-8'))['sets']
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(f'{path}: expected {{"sets": [...]}}: {e!r}') from e


def _entry(folder, name):
  entries = {s['name']: s for s in _sets(folder) if s['group'] in GROUPS}
  if name not in entries:
    raise ValueError(f'{folder} has no data set {name!r}'
                     f'{nearest(name, entries)}')
  return entries[name]


def _features(row, i, name):
  if 'target' not in row:
    raise ValueError(f"example {i} of {name} has no column 'target'"
                     f'{nearest("target", row)}')
  numbers = {}
  for key, cell in row.items():
    try:
      numbers[key] = float(cell)
    except ValueError as e:
      raise ValueError(f'example {i} of {name}: {key} is {cell!r}, '
                       'expected a number') from e
  label = numbers.pop('target')
  return dict(features=np.array(list(numbers.values()), np.float32),
              label=label)
