"""Streams: order, shards, resuming, fixed shapes, prefetch to devices."""

import json
import os
import signal
import subprocess
import sys
import threading

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest
import tokenizers

from peftjax.data import pipeline
from peftjax.data import stream
from peftjax.data import text
from peftjax.data.tokenizer import Tokenizer

N = 21


class Numbers:
  """Random access to {'x': place}; remembers which threads read it."""

  def __init__(self):
    self.threads = set()

  def __len__(self):
    return N

  def __getitem__(self, i):
    self.threads.add(threading.get_ident())
    return dict(x=np.int32(i))


def noisy(example, rng):
  return dict(example, noise=rng.random(3))


def make(**options):
  return stream.stream(Numbers(), augment=noisy, **(
      dict(batch_size=4, seed=5) | options))


def take(batches, count):
  return [next(batches) for _ in range(count)]


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def values(batches):
  return np.concatenate([b['x'] for b in batches]).tolist()


def test_every_epoch_holds_every_example_once_in_another_order():
  seen = values(take(make(), 2 * N // 2))
  epochs = [seen[i:i + N] for i in range(0, 2 * N, N)]
  assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(N))
  assert epochs[0] != epochs[1]
  assert epochs[0] != list(range(N))
  assert seen != values(take(make(seed=6), 2 * N // 2))


def test_batches_of_one_example():
  assert sorted(values(take(make(batch_size=1), N))) == list(range(N))
  arrays = dict(x=np.arange(N))
  batches = pipeline.train_iterator(arrays, batch_size=2, seed=0, shard_count=2)
  assert len(next(batches)['x']) == 1


def test_order_and_augmentation_do_not_depend_on_threads():
  want = take(make(threads=0), 15)
  assert len({b['noise'].tobytes() for b in want}) == 15
  equal(take(make(threads=3, ahead=7), 15), want)
  equal(take(make(threads=1, ahead=0), 15), want)


def test_threads_read_the_examples():
  examples = Numbers()
  take(stream.stream(examples, batch_size=4, seed=0, threads=2), 6)
  assert threading.get_ident() not in examples.threads


@pytest.mark.parametrize('count', [2, 4])
def test_shards_together_are_the_whole(count):
  whole = make()
  parts = [make(shard_index=i, shard_count=count) for i in range(count)]
  for batch in take(whole, 15):
    joined = jax.tree.map(
        lambda *x: np.concatenate(x), *(next(p) for p in parts))
    equal(joined, batch)


@pytest.mark.parametrize('step', [0, 3, 7])
def test_resumes_from_json(step):
  batches = make()
  take(batches, step)
  state = json.loads(json.dumps(batches.get_state()))
  want = take(batches, 12)
  other = make()
  take(other, 2)
  other.set_state(state)
  equal(take(other, 12), want)


KILLED = """
import json, os, signal
from tests.data.stream_test import make
batches = make()
for i in range(9):
  x = next(batches)['x'].tolist()
  print(json.dumps(dict(x=x, state=batches.get_state())), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_continues_where_it_was(request):
  killed = subprocess.run(
      [sys.executable, '-c', KILLED], cwd=request.config.rootpath,
      capture_output=True, text=True, timeout=120, check=False)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  lines = [json.loads(line) for line in killed.stdout.splitlines()]
  want = take(make(), 20)
  assert [line['x'] for line in lines] == [b['x'].tolist() for b in want[:9]]
  other = make()
  other.set_state(lines[-1]['state'])
  equal(take(other, 11), want[9:])


def test_the_benchmark_compares_with_the_step(request):
  done = subprocess.run(
      [sys.executable, '-m', 'benchmarks.input', '--seconds=0', '--batch=8',
       '--step_ms=50'],
      cwd=request.config.rootpath, capture_output=True, text=True,
      timeout=300, check=True, env=dict(os.environ, JAX_PLATFORMS='cpu'))
  found = json.loads(done.stdout)
  assert found['step_ms'] == 50 and len(found['pipelines']) == 6
  for row in found['pipelines'].values():
    assert row['ratio'] == pytest.approx(50 / row['batch_ms'], rel=0.02)
    assert row['examples_per_s'] == pytest.approx(
        8000 / row['batch_ms'], rel=0.02)
  real = [row.get('real') for row in found['pipelines'].values()]
  assert real[3] > real[2]  # buckets hold less padding


# ----------------------------------------------------------------- encoding


@pytest.fixture(scope='module')
def tokenizer():
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {w: i for i, w in enumerate('abcd')}, 'a'))
  core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  return Tokenizer(core, 4, 0)


TEXTS = [dict(text='b c', label=0), dict(text='c', label=1),
         dict(text='d ' * 9, label=2)]


def encode(tokenizer):
  return lambda examples: text.encode_classification(examples, tokenizer, 4)


def test_texts_are_encoded_as_in_memory(tokenizer):
  whole, _ = text.encode_classification(TEXTS, tokenizer, 4)
  batches = stream.stream(TEXTS, encode(tokenizer), batch_size=2, seed=0)
  for batch in take(batches, 9):
    equal(batch, {k: a[batch['label']] for k, a in whole.items()})
    assert batch['ids'].shape == (2, 4)


def test_cuts_are_logged_whenever_they_have_doubled(tokenizer, caplog):
  batches = stream.stream(
      TEXTS, encode(tokenizer), batch_size=3, seed=0, threads=0)
  with caplog.at_level('INFO', logger='absl'):
    take(batches, 9)
  # Other tests' threads may still be logging.
  mine = threading.get_ident()
  assert [r.getMessage() for r in caplog.records if r.thread == mine] == [
      f'stream: {n} of {3 * n} examples were cut so far' for n in (1, 2, 4, 8)]


def test_shapes_that_change_are_refused(tokenizer):
  longest = lambda examples: text.encode_classification(
      examples, tokenizer, max(len(e['text'].split()) for e in examples))
  batches = stream.stream(TEXTS, longest, batch_size=1, seed=0, threads=0)
  with pytest.raises(ValueError, match='expected the same for all'):
    take(batches, 3)


@pytest.mark.parametrize('options, words', [
    (dict(batch_size=22), 'batch_size 22 with 21 examples'),
    (dict(shard_count=3), 'shard_count 3 does not divide batch_size 4'),
    (dict(shard_index=2, shard_count=2), 'shard_index 2 with 2 shards'),
    (dict(seed=-1), 'seed -1; choose 0 or more'),
    (dict(threads=-1), 'threads -1; choose 0 or more'),
    (dict(ahead=-1), 'ahead -1; choose 0 or more')])
def test_options_that_are_wrong(options, words):
  with pytest.raises(ValueError, match=words):
    make(**options)


# ----------------------------------------------------------------- prefetch


def sharded(devices=4):
  mesh = Mesh(np.array(jax.devices()[:devices]), ('data',))
  return NamedSharding(mesh, PartitionSpec('data'))


def test_prefetch_gives_the_same_batches_on_the_devices():
  place = sharded()
  batches = stream.DevicePrefetch(make(), place)
  for want in take(make(), 9):
    batch = next(batches)
    assert all(a.sharding.is_equivalent_to(place, a.ndim)
               for a in batch.values())
    equal({k: np.asarray(a, want[k].dtype) for k, a in batch.items()},
          {k: a.astype(np.asarray(batch[k]).dtype).astype(a.dtype)
           for k, a in want.items()})


@pytest.mark.parametrize('ahead', [0, 1, 2])
def test_prefetch_reads_ahead_and_no_further(ahead):
  given = []

  class Counting:
    get_state = staticmethod(lambda: len(given))

    def __next__(self):
      given.append(0)
      return dict(x=np.zeros(4))

  batches = stream.DevicePrefetch(Counting(), sharded(), ahead)
  assert not given
  for step in range(1, 4):
    next(batches)
    assert len(given) == step + ahead
    assert batches.get_state() == step


@pytest.mark.parametrize('step', [0, 5])
def test_prefetch_resumes_after_the_batches_given_out(step):
  batches = stream.DevicePrefetch(make(), sharded())
  take(batches, step)
  state = json.loads(json.dumps(batches.get_state()))
  want = values(take(make(), step + 6)[step:])
  assert values(take(batches, 6)) == want
  other = stream.DevicePrefetch(make(), sharded())
  take(other, 3)
  other.set_state(state)
  assert other.get_state() == state
  assert values(take(other, 6)) == want


def test_prefetch_ends_with_its_batches():
  class Few:
    left = [dict(x=np.full(4, i)) for i in range(3)]
    get_state = staticmethod(lambda: None)

    def __next__(self):
      if not self.left:
        raise StopIteration
      return self.left.pop(0)

  batches = stream.DevicePrefetch(Few(), sharded())
  assert [int(b['x'][0]) for b in batches] == [0, 1, 2]
  with pytest.raises(ValueError, match='ahead -1; choose 0 or more'):
    stream.DevicePrefetch(Few(), sharded(), -1)
