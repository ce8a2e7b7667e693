"""Local files: JSON lines, JSON, CSV, TSV, Parquet, npz, folders of images.

  open_file('reviews/{split}.csv', 'train', columns=dict(text='review'))
  open_file('reviews/', 'validation')     # reviews/validation.jsonl.gz
  open_file('all.parquet', 'all[:80%]')   # a single file has one split, 'all'
  open_file('digits.npz', 'test')         # x_train, y_train, ..., y_test
  open_file('pets/', 'train')             # pets/train/<class>/<image>

Columns of a table are named as in `peftjax.data.examples`; `columns` maps such
a name to the file's own. Other columns are left out. Compressed text files end
in .gz. Everything but image folders is read into memory.
"""

import csv
import gzip
import json
import pathlib
import zlib

import numpy as np

from peftjax.data.examples import check_example
from peftjax.data.examples import checked
from peftjax.data.examples import Examples
from peftjax.data.examples import KINDS
from peftjax.data.examples import part
from peftjax.data.examples import plain
from peftjax.data.examples import Source
from peftjax.data.examples import split_name
from peftjax.method import nearest

TABLES = ('.jsonl', '.json', '.csv', '.tsv', '.parquet')
_ENDINGS = (*TABLES, '.jsonl.gz', '.json.gz', '.csv.gz', '.tsv.gz', '.npz')
_IMAGES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp', '.gif', '.tif', '.tiff')
_KEYS = ('text', 'text_b', 'label', 'tokens', 'tags', 'source', 'target',
         'references', 'answer', 'messages', 'image')
# How a part of an npz is called, by split.
_PARTS = dict(train='train', validation='val', test='test')


def open_file(path, split, columns=None, labels=(), kind='', metric=''):
  """One split of the user's own files.

  Args:
    path: a file, a folder of <split>.<ending>, a path with '{split}' in it, or
      a folder of images.
    split: 'train', 'validation', 'test' or whatever the files are called;
      'all' for what is not split; a part of one as in 'all[:80%]'.
    columns: {canonical name: name in the file}; a table's only.
    labels: names of the classes or tags, in order. Left out, they are the
      sorted strings, or the range of the integers, of the train split, or of
      the file itself where there is none. In the data a string is a name (or
      a place, if it is no name but digits), an integer a place.
    kind: of the examples; left out, it follows from the columns.
    metric: name of the metric, kept as it is.

  Returns:
    A `Source`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: unknown ending, split, column or kind; an unreadable or empty
      file; a missing value; a label outside the label set.
  """
  if kind and kind not in KINDS:
    raise ValueError(f'kind {kind!r}{nearest(kind, KINDS)}')
  name = f'file:{path} {split}'
  found = _parts(path)
  base = split_name(split, found, f'file:{path}')
  place = found[base]
  if place.is_dir():
    _no_columns(columns, path)
    return _images(found, base, split, labels, metric, name)
  if place.suffix == '.npz':
    _no_columns(columns, path)
    rows, names = _npz(place, base, labels)
    rows = checked(part(rows, split), 'image', names, name)
    return Source(rows, 'image', names, metric, name)
  every = [_columns(r, columns, i, name)
           for i, r in enumerate(read_table(place))]
  if not every:
    raise ValueError(f'{place} is empty: expected at least one example')
  kind = kind or _kind(every, name)
  other = found.get('train', place)
  train = every if other == place else [
      _columns(r, columns, i, other) for i, r in enumerate(read_table(other))]
  labels = tuple(labels) or _labels(train, kind)
  rows = [_number(r, kind, labels, i, name)
          for i, r in enumerate(part(every, split))]
  return Source(checked(rows, kind, labels, name), kind, labels, metric, name)


