"""Every named set of tensorflow-datasets, offline and without TensorFlow."""

import sys
from unittest import mock

from etils import epath
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification.cifar import Cifar100
from tensorflow_datasets.text.gem import Gem
from tensorflow_datasets.text.glue import Glue

from peftjax.data import tfds_sets
from peftjax.data.sources import open_split
from peftjax.data.tfds_sets import open_tfds
from peftjax.data.tfds_sets import SETS
from peftjax.data.vtab import GROUPS
from peftjax.data.vtab import VTAB

# What mock_data makes for these breaks rules that real data keep: fields of
# one length, 3 to 10 objects. They have tests of their own below.
UNLIKE = ('conll2003', 'vtab/clevr_count')
KEYS = dict(image={'image', 'label'}, classification={'text', 'label'},
            regression={'text', 'label'}, seq2seq={'source', 'target'})
PAIRS = ('glue/mrpc', 'glue/qqp', 'glue/stsb', 'glue/mnli', 'glue/qnli',
         'glue/rte', 'glue/wnli', 'glue/ax', 'super_glue/boolq',
         'super_glue/cb', 'super_glue/copa', 'super_glue/multirc',
         'super_glue/rte', 'super_glue/wic', 'super_glue/wsc')


def opened(name, examples, split='train', **kwargs):
  """A source over examples given in the form of tensorflow-datasets."""
  with tfds.testing.mock_data(
      as_data_source_fn=lambda self, split, **_: examples):
    return open_tfds(name, split, **kwargs)


@pytest.mark.parametrize('name', [n for n in SETS if n not in UNLIKE])
def test_every_set(name):
  entry = SETS[name]
  with tfds.testing.mock_data(num_examples=4):
    for split in entry.splits:
      hidden = split in entry.hidden
      source = open_split(f'tfds:{name}', split, **(
          dict(labelled=False) if hidden else {}))
      assert source.kind == entry.kind and source.metric
      assert source.name == f'tfds:{name} {split}'
      examples = list(source.examples)
      assert len(examples) == 4
      for e in examples:
        keys = KEYS[source.kind] - ({'label', 'target'} if hidden else set())
        assert keys <= set(e) and ('text_b' in e) == (name in PAIRS)
        assert all(type(e[k]) is str for k in e if k not in (
            'image', 'label', 'references'))
        if source.kind == 'image':
          assert e['image'].dtype == np.uint8 and e['image'].ndim == 3
        if 'references' in e:
          assert e['target'] in e['references'] or name == 'gem/e2e_nlg'
          assert all(type(r) is str for r in e['references'])
        if 'label' in e and source.kind == 'regression':
          assert type(e['label']) is float
        elif 'label' in e:
          assert type(e['label']) is int and e['label'] < len(source.labels)
        assert hidden <= (not {'label', 'target', 'references'} & set(e))
  assert 'tensorflow' not in sys.modules


def test_the_suites_are_whole():
  glue = 'cola sst2 mrpc qqp stsb mnli qnli rte wnli ax'.split()
  super_glue = 'boolq cb copa multirc record rte wic wsc'.split()
  assert {n for n in SETS if n.startswith('glue/')} == {
      f'glue/{n}' for n in glue}
  assert {n for n in SETS if n.startswith('super_glue/')} == {
      f'super_glue/{n}' for n in super_glue}
  names = sum(GROUPS.values(), ())
  assert len(names) == 19 and set(names) == set(VTAB)
  assert [len(g) for g in GROUPS.values()] == [7, 4, 8]


def test_vtab_label_counts():
  counts = dict(
      caltech101=102, cifar100=100, dtd=47, oxford_flowers102=102,
      oxford_iiit_pet=37, sun397=397, svhn=10, diabetic_retinopathy=5,
      eurosat=10, patch_camelyon=2, resisc45=45, clevr_distance=6, dmlab=6,
      dsprites_location=16, dsprites_orientation=16, kitti_distance=4,
      smallnorb_azimuth=18, smallnorb_elevation=9)
  with tfds.testing.mock_data():
    got = {n: len(open_tfds(f'vtab/{n}', 'train').labels) for n in counts}
  assert got == counts


# ------------------------------------------------- labels in closed form


@pytest.mark.parametrize('count, label', [(3, 0), (10, 7)])
def test_clevr_count(count, label):
  objects = dict(size=np.zeros(count, int),
                 pixel_coords=np.ones((count, 3), np.float32))
  example = dict(image=np.zeros((4, 4, 3), np.uint8), objects=objects)
  source = opened('vtab/clevr_count', [example])
  assert source.examples[0]['label'] == label and len(source.labels) == 8


@pytest.mark.parametrize('depth, label', [
    (7.9, 0), (8.1, 1), (8.7, 2), (9.2, 3), (9.7, 4), (12., 5)])
def test_clevr_distance(depth, label):
  at = np.float32([[0, 0, 30], [0, 0, depth]])
  example = dict(image=np.zeros((4, 4, 3), np.uint8),
                 objects=dict(pixel_coords=at))
  assert opened('vtab/clevr_distance', [example]).examples[0]['label'] == label


