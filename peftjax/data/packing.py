"""Less padding: several examples in one row, or rows of a few lengths.

  packed, report = pack(arrays, length=512)           # language models
  batches = bucket_iterator(arrays, 32, seed=0, lengths=(16, 32, 64, 128))

Both take what `peftjax.data.text` makes: a dict of arrays with 'mask' [N, T],
whose rows are real at the beginning and padding at the end. Shapes are fixed:
packed rows have one, batches of buckets one for each length.
"""

import bisect
import functools
import heapq
from typing import NamedTuple

from absl import logging
import grain
import numpy as np

from peftjax.data import pipeline


class Packing(NamedTuple):
  """How well examples were packed."""
  examples: int
  rows: int
  filled: float  # part of the tokens of all rows that is real


def first_fit(sizes, length):
  """Puts each example into the first row that has room for it.

  Args:
    sizes: tokens of each example, 1 to length.
    length: tokens of a row.

  Returns:
    List of rows, each the list of its examples, in the order given.
  """
  rows, room = [], []
  # By free tokens: the rows that have just so many, the first one on top.
  free = [[] for _ in range(length + 1)]
  tops = np.full(length + 1, len(sizes))
  def move(row, left):
    heapq.heappush(free[left], row)
    tops[left] = free[left][0]
  for i, size in enumerate(sizes):
    if not 1 <= size <= length:
      raise ValueError(f'example {i} has {size} tokens; expected 1 to {length}')
    found = size + int(tops[size:].argmin())
    if free[found]:
      row = heapq.heappop(free[found])
      tops[found] = free[found][0] if free[found] else len(sizes)
      rows[row].append(i)
    else:
      row = len(rows)
      rows.append([i])
      room.append(length)
    room[row] -= size
    move(row, room[row])
  return rows


def pack(arrays, length, pad=0):
  """Puts several examples into one row.

  Args:
    arrays: dict(ids, mask, and others such as weights), all [N, T]; of a row
      only what the mask says is real is kept.
    length: tokens of a packed row; at least those of the longest example.
    pad: id of padding.

  Returns:
    (dict of the same arrays [R, length] and, int32 [R, length],
       segments   1, 2, ... for the examples of a row; 0 for padding
       positions  0, 1, ... within an example,
     Packing). A model that looks only within a segment, see `segment_mask`,
    computes the same as on single examples. The weight of the first token of
    an example is 0: nothing of its own comes before it.

  Raises:
    ValueError: arrays that have no token axis, an example that is empty or
      too long.
  """
  sizes = _sizes(arrays)
  for name, a in arrays.items():
    if name in _SECOND:
      raise ValueError(f'{name!r} tells of a second text for each example; '
                       'expected one to pack')
    if a.shape != arrays['mask'].shape:
      raise ValueError(f'{name!r} of shape {list(a.shape)} cannot be packed; '
                       f'expected {list(arrays["mask"].shape)} as of the mask')
  rows = first_fit(sizes, length)
  fills = {name: pad if name == 'ids' else 0 for name in arrays}
  packed = {name: np.full((len(rows), length), fills[name], a.dtype)
            for name, a in arrays.items()}
  packed['segments'] = np.zeros((len(rows), length), np.int32)
  packed['positions'] = np.zeros((len(rows), length), np.int32)
  for r, row in enumerate(rows):
    start = 0
    for segment, i in enumerate(row, 1):
      stop = start + sizes[i]
      for name, a in arrays.items():
        packed[name][r, start:stop] = a[i, :sizes[i]]
      if 'weights' in packed:
        packed['weights'][r, start] = 0
      packed['segments'][r, start:stop] = segment
      packed['positions'][r, start:stop] = np.arange(sizes[i])
      start = stop
  report = Packing(len(sizes), len(rows), int(sizes.sum()) / (len(rows) *
                                                              length))
  logging.info('packed %d examples into %d rows of %d tokens, %.1f%% full',
               report.examples, report.rows, length, 100 * report.filled)
  return packed, report


def segment_mask(segments):
  """int [B, T] -> bool [B, 1, T, T], True where both tokens are of one segment.

  Padding, segment 0, sees and is seen by nothing. Together with
  `peftjax.models.layers.causal_mask` of the positions it is the mask of packed
  rows.
  """
  a, b = segments[:, None, :, None], segments[:, None, None, :]
  return (a == b) & (b > 0)