def read_table(path):
  """Rows of a table as a list of dicts.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another ending, or contents that cannot be read; names the
      file, and the line where there are lines.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'no file {path}')
  ending = path.with_suffix('').suffix if path.suffix == '.gz' else path.suffix
  if ending not in TABLES or (ending == '.parquet' and path.suffix == '.gz'):
    raise ValueError(f'{path}: unknown ending{nearest(ending, _ENDINGS)}')
  try:
    if ending == '.parquet':
      return _parquet(path)
    opened = gzip.open if path.suffix == '.gz' else open
    with opened(path, 'rt', encoding='utf-8-sig', newline='') as f:
      if ending == '.jsonl':
        return [_json_line(path, n, line) for n, line in enumerate(f, 1)
                if line.strip()]
      if ending == '.json':
        return _json_list(path, f.read())
      return _delimited(path, f, '\t' if ending == '.tsv' else ',')
  except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as e:
    raise ValueError(f'cannot read {path}: {e}') from e


def _json_line(path, number, line):
  try:
    row = json.loads(line)
  except json.JSONDecodeError as e:
    raise ValueError(f'{path}, line {number}: no JSON: {e}') from e
  if not isinstance(row, dict):
    raise ValueError(f'{path}, line {number}: expected an object, found '
                     f'{type(row).__name__}')
  return row


def _json_list(path, text):
  try:
    rows = json.loads(text) if text.strip() else []
  except json.JSONDecodeError as e:
    raise ValueError(f'{path}: no JSON: {e}') from e
  if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
    raise ValueError(f'{path}: expected a list of objects; one object a line '
                     'is .jsonl')
  return rows


def _delimited(path, file, delimiter):
  reader = csv.DictReader(file, delimiter=delimiter, strict=True)
  names = reader.fieldnames or []
  if len(set(names)) != len(names):
    raise ValueError(f'{path}: a column name occurs twice: {", ".join(names)}')
  rows = []
  for row in reader:
    if None in row or None in row.values():
      raise ValueError(f'{path}, line {reader.line_num}: expected {len(names)} '
                       'cells, as in the header')
    rows.append(row)
  return rows


def _parquet(path):
  try:
    import pyarrow
    import pyarrow.parquet
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
        f'reading {path} needs pyarrow: pip install pyarrow') from e
  try:
    return pyarrow.parquet.read_table(path).to_pylist()
  except pyarrow.ArrowException as e:
    raise ValueError(f'cannot read {path}: {e}') from e


def _parts(path):
  """{split: file or folder}."""
  text, path = str(path), pathlib.Path(path)
  if '{split}' in text:
    if text.count('{split}') > 1 or '{split}' not in path.name:
      raise ValueError(f'{path}: one {{split}}, in the file name, expected')
    head, tail = path.name.split('{split}')
    found = {p.name[len(head):len(p.name) - len(tail)]: p
             for p in sorted(path.parent.glob(f'{head}*{tail}'))}
    if not found:
      raise FileNotFoundError(f'no file matches {path}')
    return found
  if path.is_file():
    if path.suffix == '.npz':
      return _npz_splits(path)
    return dict(all=path)
  if not path.is_dir():
    raise FileNotFoundError(f'no file or folder {path}')
  files = {}
  for p in sorted(path.iterdir()):
    for ending in sorted(_ENDINGS, key=len, reverse=True):
      if p.name.endswith(ending):
        split = p.name[:-len(ending)]
        if split in files:
          raise ValueError(f'{path} has two files of the split {split!r}: '
                           f'{files[split].name} and {p.name}')
        files[split] = p
        break
  if files:
    return files
  folders = [p for p in sorted(path.iterdir()) if p.is_dir()]
  if not folders:
    raise ValueError(f'{path}: expected <split>{{{",".join(_ENDINGS)}}} or '
                     'folders of images, found neither')
  if any(q.is_dir() for p in folders for q in p.iterdir()):
    return {p.name: p for p in folders}
  return dict(all=path)


def _no_columns(columns, path):
  if columns:
    raise ValueError(f'columns={columns!r}: {path} is no table')


def _columns(row, columns, i, name):
  """The canonical columns of a row."""
  columns = dict(columns or {})
  for key, column in columns.items():
    if key not in _KEYS:
      raise ValueError(f'columns: {key!r} is no canonical name'
                       f'{nearest(key, _KEYS)}')
    if column not in row:
      raise ValueError(f'example {i} of {name} has no column {column!r}'
                       f'{nearest(column, row)}')
  taken = {k: k for k in _KEYS if k in row and k not in columns}
  example = {k: plain(row[c]) for k, c in {**taken, **columns}.items()
             if row[c] is not None}
  image = example.get('image')
  if isinstance(image, dict) and image.get('bytes'):  # Hugging Face's Parquet.
    import io
    example['image'] = load_image(io.BytesIO(image['bytes']), name)
  return example


def _kind(rows, name):
  """The kind that the columns of the first row tell."""
  first = rows[0]
  fits = [k for k, ways in KINDS.items()
          if any(all(key in first for key in way) for way in ways)]
  if 'label' in first and 'classification' in fits:
    labels = [r.get('label') for r in rows]
    regression = any(_fraction(v) for v in labels)
    fits.remove('classification' if regression else 'regression')
    fits = [k for k in fits if k not in ('retrieval', 'lm')]
  if 'text_b' in first and 'retrieval' in fits:
    fits.remove('lm')
  if len(fits) != 1:
    raise ValueError(
        f'{name} has the columns {", ".join(first) or "(none that is known)"}, '
        f'which fit {", ".join(fits) or "no kind"}; give columns= or kind=')
  return fits[0]


def _fraction(value):
  if isinstance(value, str):
    try:
      int(value)
    except ValueError:
      try:
        float(value)
      except ValueError:
        return False
      return True
    return False
  return isinstance(value, float)


def _labels(rows, kind):
  """The label set that the rows show."""
  if kind == 'tagging':
    return tuple(sorted({t for r in rows for t in r.get('tags') or ()}))
  if kind not in ('classification', 'image'):
    return ()
  seen = {r['label'] for r in rows if r.get('label') is not None}
  try:
    top = max(int(v) for v in seen)
  except ValueError:
    return tuple(sorted(map(str, seen)))
  return tuple(str(i) for i in range(top + 1))


def _number(row, kind, labels, i, name):
  """The row with a string label as its number."""
  label = row.get('label')
  if kind == 'regression' and isinstance(label, str):
    try:
      return {**row, 'label': float(label)}
    except ValueError as e:
      raise ValueError(
          f'label {label!r} of example {i} of {name}: no number') from e
  if kind not in ('classification', 'image') or not isinstance(label, str):
    return row
  if label not in labels:
    if label.isdecimal():
      return {**row, 'label': int(label)}
    raise ValueError(f'label {label!r} of example {i} of {name} is outside the '
                     f'label set{nearest(label, labels)}')
  return {**row, 'label': labels.index(label)}


def _npz_arrays(path, names=()):
  """{name: array}, of names alone that are there; {name: None} without."""
  try:
    with np.load(path, allow_pickle=False) as z:
      if not names:
        return dict.fromkeys(z.files)
      return {n: z[n] for n in names if n in z.files}
  except Exception as e:  # zipfile, zlib and numpy each raise their own.
    raise ValueError(f'cannot read {path}: {e}') from e


def _npz_splits(path):
  arrays = _npz_arrays(path)
  splits = {split: path for split, p in _PARTS.items() if f'x_{p}' in arrays}
  if splits:
    return splits
  if 'image' in arrays:
    return dict(all=path)
  raise ValueError(f'{path} has the arrays {", ".join(arrays) or "(none)"}; '
                   'expected x_train, y_train, ... or image, label')


def _npz(path, split, labels):
  """(examples, label names) of images uint8 [N, H, W] or [N, H, W, C]."""
  p = _PARTS.get(split)
  x, y = ('image', 'label') if split == 'all' else (f'x_{p}', f'y_{p}')
  arrays = _npz_arrays(path, (x, y, 'y_train'))
  for key in (x, y):
    if key not in arrays:
      raise ValueError(f'{path} has no array {key!r}{nearest(key, arrays)}')
  image, label = arrays[x], arrays[y]
  if image.dtype != np.uint8 or image.ndim not in (3, 4):
    raise ValueError(f'{path}: {x} is {image.dtype} {list(image.shape)}; '
                     'expected uint8 [N, H, W] or [N, H, W, C]')
  if label.shape != image.shape[:1]:
    raise ValueError(f'{path}: {y} has the shape {list(label.shape)} with '
                     f'{len(image)} images')
  if label.dtype.kind not in 'iu':
    raise ValueError(f'{path}: {y} is {label.dtype}; expected integers')
  train = arrays.get('y_train', label)
  names = tuple(labels) or tuple(
      str(i) for i in range(int(train.max()) + 1 if train.size else 0))
  image = image[..., None] if image.ndim == 3 else image
  return [dict(image=i, label=int(v)) for i, v in zip(image, label)], names


def _images(found, base, split, labels, metric, name):
  """A folder a class; images are decoded when they are asked for."""
  place = found[base]
  train = found.get('train', place)
  names = tuple(labels) or tuple(
      sorted(p.name for p in train.iterdir() if p.is_dir()))
  files = []
  for folder in sorted(p for p in place.iterdir() if p.is_dir()):
    if folder.name not in names:
      raise ValueError(f'{folder}: the class is outside the label set'
                       f'{nearest(folder.name, names)}')
    for p in sorted(folder.rglob('*')):
      if p.is_dir() or p.name.startswith('.'):
        continue
      if p.suffix.lower() not in _IMAGES:
        raise ValueError(f'{p} is no image; expected {", ".join(_IMAGES)}')
      files.append((p, names.index(folder.name)))
  files = part(files, split)
  if not files:
    raise ValueError(f'{name} is empty: expected at least one image')

  def get(i):
    image = load_image(files[i][0], files[i][0])
    return check_example(dict(image=image, label=files[i][1]), 'image', names,
                         i, name)
  return Source(Examples(len(files), get), 'image', names, metric, name)


def load_image(file, name):
  """uint8 [H, W, C], C 1 for grey and 3 or 4 for colour, of a file."""
  import PIL.Image
  try:
    with PIL.Image.open(file) as image:
      if image.mode not in ('L', 'RGB', 'RGBA'):
        image = image.convert('L' if image.mode in ('1', 'LA') else 'RGB')
      pixels = np.asarray(image)
  except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as e:
    raise ValueError(f'cannot read the image {name}: {e}') from e
  return pixels[..., None] if pixels.ndim == 2 else pixels
