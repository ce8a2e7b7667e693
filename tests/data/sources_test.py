"""`open_split`'s names, and folders with a manifest."""

import gzip
import hashlib
import json
import os
import pathlib

import numpy as np
import pytest

from peftjax.data import manifest
from peftjax.data.examples import KINDS
from peftjax.data.sources import open_split

_ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('PEFTJAX_DATA') or
                    _ROOT.parent / 'shared' / 'data')
SETS = (sorted(manifest.set_names(DATA).items())
        if (DATA / 'manifest.json').is_file() else [])
KIND = dict(tokens='tagging', nlg='seq2seq', lm='lm', vision='image',
            tabular='tabular')


# ------------------------------------------------- a folder made for tests


def add(folder, name, group, splits, **entry):
  """Adds a set to the manifest of a folder."""
  files = {}
  for split, rows in splits.items():
    path = folder / group / name / f'{split}.jsonl.gz'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(
        ''.join(json.dumps(r) + '\n' for r in rows).encode()))
    files[split] = dict(path=str(path.relative_to(folder)),
                        sha256=hashlib.sha256(path.read_bytes()).hexdigest())
  file = folder / 'manifest.json'
  sets = json.loads(file.read_text())['sets'] if file.exists() else []
  sets.append(dict(name=name, group=group, files=files, **entry))
  file.write_text(json.dumps(dict(sets=sets)))


@pytest.fixture
def folder(tmp_path):
  add(tmp_path, 'pairs', 'text', dict(
      train=[dict(text_a='a', text_b='b', label=1)],
      test=[dict(text_a='a', text_b='b', label=2)], validation=[]),
      label_names=['no', 'yes'], metric='accuracy')
  add(tmp_path, 'scores', 'text', dict(
      train=[dict(text_a='a', text_b='b', label=4.5)]),
      label_names=None, metric='pearson/spearman')
  add(tmp_path, 'trees', 'tokens', dict(train=[
      dict(tokens=['a'], upos=['DET'], heads=[0], deprels=['root'])]),
      label_names=['DET'], metric='UPOS accuracy, UAS/LAS')
  return tmp_path


def test_examples_of_a_manifest(folder):
  source = open_split('data:pairs', 'train', path=str(folder))
  assert source == ([dict(text='a', text_b='b', label=1)], 'classification',
                    ('no', 'yes'), 'accuracy', 'data:pairs train')
  scores = open_split('data:scores', 'train', path=str(folder))
  assert scores.kind == 'regression' and scores.labels == ()
  assert scores.examples[0]['label'] == 4.5  # The scale stays 0 to 5.
  trees = open_split('data:trees', 'train', path=str(folder))
  assert trees.examples == [dict(tokens=['a'], tags=['DET'], heads=[0],
                                 deprels=['root'])]


def test_folder_from_the_environment(folder, monkeypatch):
  monkeypatch.setenv('PEFTJAX_DATA', str(folder))
  assert len(open_split('data:pairs', 'train').examples) == 1
  with pytest.raises(ValueError, match="unknown data set 'pairs'; .*'data:pai"):
    open_split('pairs', 'train')
  monkeypatch.delenv('PEFTJAX_DATA')
  with pytest.raises(FileNotFoundError, match='give path= or set PEFTJAX_DATA'):
    open_split('data:pairs', 'train')


def test_bad_manifests(folder):
  with pytest.raises(ValueError, match='label 2 of example 0 of data:pairs te'):
    open_split('data:pairs', 'test', path=str(folder))
  with pytest.raises(ValueError, match='data:pairs validation is empty'):
    open_split('data:pairs', 'validation', path=str(folder))
  with pytest.raises(ValueError, match="no split 'dev'; choose from test"):
    open_split('data:pairs', 'dev', path=str(folder))
  with pytest.raises(ValueError, match="no data set 'pair'; .*'pairs'"):
    open_split('data:pair', 'train', path=str(folder))
  with pytest.raises(FileNotFoundError, match='no manifest.json in'):
    open_split('data:pairs', 'train', path=str(folder / 'text'))
  (folder / 'manifest.json').write_text('{}')
  with pytest.raises(ValueError, match='expected {"sets": '):
    open_split('data:pairs', 'train', path=str(folder))