def bucket_lengths(longest, count=4):
  """The `count` lengths longest, longest / 2, longest / 4, ..., ascending."""
  return tuple(sorted({max(1, -(-longest // 2 ** i)) for i in range(count)}))


def bucket_iterator(arrays, batch_size, seed, lengths, shard_index=0,
                    shard_count=1):
  """Endless shuffled batches, each of examples of about one length.

  An example goes to the bucket of the smallest of `lengths` that holds it, and
  its second text where that has rows of T tokens too; they are cut to that
  length. The order of examples and buckets
  is a function of seed and step: what is left of a bucket at the end of an
  epoch begins its next batch, so that e epochs hold every example e times, but
  for less than one batch a bucket. A bucket of fewer examples than batch_size
  gives a batch once so many have gathered, with repeats.

  Args:
    arrays: dict of arrays [N, ...] with mask [N, T]; every axis 1 of size T is
      taken for tokens.
    batch_size: examples a step over all shards.
    seed: of the order, 0 or more.
    lengths: of the buckets; the largest must hold the longest example.
    shard_index: which shard this process reads.
    shard_count: number of shards; must divide batch_size.

  Returns:
    A grain iterator over dicts of numpy arrays [batch_size / shard_count,
    length, ...] with get_state() and set_state(state); all shards get the same
    length at the same step, and their parts, one after the other, are the batch
    of a single one.
  """
  sizes = _both_sizes(arrays)
  pipeline.check_batch(len(sizes), batch_size, seed, shard_index, shard_count)
  lengths = sorted(set(lengths))
  if not lengths or lengths[0] < 1 or lengths[-1] < sizes.max():
    raise ValueError(f'lengths {lengths} of buckets, with examples of up to '
                     f'{sizes.max()} tokens; expected one that holds them all')
  place = np.searchsorted(lengths, sizes)
  members = [np.flatnonzero(place == b) for b in range(len(lengths))]
  counts = np.array([len(m) for m in members])
  tokens, part = arrays['mask'].shape[1], batch_size // shard_count

  def batches_until(epoch):
    """How many batches each bucket has given before that epoch."""
    return epoch * counts // batch_size

  # A batch needs one order, or few; making one costs as much as the epoch is
  # long.
  @functools.lru_cache(maxsize=4 * len(lengths))
  def order(bucket, epoch):
    rng = np.random.default_rng((seed, 0, bucket, epoch))
    return rng.permutation(members[bucket])

  @functools.lru_cache(maxsize=2)
  def turns_of(epoch):
    turns = np.repeat(np.arange(len(lengths)),
                      batches_until(epoch + 1) - batches_until(epoch))
    return np.random.default_rng((seed, 1, epoch)).permutation(turns)

  def batch(step):
    # The epoch of a step: its number of batches is monotone in the epoch.
    most = (step + 1 + len(lengths)) * batch_size // len(sizes) + 2
    epoch = bisect.bisect_right(
        range(most), step, key=lambda e: int(batches_until(e).sum())) - 1
    before, turns = batches_until(epoch), turns_of(epoch)
    turn = step - int(before.sum())
    bucket = turns[turn]
    first = (before[bucket] + (turns[:turn] == bucket).sum()) * batch_size
    places = first + shard_index * part + np.arange(part)
    epochs, within = np.divmod(places, counts[bucket])
    rows = np.array([order(int(bucket), int(e))[i]
                     for e, i in zip(epochs, within)])
    length = lengths[bucket]
    return {name: a[rows, :length] if a.ndim > 1 and a.shape[1] == tokens
            else a[rows] for name, a in arrays.items()}

  steps = grain.MapDataset.range(2 ** 40).map(batch)
  return iter(steps.to_iter_dataset(
      grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


# Rows of a second text, which has tokens of its own.
_SECOND = ('mask_b', 'target_weights')


def _both_sizes(arrays):
  """Tokens of every example, or of its second text if that is longer."""
  sizes = _sizes(arrays)
  for name in _SECOND:
    if name in arrays and arrays[name].shape == arrays['mask'].shape:
      sizes = np.maximum(sizes, _sizes(dict(mask=arrays[name] > 0)))
  return sizes


def _sizes(arrays):
  """Tokens of every example; a ValueError unless padding is at the end."""
  if 'mask' not in arrays or arrays['mask'].ndim != 2:
    raise ValueError(f'arrays {sorted(arrays)}; expected one named mask, '
                     '[N, T]')
  mask = arrays['mask'].astype(bool)
  sizes = mask.sum(1)
  wrong = np.flatnonzero(
      (mask != (np.arange(mask.shape[1]) < sizes[:, None])).any(1))
  if wrong.size:
    raise ValueError(f'example {wrong[0]} has padding before a real token; '
                     'expected it at the end')
  return sizes
