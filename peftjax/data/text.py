"""Text to arrays of fixed shape: classification, tagging, language models.

  tokenizer = load_tokenizer('checkpoints/all-MiniLM-L6-v2')
  arrays, report = encode_classification(examples, tokenizer, length=128)

Examples are any sequence of dicts; N of them become rows of T = length tokens:

  ids     int32 [N, T]    padded at the end with `tokenizer.pad`
  mask    bool [N, T]     True for real tokens
  types   int32 [N, T]    0 first text, 1 second; of pairs only
  label   int32 [N], or float32 [N] for a regression
  labels  int32 [N, T]    tagging: class of a word at its first token, else -1
  weights float32 [N, T]  language models: of predicting token t from those
                          before it, so that column 0 is 0

What is longer than T is cut and counted: every function returns a Report, and
logs it in one line.
"""

import numpy as np

from peftjax.data import encoding
from peftjax.data.chat import encode_messages
from peftjax.data.chat import prompt_format
from peftjax.data.encoding import Report
from peftjax.data.tokenizer import check_fits
from peftjax.data.tokenizer import load_tokenizer
from peftjax.data.tokenizer import Tokenizer
from peftjax.method import nearest

__all__ = [
    'Report', 'Tokenizer', 'check_fits', 'encode_classification', 'encode_lm',
    'encode_messages', 'encode_pairs', 'encode_prompts', 'encode_seq2seq',
    'encode_tagging', 'load_tokenizer']


def encode_classification(examples, tokenizer, length, classes=None):
  """Examples {'text', 'text_b' (pairs), 'label'} -> arrays.

  Of a pair that is too long, the longer text is cut first.

  Args:
    examples: sequence of dicts, all or none with 'text_b' and with 'label'.
    tokenizer: a Tokenizer.
    length: T.
    classes: labels must be whole and in 0 .. classes - 1; None: any number.

  Returns:
    (dict(ids, mask, label), and types for pairs; Report). label is int32 if
    all labels are whole numbers by type, else float32; absent if examples
    have none.
  """
  rows = encoding.read_rows(examples)
  first = encoding.texts_of(rows, 'text')
  second = encoding.texts_of(rows, 'text_b') if 'text_b' in rows[0] else None
  encodings, report = _encode(tokenizer, first, second, length)
  arrays = encoding.padded([e.ids for e in encodings], length, tokenizer.pad)
  if second:
    arrays['types'] = encoding.fill([e.type_ids for e in encodings], length, 0)
  if any('label' in row for row in rows):
    arrays['label'] = _labels(rows, classes)
  return arrays, encoding.logged('classification', report, length)


def encode_tagging(examples, tokenizer, length, tags):
  """Examples {'tokens': words, 'tags': one a word} -> arrays.

  Args:
    examples: sequence of dicts.
    tokenizer: a Tokenizer.
    length: T.
    tags: names of all tags; a label is a place in it.

  Returns:
    (dict(ids, mask, labels), Report). Report.unlabelled counts the words that
    were cut off or that the tokenizer gives no token.
  """
  rows = encoding.read_rows(examples)
  classes = {tag: i for i, tag in enumerate(tags)}
  words = [encoding.value_of(rows, i, 'tokens', (list, tuple))
           for i in range(len(rows))]
  wanted = []
  for i, row in enumerate(rows):
    named = encoding.value_of(rows, i, 'tags', (list, tuple))
    if len(named) != len(words[i]):
      raise ValueError(f'example {i} has {len(words[i])} words and '
                       f'{len(named)} tags; expected as many')
    for tag in named:
      if tag not in classes:
        raise ValueError(f'example {i} has the tag {tag!r}'
                         f'{nearest(tag, classes)}')
    wanted.append([classes[tag] for tag in named])
  # Byte-level vocabularies tell words by the space before them.
  spaced = 'ByteLevel' in str(tokenizer.core.pre_tokenizer)
  texts = [[f' {w}' if spaced else w for w in ws] for ws in words]
  encodings, report = _encode(tokenizer, texts, None, length, words=True)
  arrays = encoding.padded([e.ids for e in encodings], length, tokenizer.pad)
  arrays['labels'] = np.full((len(rows), length), -1, np.int32)
  lost = 0
  for i, tokens in enumerate(encodings):
    seen = set()
    for t, word in enumerate(tokens.word_ids):
      if word is not None and word not in seen:
        seen.add(word)
        arrays['labels'][i, t] = wanted[i][word]
    lost += len(words[i]) - len(seen)
  return arrays, encoding.logged(
      'tagging', report._replace(unlabelled=lost), length)