@pytest.mark.parametrize('kind, depth, label', [
    (0, 5., 0), (1, 12., 1), (2, 30., 2), (3, 5., 3)])
def test_kitti_distance(kind, depth, label):
  # A pedestrian, type 3, stands nearer than any vehicle.
  objects = dict(type=np.array([3, kind]),
                 location=np.float32([[0, 0, 1], [0, 0, depth]]))
  example = dict(image=np.zeros((4, 4, 3), np.uint8), objects=objects)
  assert opened('vtab/kitti_distance', [example]).examples[0]['label'] == label


def test_dsprites():
  rows = [dict(image=np.uint8([[[0], [1]]]), label_x_position=x,
               label_orientation=o) for x, o in ((0, 0), (31, 39), (5, 5))]
  got = opened('vtab/dsprites_location', rows).examples
  assert [e['label'] for e in got] == [0, 15, 2]
  assert got[0]['image'].tolist() == [[[0], [255]]]
  got = opened('vtab/dsprites_orientation', rows).examples
  assert [e['label'] for e in got] == [0, 15, 2]


def test_wsc_marks_the_pronoun():
  example = dict(text='Mark told Pete lies about himself .',
                 span1_text='Pete', span1_index=2, span2_text='himself',
                 span2_index=5, label=0, idx=0)
  got = opened('super_glue/wsc', [example]).examples[0]
  assert got == dict(text='Mark told Pete lies about * himself * .',
                     text_b='Pete', label=0)


def test_copa_asks():
  example = dict(premise='The man fell.', choice1='He slept.',
                 choice2='It was icy.', question='cause', label=1, idx=0)
  assert opened('super_glue/copa', [example]).examples[0] == dict(
      text='The man fell. What was the cause?',
      text_b='He slept. or It was icy.', label=1)


def test_record_without_answers_needs_labelled_false():
  example = dict(passage='p', query='q', entities=np.array([b'a', b'b']),
                 answers=np.array([], object))
  with pytest.raises(ValueError, match="example 0 .* no 'target'"):
    opened('super_glue/record', [example]).examples[0]
  got = opened('super_glue/record', [example], 'test', labelled=False)
  assert got.examples[0] == dict(source='query: q entities: a, b passage: p')


def test_conll_tags_are_names():
  example = dict(tokens=np.array([b'EU', b'rejects']), ner=np.array([3, 0]),
                 pos=None, chunks=None)
  source = opened('conll2003', [example], 'validation')
  assert source.examples[0] == dict(tokens=['EU', 'rejects'],
                                    tags=['B-ORG', 'O'])
  assert source.labels[:2] == ('O', 'B-PER')


def test_wrong_label_is_named():
  rows = [dict(sentence='a', label=0), dict(sentence='b', label=2)]
  source = opened('glue/sst2', rows)
  assert source.examples[0]['label'] == 0
  with pytest.raises(ValueError, match='label 2 of example 1 of tfds:glue/sst2 '
                                       'train .* 0 .. 1'):
    source.examples[1]


# --------------------------------------------------------- prepared files


def write(cls, config, folder, splits):
  """Prepares a set with rows of our own in the place of a download."""
  own = type(cls)(cls.__name__, (cls,), dict(
      # Looked up with a package that need not be installed, otherwise.
      code_path=epath.Path(sys.modules[cls.__module__].__file__),
      _split_generators=lambda self, _: {
          s: enumerate(rows) for s, rows in splits.items()}),
                  skip_registration=True)
  tfds.disable_progress_bar()
  own(config=config, data_dir=folder,
      file_format='array_record').download_and_prepare()


