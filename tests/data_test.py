"""Data builders and batches."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from peftjax.data import builders
from peftjax.data.pipeline import check_labels
from peftjax.data.pipeline import eval_batches
from peftjax.data.pipeline import load_split
from peftjax.data.pipeline import scale_images
from peftjax.data.pipeline import train_iterator

COUNTS = dict(
    digits=(800, 200, 797, 10), fashion_mnist=(800, 200, 2000, 10),
    kmnist=(800, 200, 2000, 10), omniglot100=(800, 200, 1000, 100))


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """A cache folder of this module's own."""
  folder = tmp_path_factory.mktemp('cache')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PEFTJAX_CACHE', str(folder))
    yield folder


def numbered(n):
  """n examples whose label is their place."""
  label = np.arange(n, dtype=np.int32)
  return dict(image=np.ones((n, 2, 2, 3), np.float32) * label[:, None, None,
                                                              None],
              label=label)


def take(batches, count):
  return [next(batches)['label'].tolist() for _ in range(count)]


# ---------------------------------------------------------------- builders


def test_every_set_has_its_counts():
  assert set(builders.NAMES) == set(COUNTS)


@pytest.mark.parametrize('name', COUNTS)
def test_split_counts_and_contents(cache, name):
  *counts, classes = COUNTS[name]
  builder = builders.prepared(name)
  assert builder.info.features['label'].num_classes == classes
  images = []
  for split, n in zip(('train', 'validation', 'test'), counts):
    arrays = load_split(name, split)
    assert arrays['image'].shape == (n, 32, 32, 3)
    assert arrays['image'].dtype == np.float32
    assert arrays['label'].dtype == np.int32
    assert set(arrays['label']) == set(range(classes))
    assert arrays['image'].min() == -1 and 0.9 < arrays['image'].max() <= 1
    source = builder.as_data_source(split)
    assert len(source) == n
    images.append(np.stack([source[i]['image'] for i in range(n)]))
  parts = [{i.tobytes() for i in x} for x in images]
  shared = len(parts[0] & parts[2]) + len(parts[1] & parts[2])
  # A few drawings may repeat by nature; a split read twice would be hundreds.
  assert shared <= 5


def test_examples_are_those_of_the_file(cache):
  path = pathlib.Path(builders.__file__).parent / 'assets' / 'kmnist.npz'
  with np.load(path) as z:
    want = sorted((x.tobytes(), int(y))
                  for x, y in zip(z['x_val'], z['y_val']))
  source = builders.prepared('kmnist').as_data_source('validation')
  got = sorted((e['image'].tobytes(), int(e['label']))
               for e in (source[i] for i in range(len(source))))
  assert got == want


def test_tensorflow_is_not_needed(tmp_path):
  """A set can be prepared and read with no TensorFlow to be found."""
  code = (
      "import sys\n"
      "class Hide:\n"
      "  def __init__(self, finder):\n"
      "    self.finder = finder\n"
      "  def find_spec(self, name, *args):\n"
      "    if name.split('.')[0] != 'tensorflow':\n"
      "      return self.finder.find_spec(name, *args)\n"
      "sys.meta_path[:] = [Hide(f) for f in sys.meta_path]\n"
      "from peftjax.data.pipeline import load_split\n"
      "print(len(load_split('digits', 'test')['label']),\n"
      "      'tensorflow' in sys.modules)")
  env = {**_environment(), 'PEFTJAX_CACHE': str(tmp_path)}
  run = subprocess.run([sys.executable, '-c', code], capture_output=True,
                       text=True, env=env)
  assert run.stdout.split()[-2:] == ['797', 'False'], run.stderr