def encode_lm(examples, tokenizer, length, rows='chunks'):
  """Examples {'text'} -> arrays for a language model.

  Every text starts as the tokenizer starts one and ends with its eos.

  Args:
    examples: sequence of dicts.
    tokenizer: a Tokenizer.
    length: T, 2 or more.
    rows: 'chunks': the texts one after the other, cut every T - 1 tokens;
      a row begins with the last token of the row before, so that every token
      but the very first is predicted once. 'texts': one text a row.

  Returns:
    (dict(ids, mask, weights), Report).
  """
  if rows not in ('chunks', 'texts'):
    raise ValueError(f'rows {rows!r}{nearest(rows, ("chunks", "texts"))}')
  encoding.check_length(length, 2)
  texts = encoding.texts_of(encoding.read_rows(examples), 'text')
  ids = [_ended(i, tokenizer) for i in tokenizer.encode(texts)]
  longest = max(map(len, ids))
  if rows == 'texts':
    cut = sum(len(i) > length for i in ids)
    ids = [i[:length] for i in ids]
  else:
    cut = 0
    stream = np.concatenate([np.array(i, np.int32) for i in ids])
    if len(stream) < 2:
      raise ValueError(f'{len(texts)} texts of {len(stream)} tokens together; '
                       'expected 2 or more')
    ids = [stream[i:i + length]
           for i in range(0, len(stream) - 1, length - 1)]
  arrays = encoding.padded(ids, length, tokenizer.pad)
  arrays['weights'] = arrays['mask'].astype(np.float32)
  arrays['weights'][:, 0] = 0
  return arrays, encoding.logged('lm', Report(len(texts), cut, longest), length)


