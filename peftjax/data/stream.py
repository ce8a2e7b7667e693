"""Batches of sets that do not fit in memory, and prefetch to devices.

  batches = stream(source.examples, encode, batch_size=32, seed=0)
  batches = DevicePrefetch(batches, sharding)
  batch = next(batches)                   # dict of arrays on the devices
  state = batches.get_state()             # JSON; a checkpoint keeps it

Examples are read, augmented and encoded by threads while the step runs. Which
example comes at which place, and how it is augmented, is a function of seed and
place alone: not of the number of shards or threads, nor of where a run was
stopped.
"""

import collections
import threading
from typing import Any, Callable, NamedTuple, Optional

from absl import logging
import grain
import jax
import numpy as np

from peftjax.data import encoding
from peftjax.data import pipeline


class Split(NamedTuple):
  """A split that is encoded as it is read, in the place of its arrays.

  Attributes:
    examples: random access, see `stream`.
    encode: list of examples -> arrays, or (arrays, Report); always the same
      shapes for as many examples.
    augment: see `stream`.
  """

  examples: Any
  encode: Callable
  augment: Optional[Callable] = None


def sample(split, count=1):
  """{name: [count, ...]} of the first examples of a Split."""
  examples = [split.examples[i] for i in range(min(count, len(split.examples)))]
  if split.augment:
    random = np.random.default_rng(0)
    examples = [split.augment(e, random) for e in examples]
  return _encoder(split.encode)(examples)


def eval_batches(split, batch_size, threads=2, ahead=2):
  """All examples of a Split once, in order, in batches of one shape.

  Args:
    split: a Split.
    batch_size: examples at a time.
    threads, ahead: as of `stream`.

  Yields:
    Dicts of arrays [batch_size, ...] and 'valid' [batch_size], bool. The last
    batch is filled up with the last example, where valid is False.
  """
  examples, encode = split.examples, _encoder(split.encode)
  n = len(examples)
  if batch_size < 1:
    raise ValueError(f'batch_size {batch_size}; choose 1 or more')

  def read(start):
    places = np.arange(start, start + batch_size)
    rows = [examples[min(int(i), n - 1)] for i in places]
    return {**encode(rows), 'valid': places < n}

  yield from grain.MapDataset.range(0, n, batch_size).map(read).to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))


def stream(examples, encode=None, *, batch_size, seed, augment=None,
           shard_index=0, shard_count=1, threads=2, ahead=4):
  """Endless shuffled batches, reshuffled every epoch.

  Every epoch holds every example once; a batch may span two epochs. The parts
  of all shards, one after the other, are the batch of a single one.

  Args:
    examples: random access, len() and [i], from any thread: all that is read
      at a time are the examples of the batches under way.
    encode: list of examples -> dict of arrays [n, ...], or (dict, Report) such
      as the functions of `peftjax.data.text` return; the same shapes for every
      list of n, else `next` raises a ValueError. None: values are stacked.
    batch_size: examples a step over all shards.
    seed: of order and augmentation, 0 or more.
    augment: (example, numpy Generator) -> example, before encode; None: none.
    shard_index: which shard this process reads.
    shard_count: number of shards; must divide batch_size.
    threads: how many prepare batches; 0: `next` does.
    ahead: batches that they prepare ahead of `next`.

  Returns:
    A grain iterator over dicts of numpy arrays [batch_size / shard_count, ...]
    with get_state() and set_state(state).
  """
  n = len(examples)
  pipeline.check_batch(n, batch_size, seed, shard_index, shard_count)
  for name, value in (('threads', threads), ('ahead', ahead)):
    if value < 0:
      raise ValueError(f'{name} {value}; choose 0 or more')
  order = pipeline.forever(
      grain.MapDataset.source(examples).shuffle(seed=seed))
  if augment is not None:
    # Before the shards are told apart: the generator is that of the place.
    order = order.random_map(augment, seed=seed)
  order = pipeline.part(order, batch_size, shard_index, shard_count).batch(
      batch_size // shard_count, batch_fn=list)
  return iter(order.map(_encoder(encode)).to_iter_dataset(grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=ahead)))


def _encoder(encode):
  """List of examples -> dict of arrays, whose shapes stay as they are."""
  lock, shapes = threading.Lock(), {}
  counts = dict(examples=0, cut=0, told=1)

  def count(report):
    """Logs what was cut so far whenever it has doubled."""
    counts['examples'] += report.examples
    counts['cut'] += report.truncated + report.dropped
    if counts['cut'] >= counts['told']:
      counts['told'] = 2 * counts['cut']
      logging.warning('stream: %d of %d examples were cut so far',
                      counts['cut'], counts['examples'])

  def run(examples):
    if encode is None:
      return {k: np.stack([e[k] for e in examples]) for k in examples[0]}
    with encoding.quietly():
      arrays = encode(examples)
    report = None
    if isinstance(arrays, tuple):
      arrays, report = arrays
    with lock:
      if report is not None:
        count(report)
      found = {k: np.shape(a) for k, a in arrays.items()}
      if shapes.setdefault('first', found) != found:
        raise ValueError(f'a batch of shapes {found} after one of '
                         f'{shapes["first"]}; expected the same for all')
    return arrays

  return run


class DevicePrefetch:
  """Puts batches on devices while earlier ones are computed with.

  Args:
    batches: iterator over dicts of this process's numpy arrays, with
      get_state() and set_state(state).
    sharding: of the batches' arrays, a Sharding over the devices of all
      processes.
    ahead: batches that lie on the devices besides the one in use.

  `get_state()` is that of the batches given out: those that lie ahead are read
  again after `set_state`.
  """

  def __init__(self, batches, sharding, ahead=2):
    if ahead < 0:
      raise ValueError(f'ahead {ahead}; choose 0 or more')
    self._batches, self._sharding, self._ahead = batches, sharding, ahead
    self._ready = collections.deque()
    self._state = batches.get_state()

  def __iter__(self):
    return self

  def __next__(self):
    # One more than `ahead`: the one that is given out now.
    while len(self._ready) <= self._ahead:
      try:
        batch = next(self._batches)
      except StopIteration:
        break
      # Returns before the copy is done; the step waits for it on the device.
      batch = {k: jax.make_array_from_process_local_data(self._sharding, a)
               for k, a in batch.items()}
      self._ready.append((batch, self._batches.get_state()))
    if not self._ready:
      raise StopIteration
    batch, self._state = self._ready.popleft()
    return batch

  def get_state(self):
    """State after the last batch given out."""
    return self._state

  def set_state(self, state):
    """Continues after the batch of that state."""
    self._ready.clear()
    self._batches.set_state(state)
    self._state = state