def test_two_processes_at_once(tmp_path):
  code = (
      "from peftjax.data.pipeline import load_split\n"
      "print(load_split('omniglot100', 'test')['label'].sum())")
  env = {**_environment(), 'PEFTJAX_CACHE': str(tmp_path)}
  runs = [subprocess.Popen([sys.executable, '-c', code], text=True, env=env,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
          for _ in range(2)]
  for run in runs:
    out, err = run.communicate(timeout=120)
    assert out.split()[-1:] == [str(99 * 50 * 10)], err


def test_threads_share_a_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('PEFTJAX_CACHE', str(tmp_path))
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    sizes = list(pool.map(
        lambda _: len(load_split('kmnist', 'validation')['label']), range(4)))
  assert sizes == [200] * 4


@pytest.mark.parametrize('damage', ['cut', 'flip', 'remove', 'stamp', 'half'])
def test_broken_files_are_made_again(tmp_path, monkeypatch, damage):
  monkeypatch.setenv('PEFTJAX_CACHE', str(tmp_path))
  want = load_split('kmnist', 'validation')
  folder = pathlib.Path(builders.prepared('kmnist').data_dir)
  record, = folder.glob('*validation*')
  if damage == 'cut':
    record.write_bytes(record.read_bytes()[:1000])
  elif damage == 'flip':
    data = bytearray(record.read_bytes())
    data[len(data) // 2] ^= 255
    record.write_bytes(data)
  elif damage == 'remove':
    (folder / 'dataset_info.json').unlink()
  elif damage == 'stamp':
    (folder / 'checksums.json').write_text('{')
  else:
    # As a process leaves it that is killed before the end.
    folder.rename(folder.with_name('incomplete.X_1.0.0'))
  got = load_split('kmnist', 'validation')
  np.testing.assert_array_equal(got['image'], want['image'])
  np.testing.assert_array_equal(got['label'], want['label'])
  assert [p.name for p in folder.parent.iterdir()] == ['1.0.0']


def test_whole_files_are_kept(cache):
  folder = pathlib.Path(builders.prepared('kmnist').data_dir)
  before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
  builders.prepared('kmnist')
  assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('PEFTJAX_CACHE', str(tmp_path / 'file'))
  with pytest.raises(OSError, match='Set PEFTJAX_CACHE'):
    builders.prepared('kmnist')


def test_unknown_names(cache):
  with pytest.raises(ValueError, match="'kmnst'; nearest: kmnist"):
    load_split('kmnst', 'train')
  with pytest.raises(ValueError, match="no split 'valid'; nearest: validat"):
    load_split('kmnist', 'valid')


# ----------------------------------------------------------------- batches


def test_scale_images():
  grey = np.array([[[[0], [255]], [[51], [102]]]], np.uint8)
  got = scale_images(grey, 2)
  assert got.shape == (1, 2, 2, 3)
  np.testing.assert_allclose(got[0, :, :, 1], [[-1, 1], [-0.6, -0.2]],
                             atol=1e-6)
  big = scale_images(grey, 4)
  # Bilinear: each new corner keeps its pixel, halves lie between.
  np.testing.assert_allclose(big[0, 0, :, 0], [-1, -0.5, 0.5, 1], atol=1e-6)


def test_order_is_fixed_by_the_seed():
  a = take(train_iterator(numbered(20), 6, seed=1), 12)
  assert a == take(train_iterator(numbered(20), 6, seed=1), 12)
  assert a != take(train_iterator(numbered(20), 6, seed=2), 12)


def test_epochs_are_complete_and_differ():
  flat = sum(take(train_iterator(numbered(20), 6, seed=0), 20), [])
  epochs = [flat[i:i + 20] for i in range(0, 120, 20)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(20))
  assert len(set(map(tuple, epochs))) == 6


def test_rows_stay_together():
  batch = next(train_iterator(numbered(20), 6, seed=0))
  assert batch['image'].shape == (6, 2, 2, 3)
  np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])


@pytest.mark.parametrize('at', [0, 1, 5, 11])
def test_resume_is_exact(at):
  batches = train_iterator(numbered(20), 6, seed=0)
  want = take(batches, 15)
  batches = train_iterator(numbered(20), 6, seed=0)
  take(batches, at)
  state = json.loads(json.dumps(batches.get_state()))
  fresh = train_iterator(numbered(20), 6, seed=0)
  take(fresh, 3)
  fresh.set_state(state)
  assert take(fresh, 15 - at) == want[at:]


def test_shards_together_are_the_whole():
  whole = take(train_iterator(numbered(20), 6, seed=0), 10)
  shards = [take(train_iterator(numbered(20), 6, seed=0, shard_index=i,
                                shard_count=3), 10) for i in range(3)]
  for batch, *parts in zip(whole, *shards):
    assert [len(p) for p in parts] == [2, 2, 2]
    assert batch == sum(parts, [])


@pytest.mark.parametrize('n, size', [(10, 4), (8, 4), (3, 4)])
def test_eval_batches(n, size):
  batches = list(eval_batches(numbered(n), size))
  assert len(batches) == -(-n // size)
  seen = []
  for b in batches:
    assert b['image'].shape == (size, 2, 2, 3) and b['valid'].shape == (size,)
    assert b['valid'].dtype == bool
    assert not b['image'][~b['valid']].any() and not b['label'][~b['valid']].any()
    seen += b['label'][b['valid']].tolist()
  assert seen == list(range(n))


@pytest.mark.parametrize('kwargs, match', [
    (dict(batch_size=21), 'batch_size 21 with 20 examples; choose 1 to 20'),
    (dict(batch_size=0), 'batch_size 0 .* choose 1 to 20'),
    (dict(batch_size=6, shard_count=4), '4 does not divide .* nearest: 3'),
    (dict(batch_size=6, shard_index=2, shard_count=2),
     'shard_index 2 with 2 shards; choose 0 to 1'),
])
def test_bad_batches(kwargs, match):
  with pytest.raises(ValueError, match=match):
    train_iterator(numbered(20), seed=0, **kwargs)


def test_bad_arrays():
  arrays = numbered(20)
  with pytest.raises(ValueError, match="lengths: {'image': 20, 'label': 19}"):
    train_iterator({**arrays, 'label': arrays['label'][1:]}, 4, seed=0)
  with pytest.raises(ValueError, match='batch_size 0; choose 1 or more'):
    next(eval_batches(arrays, 0))


@pytest.mark.parametrize('wrong', [-1, 10])
def test_labels_outside_the_label_set(wrong):
  label = np.arange(10)
  check_labels(label, 10)
  label[4] = wrong
  with pytest.raises(ValueError, match=f'label {wrong} of example 4 .* 0 .. 9'):
    check_labels(label, 10)


def _environment():
  root = pathlib.Path(builders.__file__).parents[2]
  return {**os.environ, 'PYTHONPATH': str(root)}