@pytest.fixture(scope='module')
def sst2(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  rows = [dict(sentence=f'naïve {i}', label=i % 2, idx=i) for i in range(10)]
  hidden = [dict(r, label=-1) for r in rows[:3]]
  write(Glue, 'sst2', folder,
        dict(train=rows, validation=rows[:4], test=hidden))
  return folder


def test_text_from_files(sst2):
  source = open_split('tfds:glue/sst2', 'train', path=str(sst2))
  got = {e['text']: e['label'] for e in source.examples}
  assert got == {f'naïve {i}': i % 2 for i in range(10)}
  assert source.labels == ('negative', 'positive')
  part = open_tfds('glue/sst2', 'train[:80%]', str(sst2)).examples
  rest = open_tfds('glue/sst2', 'train[80%:]', str(sst2)).examples
  assert len(part) == 8 and len(rest) == 2
  assert {e['text'] for e in [*part, *rest]} == set(got)


def test_hidden_labels(sst2):
  with pytest.raises(ValueError, match='never released; labelled=False .* '
                                       'labelled are train, validation'):
    open_tfds('glue/sst2', 'test', str(sst2))
  with pytest.raises(ValueError, match='never released'):
    open_tfds('glue/sst2', 'test[:1]', str(sst2))
  source = open_tfds('glue/sst2', 'test', str(sst2), labelled=False)
  assert len(source.examples) == 3 and set(source.examples[0]) == {'text'}


def test_registered_folders(sst2):
  tfds.core.add_data_dir(str(sst2))
  try:
    assert len(open_tfds('glue/sst2', 'validation').examples) == 4
  finally:
    tfds.core.utils.file_utils.clear_registered_data_dirs()


def test_vtab_protocol(tmp_path):
  image = PIL.Image.fromarray(np.full((32, 32, 3), 7, np.uint8))
  rows = [dict(id=str(i), image=image, label=i % 100, coarse_label=0)
          for i in range(1_100)]
  # 45 000 images take a minute to write: here the validation part begins at
  # 900 instead.
  assert VTAB['cifar100'].splits['val200'] == 'train[45000:45200]'
  splits = {k: v.replace('45000', '900').replace('45200', '1100')
            for k, v in VTAB['cifar100'].splits.items()}
  write(Cifar100, None, tmp_path, dict(train=rows, test=rows[:7]))
  pixels = open_tfds('vtab/cifar100', 'test', str(tmp_path)).examples[0]
  assert (pixels['image'] == 7).all() and pixels['image'].dtype == np.uint8
  entry = SETS['vtab/cifar100']._replace(
      splits=splits, example=lambda e: dict(
          image=e['image'], label=e['label'], id=e['id']))
  with mock.patch.dict(SETS, {'vtab/cifar100': entry}):
    got = {s: [e['id'] for e in open_tfds('vtab/cifar100', s,
                                          str(tmp_path)).examples]
           for s in splits}
  assert {s: len(ids) for s, ids in got.items()} == dict(
      train=900, validation=200, test=7, train800=800, val200=200,
      train800val200=1000)
  assert got['train800'] == got['train'][:800]
  assert got['val200'] == got['validation']
  assert got['train800val200'] == got['train800'] + got['val200']
  assert not set(got['train800']) & set(got['val200'])


def test_e2e_gathers_references(tmp_path):
  row = lambda i, mr, ref: dict(
      gem_id=str(i), gem_parent_id=str(i), meaning_representation=mr,
      target=ref, references=[ref])
  rows = [row(0, 'a', 'one'), row(1, 'b', 'two'), row(2, 'a', 'three'),
          row(3, 'a', 'one')]
  train = [dict(r, references=[]) for r in rows]
  write(Gem, 'e2e_nlg', tmp_path, dict(train=train, validation=rows))
  got = open_tfds('gem/e2e_nlg', 'validation', str(tmp_path)).examples
  assert len(got) == 2
  assert {e['source']: sorted(e['references']) for e in got} == dict(
      a=['one', 'three'], b=['two'])
  assert all(e['target'] == e['references'][0] for e in got)
  assert len(open_tfds('gem/e2e_nlg', 'train', str(tmp_path)).examples) == 4


# ------------------------------------------------------------------ errors


def test_not_prepared(tmp_path):
  for name in ('glue/sst2', 'super_glue/boolq', 'vtab/dmlab', 'gsm8k'):
    with pytest.raises(FileNotFoundError, match=(
        f'tfds:{name} is not prepared: .* python -m peftjax.data.tfds_sets '
        f'{name} {tmp_path}')):
      open_tfds(name, 'train', str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_files_without_random_access(sst2):
  builder = tfds.builder('glue/sst2:*.*.*', data_dir=str(sst2))
  with mock.patch.object(type(builder), 'as_data_source',
                         side_effect=NotImplementedError):
    with pytest.raises(ValueError, match='no random access; remove it, or'):
      open_tfds('glue/sst2', 'train', str(sst2))


@pytest.mark.parametrize('name, split, match', [
    ('glue/sst', 'train', "unknown data set tfds:glue/sst; .*'glue/sst2'"),
    ('glue/mnli', 'validation_match', "'validation_matched'"),
    ('ag_news', 'validation', "no split 'validation'; choose from test, train"),
    ('vtab/dtd', 'train1000', "did you mean 'train800'"),
    ('vtab/svhn', 'train[:100]', "train is 'train.:65931.' of svhn_cropped"),
])
def test_unknown_names(name, split, match):
  with pytest.raises(ValueError, match=match):
    open_split(f'tfds:{name}', split)


def test_prepare_names_the_package():
  def missing(self, *args, **kwargs):
    try:
      raise ModuleNotFoundError("No module named 'scipy9'", name='scipy9')
    except ModuleNotFoundError as e:  # As tensorflow-datasets raises it again.
      raise ModuleNotFoundError(f'In <Image>: {e}') from e
  with mock.patch.object(tfds.core.DatasetBuilder, 'download_and_prepare',
                         missing):
    with pytest.raises(ModuleNotFoundError, match='pip install scipy9'):
      tfds_sets.prepare('vtab/svhn')
  with pytest.raises(ValueError, match="tfds:vtab/svh; .*'vtab/svhn'"):
    tfds_sets.prepare('vtab/svh')


def test_builders_are_where_the_table_says():
  """Names, configs and label features exist in this tensorflow-datasets."""
  with tfds.testing.mock_data():
    for name, entry in SETS.items():
      builder = tfds_sets._builder(entry.builder, '')
      base, _, config = entry.builder.partition('/')
      assert builder.name == base, name
      if config:
        assert builder.builder_config.name == config, name
      if isinstance(entry.labels, str):
        assert entry.labels in builder.info.features, name