def encode_seq2seq(examples, tokenizer, length, layout='decoder',
                   target_length=None, prompt='plain', start=None):
  """Examples {'source', 'target'} -> arrays that train on the target.

  Both texts are encoded apart, as at generation, and the target ends with eos.
  A row too long loses the beginning of its prompt first; a target is cut, and
  then has no eos, only where it needs more than half of the row.

  Args:
    examples: sequence of dicts.
    tokenizer: a Tokenizer.
    length: T of a row, of the source alone for 'encdec'.
    layout: 'decoder': prompt and target in one row. 'encdec': apart.
    target_length: S, of the target for 'encdec'; None: length.
    prompt: see `peftjax.data.chat.prompt_format`; 'encdec' reads the source
      as it stands.
    start: id that the decoder of 'encdec' starts with; None: tokenizer.pad,
      as T5.

  Returns:
    (dict(ids, mask, weights), Report); for 'encdec' (dict(ids, mask, and
    [N, S]: targets_in, targets_out, target_weights), Report).

  Raises:
    ValueError: also for a target without any token.
  """
  rows = encoding.read_rows(examples)
  sources = encoding.texts_of(rows, 'source')
  targets = encoding.texts_of(rows, 'target')
  if layout == 'encdec':
    return _encdec(sources, targets, tokenizer, length,
                   target_length or length, start)
  if layout != 'decoder':
    raise ValueError(f'layout {layout!r}'
                     f'{nearest(layout, ("decoder", "encdec"))}')
  encoding.check_length(length, 2)
  prompts = _prompts(sources, tokenizer, prompt)
  answers = [i if tokenizer.eos is None else i + [tokenizer.eos]
             for i in tokenizer.encode(targets, special=False)]
  _check_answers(answers)
  first = encoding.starts(tokenizer)
  joined, asked, cut, longest = [], [], 0, 0
  for question, answer in zip(prompts, answers):
    longest = max(longest, len(question) + len(answer))
    cut += len(question) + len(answer) > length
    room = max(length - len(answer), min(len(question), length // 2))
    question = _tail(question, room, first)
    joined.append((question + answer)[:length])
    asked.append(len(question))
  arrays = encoding.padded(joined, length, tokenizer.pad)
  # Nothing comes before the first token, so that nothing predicts it.
  after = np.arange(length) >= np.maximum(asked, 1)[:, None]
  arrays['weights'] = (arrays['mask'] & after).astype(np.float32)
  return arrays, encoding.logged(
      'seq2seq', Report(len(rows), cut, longest), length)


def encode_prompts(examples, tokenizer, length, prompt='plain'):
  """Examples {'source'} -> what a decoder continues, as it was trained on.

  Returns:
    (dict(ids, mask), Report); a prompt too long loses its beginning.
  """
  sources = encoding.texts_of(encoding.read_rows(examples), 'source')
  prompts = _prompts(sources, tokenizer, prompt)
  longest = max(map(len, prompts))
  cut = sum(len(p) > length for p in prompts)
  first = encoding.starts(tokenizer)
  prompts = [_tail(p, length, first) for p in prompts]
  return encoding.padded(prompts, length, tokenizer.pad), encoding.logged(
      'prompts', Report(len(prompts), cut, longest), length)


def encode_pairs(examples, tokenizer, length):
  """Examples {'text', 'text_b'} -> both texts in rows of their own.

  Returns:
    (dict(ids, mask, ids_b, mask_b, and label if examples have one), Report)
    for retrieval; row n of both belongs together.
  """
  rows = encoding.read_rows(examples)
  arrays, reports = {}, []
  for suffix, column in (('', 'text'), ('_b', 'text_b')):
    encodings, report = _encode(
        tokenizer, encoding.texts_of(rows, column), None, length)
    both = encoding.padded([e.ids for e in encodings], length, tokenizer.pad)
    arrays.update({f'{k}{suffix}': a for k, a in both.items()})
    reports.append(report)
  if any('label' in row for row in rows):
    arrays['label'] = _labels(rows, None)
  a, b = reports
  return arrays, encoding.logged('pairs', Report(
      2 * a.examples, a.truncated + b.truncated, max(a.longest, b.longest)),
                         length)


def _encdec(sources, targets, tokenizer, length, target_length, start):
  encodings, report = _encode(tokenizer, sources, None, length)
  arrays = encoding.padded([e.ids for e in encodings], length, tokenizer.pad)
  answers = [_ended(i, tokenizer) for i in tokenizer.encode(targets)]
  _check_answers(answers)
  cut = sum(len(a) > target_length for a in answers)
  longest = max(report.longest, *map(len, answers))
  answers = encoding.padded(
      [a[:target_length] for a in answers], target_length, tokenizer.pad)
  out = answers['ids']
  first = np.full((len(out), 1), tokenizer.pad if start is None else start,
                  np.int32)
  arrays.update(
      targets_in=np.concatenate([first, out[:, :-1]], axis=1),
      targets_out=out, target_weights=answers['mask'].astype(np.float32))
  report = Report(report.examples, report.truncated + cut, longest)
  return arrays, encoding.logged('seq2seq', report, length)


def _labels(rows, classes):
  """int32 [N] where all are whole by type, else float32 [N]."""
  for i, row in enumerate(rows):
    label = row.get('label')
    if isinstance(label, (bool, np.bool_)) or not np.isscalar(label) or (
        isinstance(label, str)) or not np.isfinite(label):
      raise ValueError(f'label {label!r} of example {i}; expected a number')
    if classes is not None and label not in range(classes):
      raise ValueError(
          f'label {label!r} of example {i} is outside the label set 0 .. '
          f'{classes - 1}; nearest: {min(max(round(label), 0), classes - 1)}')
  labels = [row['label'] for row in rows]
  whole = classes is not None or all(
      isinstance(v, (int, np.integer)) for v in labels)
  return np.array(labels, np.int32 if whole else np.float32)


def _check_answers(answers):
  for i, answer in enumerate(answers):
    if not answer:
      raise ValueError(f"'target' of example {i} has no tokens; expected text "
                       'to train on')


def _encode(tokenizer, first, second, length, words=False):
  """-> (encodings of at most `length` tokens, Report)."""
  core = tokenizer.core
  special = core.num_special_tokens_to_add(second is not None)
  encoding.check_length(length, special + (1 if second is None else 2))
  # The fast variant does not tell which word a token came from.
  batch = core.encode_batch if words else core.encode_batch_fast
  pairs = first if second is None else list(zip(first, second))
  encodings = batch(pairs, is_pretokenized=words)
  sizes = [len(e.ids) for e in encodings]
  for i, size in enumerate(sizes):
    if size <= length:
      continue
    parts = [x[i] for x in (first, second) if x is not None]
    parts = batch(parts, is_pretokenized=words, add_special_tokens=False)
    for part, room in zip(parts, _rooms([len(p.ids) for p in parts],
                                        length - special)):
      part.truncate(room)
    encodings[i] = core.post_process(*parts)
  cut = sum(size > length for size in sizes)
  return encodings, Report(len(first), cut, max(sizes))


def _rooms(sizes, total):
  """Tokens left of one text or two: the longer one is cut first."""
  if len(sizes) == 1:
    return [total]
  a, b = sizes
  shorter = min(a, b, total // 2)
  return [shorter, total - shorter] if a <= b else [total - shorter, shorter]


def _ended(ids, tokenizer):
  """ids with eos at their end, if there is one."""
  eos = tokenizer.eos
  return ids if eos is None or ids[-1:] == [eos] else ids + [eos]


def _prompts(sources, tokenizer, prompt):
  """Ids of prompts, as a text begins, with nothing behind them."""
  ids = tokenizer.encode([prompt_format(prompt)(s) for s in sources])
  return [i[:-1] for i in ids] if encoding.ends(tokenizer) else ids


def _tail(ids, room, starts):
  """The special tokens at the start and the last of the others."""
  if len(ids) <= room:
    return ids
  starts = min(starts, room)
  return ids[:starts] + ids[len(ids) - (room - starts):]
