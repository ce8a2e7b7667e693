"""What every source of examples gives, and the checks that all share.

Canonical examples are dicts:

  image           image uint8 [H, W, C], label int
  classification  text, text_b (pairs only), label int
  regression      text, text_b (pairs only), label float
  tagging         tokens [str], tags [str]
  lm              text
  seq2seq         source, target, references [str] and answer where there are
                  such; or messages [{'role': str, 'content': str}]
  retrieval       text, text_b
  tabular         features float32 [F], label int
"""

import re
from typing import NamedTuple, Sequence

import numpy as np

from peftjax.method import nearest

# Keys without which an example is none of its kind; one line a way.
KINDS = dict(
    image=(('image', 'label'),),
    classification=(('text', 'label'),),
    regression=(('text', 'label'),),
    tagging=(('tokens', 'tags'),),
    seq2seq=(('source', 'target'), ('messages',)),
    retrieval=(('text', 'text_b'),),
    lm=(('text',),),
    tabular=(('features', 'label'),))


class Source(NamedTuple):
  """One split of one data set."""
  examples: Sequence          # len() and [i] -> a canonical example
  kind: str                   # one of KINDS
  labels: tuple[str, ...]     # names of the classes or tags; () if none
  metric: str                 # as the set's authors name it, '' if unknown
  name: str                   # as `open_split` was called, with the split


class Examples(Sequence):
  """Examples that are made when they are asked for.

  Args:
    size: how many there are.
    get: function from a place in 0 .. size - 1 to an example.
  """

  def __init__(self, size, get):
    self._size, self._get = size, get

  def __len__(self):
    return self._size

  def __getitem__(self, i):
    if isinstance(i, slice):
      places = range(self._size)[i]
      return Examples(len(places), lambda j: self._get(places[j]))
    return self._get(range(self._size)[i])


def check_example(example, kind, labels, i, name):
  """Returns the example with label as int (float for regression).

  Raises:
    ValueError: a key is missing or empty of value, or a label or tag is
      outside the label set; says which example and which value.
  """
  where = f'example {i} of {name}'
  ways = KINDS[kind]
  missing = [k for k in ways[0] if example.get(k) is None]
  if missing and not any(
      all(example.get(k) is not None for k in way) for way in ways[1:]):
    have = ', '.join(k for k, v in example.items() if v is not None)
    raise ValueError(f'{where} has no {missing[0]!r}, which a {kind} example '
                     f'needs; it has {have or "nothing"}')
  if kind == 'tagging':
    if len(example['tokens']) != len(example['tags']):
      raise ValueError(f'{where} has {len(example["tokens"])} tokens and '
                       f'{len(example["tags"])} tags')
    for tag in example['tags'] if labels else ():
      if tag not in labels:
        raise ValueError(f'tag {tag!r} in {where} is outside the label set'
                         f'{nearest(tag, labels)}')
    return example
  if 'label' not in KINDS[kind][0]:
    return example
  label = example['label']
  try:
    if kind == 'regression':
      value = float(label)
      good = np.isfinite(value)
    else:
      value = int(label)
      good = value == label and (not labels or 0 <= value < len(labels))
  except (TypeError, ValueError):
    value, good = label, False
  if not good:
    wanted = ('a finite number' if kind == 'regression' else
              f'0 .. {len(labels) - 1}' if labels else 'a whole number')
    raise ValueError(f'label {label!r} of {where} is outside the label set: '
                     f'expected {wanted}')
  return {**example, 'label': value}


def checked(rows, kind, labels, name):
  """All rows through `check_example`; a list. Refuses an empty split."""
  if not len(rows):
    raise ValueError(f'{name} is empty: expected at least one example')
  labels = tuple(labels)
  return [check_example(row, kind, labels, i, name)
          for i, row in enumerate(rows)]


_SPLIT = re.compile(r'(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?')


def split_name(split, choices, name):
  """'train' of 'train' or 'train[:80%]'.

  Raises:
    ValueError: not of that form, or none of the choices.
  """
  match = _SPLIT.fullmatch(split)
  if not match or match[1] not in choices:
    word = match[1] if match else split
    raise ValueError(f'{name} has no split {split!r}{nearest(word, choices)}')
  return match[1]


def part(rows, split):
  """The rows of 'train[:80%]' or 'train[100:200]', given all of 'train'.

  Both ends may be left out, be negative, or be percentages, which are rounded
  down, so that [:80%] and [80%:] share nothing and leave out nothing.
  """
  _, start, stop = _SPLIT.fullmatch(split).groups()

  def place(end):
    if end is None:
      return None
    return int(end[:-1]) * len(rows) // 100 if end.endswith('%') else int(end)
  if start is None and stop is None:
    return rows
  return rows[place(start):place(stop)]


def plain(value):
  """Text as str, numbers as Python's, whatever a reader made of them."""
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, np.generic) or (
      isinstance(value, np.ndarray) and not value.ndim):
    return plain(value.item())
  if isinstance(value, np.ndarray) and value.dtype.kind in 'SUO':
    return [plain(v) for v in value]
  if isinstance(value, list):
    return [plain(v) for v in value]
  return value
