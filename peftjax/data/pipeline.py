"""Image sets in memory, batches for training and for evaluation.

  arrays = load_split('kmnist', 'train')
  batches = train_iterator(arrays, batch_size=32, seed=0)
  batch = next(batches)                   # {'image': ..., 'label': ...}
  state = batches.get_state()             # JSON; a checkpoint keeps it
  batches.set_state(state)                # the next batch is the same again

The sets are small, so that they are decoded, resized and scaled once, and the
order of examples is a pure function of seed and position: resuming reads no
batch twice and skips none.
"""

import difflib

import grain
import jax
import jax.numpy as jnp
import numpy as np

from peftjax.data.examples import Examples


def load_split(name, split, size=32):
  """Reads one split of one set.

  Args:
    name: a set of `peftjax.data.builders`.
    split: 'train', 'validation' or 'test'.
    size: side of the images in pixels.

  Returns:
    dict(image=float32 [N, size, size, 3] in -1 to 1, label=int32 [N]).

  Raises:
    ValueError: unknown set or split, or a label outside the label set.
  """
  # Here, since it brings tensorflow_datasets along.
  from peftjax.data.builders import prepared
  builder = prepared(name)
  splits = list(builder.info.splits)
  if split not in splits:
    near = difflib.get_close_matches(split, splits, 1, 0.3) or splits
    raise ValueError(f'{name} has no split {split!r}; nearest: '
                     f'{", ".join(near)}, of {", ".join(splits)}')
  source = builder.as_data_source(split)
  examples = source.__getitems__(range(len(source)))
  label = np.array([e['label'] for e in examples], np.int32)
  check_labels(label, builder.info.features['label'].num_classes)
  image = np.stack([e['image'] for e in examples])
  return dict(image=scale_images(image, size), label=label)


def scale_images(images, size):
  """uint8 [N, H, W, 1 or 3] -> float32 [N, size, size, 3], pixel/127.5 - 1."""
  x = jnp.asarray(images, jnp.float32)
  x = jax.image.resize(x, (len(x), size, size, x.shape[-1]), 'bilinear')
  return np.asarray(jnp.broadcast_to(x, (*x.shape[:3], 3)) / 127.5 - 1)


def check_labels(label, classes):
  """Raises a ValueError unless all labels are in 0 .. classes - 1."""
  wrong = np.flatnonzero((label < 0) | (label >= classes))
  if wrong.size:
    raise ValueError(
        f'label {label[wrong[0]]} of example {wrong[0]} is outside the label '
        f'set 0 .. {classes - 1} ({wrong.size} such examples)')


def train_iterator(arrays, batch_size, seed, shard_index=0, shard_count=1):
  """Endless shuffled batches, reshuffled every epoch.

  Every epoch holds every example once; a batch may span two epochs. The parts
  of all shards, one after the other, are the batch of a single one.

  Args:
    arrays: dict of arrays with the same leading axis N, such as `load_split`
      returns.
    batch_size: examples a step over all shards.
    seed: of the order, 0 or more.
    shard_index: which shard this process reads.
    shard_count: number of shards; must divide batch_size.

  Returns:
    A grain iterator over dicts of numpy arrays [batch_size / shard_count,
    ...] with get_state() and set_state(state).
  """
  n = _size(arrays)
  check_batch(n, batch_size, seed, shard_index, shard_count)
  order = forever(grain.MapDataset.range(n).shuffle(seed=seed))
  order = part(order, batch_size, shard_index, shard_count).batch(
      batch_size // shard_count)
  gather = lambda rows: {k: a[rows] for k, a in arrays.items()}
  # No threads: a batch is one gather from memory.
  return iter(order.map(gather).to_iter_dataset(
      grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def forever(dataset):
  """Repeats a grain MapDataset: more epochs than any run sees.

  grain's own endless repeat is sys.maxsize long, which batches of one example
  round up to a length that Python cannot hold.
  """
  return dataset.repeat(max(1, 2 ** 50 // len(dataset)))


def part(dataset, batch_size, shard_index, shard_count):
  """A shard's rows of every batch of a grain MapDataset.

  They are neighbours, as the rows are that one process's devices hold: a
  batch has the same order however many processes read it.
  """
  if shard_count == 1:
    return dataset
  rows = batch_size // shard_count
  first = shard_index * rows

  def get(i):
    batch, row = divmod(i, rows)
    return dataset[batch * batch_size + first + row]

  return grain.MapDataset.source(
      Examples(len(dataset) // batch_size * rows, get))


def check_batch(n, batch_size, seed, shard_index, shard_count):
  """Raises a ValueError unless n examples give such batches and shards."""
  if not 1 <= batch_size <= n:
    raise ValueError(
        f'batch_size {batch_size} with {n} examples; choose 1 to {n}')
  if shard_count < 1:
    raise ValueError(f'shard_count {shard_count}; choose 1 or more')
  if batch_size % shard_count:
    divisors = [d for d in range(1, batch_size + 1) if batch_size % d == 0]
    near = min(divisors, key=lambda d: abs(d - shard_count))
    raise ValueError(
        f'shard_count {shard_count} does not divide batch_size {batch_size}; '
        f'nearest: {near}')
  if not 0 <= shard_index < shard_count:
    raise ValueError(
        f'shard_index {shard_index} with {shard_count} shards; choose 0 to '
        f'{shard_count - 1}')
  if seed < 0:
    raise ValueError(f'seed {seed}; choose 0 or more')


def eval_batches(arrays, batch_size):
  """All examples once, in order, in batches of one shape.

  Yields:
    Dicts of arrays [batch_size, ...] and 'valid' [batch_size], bool. The last
    batch is filled up with zeros, where valid is False.
  """
  n = _size(arrays)
  if 'valid' in arrays:
    raise ValueError(f"arrays {sorted(arrays)}; 'valid' is the name of what "
                     'tells examples from filling')
  if batch_size < 1:
    raise ValueError(f'batch_size {batch_size}; choose 1 or more')
  for start in range(0, n, batch_size):
    rows = min(batch_size, n - start)
    fill = lambda a: np.pad(
        a, [(0, batch_size - rows)] + [(0, 0)] * (a.ndim - 1))
    batch = {k: fill(a[start:start + rows]) for k, a in arrays.items()}
    yield {**batch, 'valid': np.arange(batch_size) < rows}


def _size(arrays):
  sizes = {k: len(a) for k, a in arrays.items()}
  if len(set(sizes.values())) != 1:
    raise ValueError(f'arrays of different lengths: {sizes}')
  return next(iter(sizes.values()))