def test_verify(folder):
  manifest.verify(folder)
  path = folder / 'text' / 'pairs' / 'test.jsonl.gz'
  path.write_bytes(path.read_bytes() + b'x')
  manifest.verify(folder, 'scores')
  with pytest.raises(ValueError, match='sha256 .*text/pairs/test.jsonl.gz$'):
    manifest.verify(folder)
  path.unlink()
  with pytest.raises(FileNotFoundError, match='test.jsonl.gz'):
    manifest.verify(folder, 'pairs')


# ------------------------------------------------------ the shared data sets


needs_data = pytest.mark.skipif(
    not SETS, reason='no folder of data sets; PEFTJAX_DATA names it')


@needs_data
@pytest.mark.parametrize('name, group', SETS or [('none', '')])
def test_every_set_of_the_shared_data(name, group):
  entry = next(s for s in json.loads((DATA / 'manifest.json').read_text())[
      'sets'] if s['name'] == name)
  splits = {s: f['rows'] for s, f in entry['files'].items()}
  if group == 'vision':
    arrays = entry['files']['all']['arrays']
    splits = {split: arrays[f'y_{part}'][1][0] for split, part in dict(
        train='train', validation='val', test='test').items()}
  # The smallest, as all are read alike; all of them where that is quick.
  for split in sorted(splits, key=splits.get)[:1 if group == 'nlg' else 3]:
    if splits[split] > 3000:
      continue
    source = open_split(f'data:{name}', split, path=str(DATA))
    assert len(source.examples) == splits[split]
    assert source.metric == entry['metric']
    assert source.labels == tuple(entry.get('label_names') or ())
    want = KIND.get(group) or (
        'classification' if source.labels else 'regression')
    assert source.kind == want
    first = source.examples[0]
    assert set(KINDS[source.kind][0]) <= set(first)
    if source.kind in ('classification', 'image', 'tabular'):
      seen = {e['label'] for e in source.examples}
      assert {type(v) for v in seen} == {int}
      assert min(seen) >= 0 and max(seen) < len(source.labels)
    elif source.kind == 'regression':
      assert all(0 <= e['label'] <= 5 for e in source.examples)
    elif source.kind == 'tagging':
      assert {t for e in source.examples for t in e['tags']} <= set(
          source.labels)
    if source.kind == 'image':
      assert first['image'].dtype == np.uint8 and first['image'].ndim == 3
    if source.kind == 'tabular':
      assert first['features'].dtype == np.float32
      assert first['features'].shape == (entry['files']['all']['features'],)


@needs_data
def test_checksums_of_the_shared_data():
  for name in ('sst2', 'stsb_open', 'kmnist', 'iris'):
    manifest.verify(DATA, name)


# ------------------------------------------------------------------- names


def test_own_sets():
  source = open_split('digits', 'validation')
  assert source.kind == 'image' and source.metric == 'accuracy'
  assert source.labels == tuple('0123456789')
  assert len(source.examples) == 200
  first = source.examples[0]
  assert first['image'].shape == (8, 8, 1) and type(first['label']) is int
  assert source.examples[-1]['label'] == source.examples[199]['label']
  assert len(list(source.examples[:3])) == 3
  with pytest.raises(IndexError):
    source.examples[200]
  assert len(open_split('digits', 'validation[:10%]').examples) == 20


@pytest.mark.parametrize('name, split, options, match', [
    ('kmnst', 'train', {}, "unknown data set 'kmnst'; .*'kmnist'"),
    ('digits', 'dev', {}, "digits has no split 'dev'"),
    ('digits', 'train[', {}, r"no split 'train\['"),
    ('tdfs:glue/sst2', 'train', {}, "'tdfs:glue/sst2'; .*'tfds:glue/sst2'"),
    ('digits', 'train', dict(path='x'), "path='x': digits has no folder"),
    ('digits', 'train', dict(columns={}), "takes no option 'columns'"),
    ('file:x.csv', 'all', dict(colums={}), "option 'colums'; .*'columns'")])
def test_bad_names(name, split, options, match):
  with pytest.raises(ValueError, match=match):
    open_split(name, split, **options)
