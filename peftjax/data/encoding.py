"""What every text encoder shares: reading examples, padding, reporting."""

import contextlib
import contextvars
from typing import NamedTuple

from absl import logging
import numpy as np

from peftjax.method import nearest


class Report(NamedTuple):
  """What encoding did to the examples."""
  examples: int      # how many there were
  truncated: int     # how many were cut to fit
  longest: int       # tokens of the longest, before cutting
  unlabelled: int = 0  # tagging: words whose tag no token carries
  dropped: int = 0   # chats of which no answer was left; they have no row


def read_rows(examples):
  """Sequence of examples -> list of dicts; a ValueError if there is none."""
  rows = [examples[i] for i in range(len(examples))]
  if not rows:
    raise ValueError('no examples; expected 1 or more')
  return rows


def value_of(rows, i, column, kind):
  """Column of example i; a ValueError if it is missing or of another type."""
  if column not in rows[i]:
    raise ValueError(f'example {i} has no {column!r}'
                     f'{nearest(column, rows[i])}')
  value = rows[i][column]
  if not isinstance(value, kind):
    name = 'text' if kind is str else 'a list'
    raise ValueError(f'{column!r} of example {i} is {value!r}; expected {name}')
  return value


def texts_of(rows, column):
  """The text of every example in one column."""
  return [value_of(rows, i, column, str) for i in range(len(rows))]


def check_length(length, least):
  """Raises a ValueError unless rows of that length hold an example."""
  if length < least:
    raise ValueError(f'length {length}; choose {least} or more')


def starts(tokenizer):
  """How many special tokens a text begins with."""
  return tokenizer.core.num_special_tokens_to_add(False) - ends(tokenizer)


def ends(tokenizer):
  """Whether the tokenizer itself puts eos behind a text."""
  return tokenizer.eos is not None and (
      tokenizer.encode(['a'])[0][-1:] == [tokenizer.eos])


def fill(rows, length, value):
  """Lists of at most `length` integers -> int32 [N, length]."""
  out = np.full((len(rows), length), value, np.int32)
  for row, values in zip(out, rows):
    row[:len(values)] = values
  return out


def padded(rows, length, pad):
  """Lists of at most `length` ids -> dict(ids, mask)."""
  sizes = np.array([len(row) for row in rows])
  return dict(ids=fill(rows, length, pad),
              mask=np.arange(length) < sizes[:, None])


_QUIET = contextvars.ContextVar('quiet', default=False)


@contextlib.contextmanager
def quietly():
  """`logged` logs nothing in this thread: the caller counts the reports."""
  token = _QUIET.set(True)
  try:
    yield
  finally:
    _QUIET.reset(token)


def logged(what, report, length):
  """Logs the report in one line and returns it."""
  if _QUIET.get():
    return report
  lost = f', {report.unlabelled} words without label' * bool(report.unlabelled)
  lost += f', {report.dropped} dropped' * bool(report.dropped)
  log = logging.warning if report.truncated or lost else logging.info
  log('%s: %d of %d examples cut to %d tokens, the longest had %d%s', what,
      report.truncated, report.examples, length, report.longest, lost)
  return report
