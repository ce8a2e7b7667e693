"""Small image sets as tensorflow-datasets builders that need no TensorFlow.

  source = prepared('kmnist').as_data_source('train')
  source[0]                 # {'image': uint8 [28, 28, 1], 'label': int}

Sets: those in `assets/` (see its LICENSES.md) and scikit-learn's 'digits'.
All have the splits 'train' (800 examples), 'validation' (200) and 'test'.

Prepared files are array records below $PEFTJAX_CACHE, or ~/.cache/peftjax. One
lock a set keeps two processes from preparing it at once, and a file that was
changed since is noticed by its checksum and made again.
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil

from etils import epath
import numpy as np
import tensorflow_datasets as tfds

_ASSETS = pathlib.Path(__file__).parent / 'assets'
_STAMP = 'checksums.json'
# Names of the arrays in an asset by split.
_PARTS = dict(train='train', validation='val', test='test')
_DESCRIPTIONS = dict(
    digits='8x8 handwritten digits of the UCI repository (Alpaydin and '
           'Kaynak, 1998), the copy in scikit-learn.',
    fashion_mnist='28x28 articles of clothing (Xiao et al., arXiv '
                  '1708.07747). Train and validation are drawn from the '
                  'official training images, test from the official test.',
    kmnist='28x28 cursive Japanese characters (Clanuwat et al., arXiv '
           '1812.01718). Disjoint draws from the official test images.',
    omniglot100='28x28 drawings of 100 characters from five alphabets (Lake '
                'et al., Science 350, 2015), 8 + 2 + 10 of each character.')

NAMES = tuple(_DESCRIPTIONS)


class PeftjaxImages(tfds.core.GeneratorBasedBuilder):
  """One configuration a set; images uint8 [H, W, C], labels from 0."""

  # Otherwise tensorflow-datasets (seen in 4.9.10) looks the path up with
  # importlib_resources, which it does not require to be installed.
  code_path = epath.Path(__file__)
  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, description=text)
                     for name, text in _DESCRIPTIONS.items()]

  def _info(self):
    name = self.builder_config.name
    side = 8 if name == 'digits' else 28
    features = tfds.features.FeaturesDict(dict(
        image=tfds.features.Tensor(shape=(side, side, 1), dtype=np.uint8),
        label=tfds.features.ClassLabel(names=_label_names(name))))
    return tfds.core.DatasetInfo(
        builder=self, features=features, supervised_keys=('image', 'label'),
        description=_DESCRIPTIONS[name])

  def _split_generators(self, dl_manager):
    del dl_manager
    arrays = _read(self.builder_config.name)
    return {split: self._generate_examples(*arrays[split])
            for split in _PARTS}

  def _generate_examples(self, images, labels):
    for i, (image, label) in enumerate(zip(images, labels)):
      yield i, dict(image=image[..., None], label=int(label))


def cache_folder():
  """$PEFTJAX_CACHE, or ~/.cache/peftjax: what can be made again."""
  return pathlib.Path(os.environ.get('PEFTJAX_CACHE') or
                      pathlib.Path.home() / '.cache' / 'peftjax')


def prepared(name):
  """Builder of a set whose files are ready to be read.

  Raises:
    ValueError: unknown name.
    OSError: the cache folder cannot be written.
  """
  if name not in NAMES:
    near = difflib.get_close_matches(name, NAMES, 3, 0.3) or NAMES
    raise ValueError(
        f'unknown data set {name!r}; nearest: {", ".join(near)}')
  cache = cache_folder()
  with _lock(cache / f'{name}.lock'):
    # A builder reads what is there when it is made, so files are checked and,
    # if broken, removed before.
    folder = cache / 'peftjax_images' / name
    whole = _whole(folder / str(PeftjaxImages.VERSION))
    if not whole and folder.exists():
      shutil.rmtree(folder)
    builder = PeftjaxImages(
        config=name, data_dir=cache, file_format='array_record')
    if not whole:
      tfds.disable_progress_bar()
      builder.download_and_prepare()
      # Written last: a process that is killed before leaves no checksums.
      stamp = json.dumps(_checksums(pathlib.Path(builder.data_dir)))
      (pathlib.Path(builder.data_dir) / _STAMP).write_text(stamp)
  return builder


def _label_names(name):
  if name == 'digits':
    return [str(i) for i in range(10)]
  return json.loads((_ASSETS / 'labels.json').read_text())[name]


def _read(name):
  """{split: (images uint8 [N, H, W], labels [N])}."""
  if name == 'digits':
    return _read_digits()
  with np.load(_ASSETS / f'{name}.npz') as z:
    return {split: (z[f'x_{part}'], z[f'y_{part}'])
            for split, part in _PARTS.items()}


def _read_digits():
  import sklearn.datasets  # Slow to import, and needed for this set alone.
  x, y = sklearn.datasets.load_digits(return_X_y=True)
  x = np.round(x.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  # RandomState, not Generator: its stream is fixed for good.
  order = np.random.RandomState(0).permutation(len(y))
  parts = np.split(order, [800, 1000])
  return {split: (x[i], y[i]) for split, i in zip(_PARTS, parts)}


@contextlib.contextmanager
def _lock(path):
  """Holds an exclusive lock on a file between processes and threads."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, 'w')
  except OSError as e:
    raise OSError(
        f'cannot write to the cache {path.parent}: {e}. Set PEFTJAX_CACHE to '
        'a folder that can be written') from e
  with file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield  # Closing the file lets go of the lock.


def _whole(folder):
  """Whether all files are as they were when the set was prepared."""
  try:
    return json.loads((folder / _STAMP).read_text()) == _checksums(folder)
  except (OSError, ValueError):
    return False


def _checksums(folder):
  return {p.name: hashlib.sha256(p.read_bytes()).hexdigest()
          for p in sorted(folder.iterdir()) if p.name != _STAMP}
