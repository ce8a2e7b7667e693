"""Packed rows and buckets of lengths."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.data import packing
from peftjax.data import pipeline
from peftjax.models import layers

RNG = np.random.default_rng(0)


def ragged(sizes, width=None):
  """Examples of those sizes whose ids are all different, from 1 on."""
  sizes = np.array(sizes)
  mask = np.arange(width or sizes.max()) < sizes[:, None]
  ids = np.zeros(mask.shape, np.int32)
  ids[mask] = 1 + np.arange(mask.sum())
  weights = mask.astype(np.float32)
  weights[:, 0] = 0
  return dict(ids=ids, mask=mask, weights=weights)


def take(batches, count):
  return [next(batches) for _ in range(count)]


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# ------------------------------------------------------------------ packing


def test_first_fit_takes_the_first_row_with_room():
  assert packing.first_fit([5, 4, 3, 3, 1, 2, 6], 8) == [
      [0, 2], [1, 3, 4], [5, 6]]


def test_first_fit_against_the_plain_definition():
  sizes = RNG.integers(1, 33, 300)
  rows, room = [], []
  for i, size in enumerate(sizes):
    fits = [r for r, left in enumerate(room) if left >= size]
    if not fits:
      rows.append([])
      room.append(32)
    row = fits[0] if fits else -1
    rows[row].append(i)
    room[row] -= size
  assert packing.first_fit(sizes, 32) == rows


def test_packed_arrays():
  arrays = ragged([3, 4, 2], 6)
  packed, report = packing.pack(arrays, 5, pad=9)
  np.testing.assert_array_equal(
      packed['ids'], [[1, 2, 3, 8, 9], [4, 5, 6, 7, 9]])
  np.testing.assert_array_equal(
      packed['segments'], [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]])
  np.testing.assert_array_equal(
      packed['positions'], [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]])
  np.testing.assert_array_equal(
      packed['weights'], [[0, 1, 1, 0, 1], [0, 1, 1, 1, 0]])
  np.testing.assert_array_equal(packed['mask'], packed['segments'] > 0)
  assert report == packing.Packing(3, 2, 0.9)
  assert {k: a.dtype for k, a in packed.items()} == {
      k: arrays[k].dtype if k in arrays else np.int32 for k in packed}


def test_weights_of_first_tokens_are_taken_away():
  arrays = ragged([3, 2])
  arrays['weights'][:] = arrays['mask']
  packed, _ = packing.pack(arrays, 5)
  np.testing.assert_array_equal(packed['weights'], [[0, 1, 1, 0, 1]])


def test_packed_logits_equal_single_ones():
  sizes = [3, 7, 2, 5, 1, 6]
  arrays = ragged(sizes, 8)
  table = RNG.normal(size=(1 + sum(sizes), 12)).astype(np.float32)
  places = RNG.normal(size=(8, 12)).astype(np.float32)

  def logits(ids, positions, mask):
    x = jnp.asarray(table)[ids] + jnp.asarray(places)[positions]
    q, k, v = (a.reshape(*a.shape[:2], 2, -1)
               for a in jnp.split(x, 3, axis=-1))
    return layers.attention(q, k, v, mask).reshape(*ids.shape, -1) @ (
        jnp.asarray(table)[:, :4].T)

  at = np.broadcast_to(np.arange(8), arrays['ids'].shape)
  single = logits(arrays['ids'], at, layers.causal_mask(at, at)
                  & layers.padding_mask(arrays['mask']))
  packed, _ = packing.pack(arrays, 9)
  assert len(packed['ids']) < len(sizes)
  p = packed['positions']
  found = logits(packed['ids'], p, layers.causal_mask(p, p)
                 & packing.segment_mask(packed['segments']))
  where = {int(t): found[i] for i, t in np.ndenumerate(packed['ids']) if t}
  for row, col in zip(*np.nonzero(arrays['mask'])):
    np.testing.assert_allclose(where[int(arrays['ids'][row, col])],
                               single[row, col], atol=1e-5)
  # Without segments the same rows mix their examples.
  mixed = logits(packed['ids'], p, layers.causal_mask(p, p))
  assert np.abs(mixed - found)[packed['mask']].max() > 1e-2


@pytest.mark.parametrize('arrays, length, words', [
    (ragged([3, 6]), 5, 'example 1 has 6 tokens; expected 1 to 5'),
    (ragged([3, 0]), 5, 'example 1 has 0 tokens'),
    (dict(ids=np.ones((2, 3))), 5, r"\['ids'\]; expected one named mask"),
    (ragged([3]) | dict(label=np.zeros(1)), 5,
     r"'label' of shape \[1\] cannot be packed; expected \[1, 3\]"),
    (ragged([3]) | dict(mask_b=np.ones((1, 3))), 5,
     "'mask_b' tells of a second text"),
    (dict(mask=np.array([[1, 1], [0, 1]])), 5, 'example 1 has padding before')])
def test_what_cannot_be_packed(arrays, length, words):
  with pytest.raises(ValueError, match=words):
    packing.pack(arrays, length)


# ------------------------------------------------------------------ buckets


def labelled(n=50, width=16):
  """Examples of 1 to `width` tokens whose label is their place."""
  arrays = ragged(RNG.integers(1, width + 1, n), width)
  return dict(arrays, label=np.arange(n, dtype=np.int32))


def test_bucket_lengths():
  assert packing.bucket_lengths(128) == (16, 32, 64, 128)
  assert packing.bucket_lengths(100, 3) == (25, 50, 100)
  assert packing.bucket_lengths(1) == (1,)


def test_batches_are_of_one_bucket_and_cut_to_it():
  arrays = labelled()
  sizes = arrays['mask'].sum(1)
  seen = set()
  for batch in take(packing.bucket_iterator(arrays, 4, 0, (4, 8, 16)), 24):
    length = batch['ids'].shape[1]
    seen.add(length)
    rows = batch['label']
    assert batch['ids'].shape == (4, length)
    assert (sizes[rows] <= length).all()
    assert (sizes[rows] > {4: 0, 8: 4, 16: 8}[length]).all()
    np.testing.assert_array_equal(
        batch['ids'], arrays['ids'][rows][:, :length])
  assert seen == {4, 8, 16}


@pytest.mark.parametrize('name', ['mask_b', 'target_weights'])
def test_buckets_hold_the_second_text_too(name):
  first = ragged([2, 2, 2, 2], 8)
  second = ragged([1, 5, 8, 3], 8)
  arrays = dict(mask=first['mask'], **{name: second['mask']},
                size=np.array([1, 5, 8, 3]))
  for batch in take(packing.bucket_iterator(arrays, 2, 0, (4, 8)), 8):
    np.testing.assert_array_equal(batch[name].sum(1), batch['size'])
    assert batch[name].shape == batch['mask'].shape


@pytest.mark.parametrize('batch_size', [4, 5, 20])
def test_every_epoch_holds_every_example_once(batch_size):
  arrays = labelled()
  batches = take(packing.bucket_iterator(arrays, batch_size, 1, (4, 8, 16)),
                 20 * 50 // batch_size)
  counts = np.bincount(np.concatenate([b['label'] for b in batches]))
  # 20 epochs but for what is left of the three buckets.
  assert (counts >= 20 - 2 * batch_size // 5).all()
  assert (counts <= 20 + 2 * batch_size // 5).all()
  # Within one bucket nothing comes again before everything came.
  for length in (4, 8, 16):
    rows = np.concatenate([b['label'] for b in batches
                           if b['ids'].shape[1] == length])
    members = len(set(rows.tolist()))
    for start in range(0, len(rows) - members + 1, members):
      assert len(set(rows[start:start + members].tolist())) == members


def test_epochs_and_seeds_have_other_orders():
  order = lambda seed: np.concatenate([b['label'] for b in take(
      packing.bucket_iterator(labelled_once, 5, seed, (16,)), 20)]).tolist()
  labelled_once = labelled()
  assert order(0) == order(0)
  assert order(0) != order(1)
  assert order(0)[:50] != order(0)[50:]
  assert sorted(order(0)[:50]) == sorted(order(0)[50:]) == list(range(50))


def test_shards_together_are_the_whole():
  arrays = labelled()
  whole = packing.bucket_iterator(arrays, 6, 2, (8, 16))
  parts = [packing.bucket_iterator(arrays, 6, 2, (8, 16), i, 2)
           for i in range(2)]
  for batch in take(whole, 30):
    a, b = (next(p) for p in parts)
    assert a['ids'].shape == b['ids'].shape == (3, batch['ids'].shape[1])
    joined = jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b)
    equal(joined, batch)


def test_resumes_in_mid_epoch_from_json():
  arrays = labelled()
  make = lambda: packing.bucket_iterator(arrays, 4, 3, (4, 8, 16))
  batches = make()
  take(batches, 19)
  state = json.loads(json.dumps(batches.get_state()))
  want = take(batches, 30)
  other = make()
  other.set_state(state)
  equal(take(other, 30), want)


@pytest.mark.parametrize('options, words', [
    (dict(lengths=(4, 8)), r'lengths \[4, 8\] of buckets, with examples of up'),
    (dict(lengths=()), r'lengths \[\]'),
    (dict(batch_size=51), 'batch_size 51 with 50 examples; choose 1 to 50'),
    (dict(shard_count=3), 'shard_count 3 does not divide batch_size 4'),
    (dict(shard_count=0), 'shard_count 0; choose 1 or more'),
    (dict(shard_index=1), 'shard_index 1 with 1 shards'),
    (dict(seed=-1), 'seed -1; choose 0 or more')])
def test_buckets_that_are_wrong(options, words):
  arrays = labelled()
  arrays['mask'][0] = True
  with pytest.raises(ValueError, match=words):
    packing.bucket_iterator(arrays, **(
        dict(batch_size=4, seed=0, lengths=(4, 8, 16)) | options))


def test_batches_of_text_for_evaluation_keep_their_mask():
  arrays = ragged([3, 2, 1])
  *_, last = pipeline.eval_batches(arrays, 2)
  np.testing.assert_array_equal(last['valid'], [True, False])
  np.testing.assert_array_equal(last['mask'], [[1, 0, 0], [0, 0, 0]])
  with pytest.raises(ValueError, match="'valid' is the name of what tells"):
    next(pipeline.eval_batches(arrays | dict(valid=np.ones(3)), 2))
