"""Local files: tables, npz, folders of images, and what is wrong with them."""

import gzip
import io
import json

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from peftjax.data.examples import part
from peftjax.data.files import open_file
from peftjax.data.sources import open_split

ROWS = [dict(sentence=f'né, "{i}"\nb', label=i % 3) for i in range(6)]
COLUMNS = dict(text='sentence')


def write_table(path, rows):
  """Writes rows in the format that the ending names."""
  name = path.name.removesuffix('.gz')
  opened = gzip.open if path.suffix == '.gz' else open
  if name.endswith('.parquet'):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path
  with opened(path, 'wt', encoding='utf-8', newline='') as f:
    if name.endswith('.jsonl'):
      f.writelines(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)
    elif name.endswith('.json'):
      json.dump(rows, f)
    else:
      mark = '\t' if name.endswith('.tsv') else ','
      quote = lambda v: '"' + str(v).replace('"', '""') + '"'
      for row in [list(rows[0]), *(r.values() for r in rows)]:
        f.write(mark.join(map(quote, row)) + '\r\n')
  return path


# ------------------------------------------------------------------ tables


@pytest.mark.parametrize('ending', [
    'jsonl', 'jsonl.gz', 'json', 'json.gz', 'csv', 'csv.gz', 'tsv', 'tsv.gz',
    'parquet'])
def test_formats_give_the_same(tmp_path, ending):
  path = write_table(tmp_path / f'some.{ending}', ROWS)
  source = open_split(f'file:{path}', 'all', columns=COLUMNS)
  assert source.examples == [
      dict(text=r['sentence'], label=r['label']) for r in ROWS]
  assert source.kind == 'classification'
  assert source.labels == ('0', '1', '2')
  assert type(source.examples[0]['label']) is int


def test_splits(tmp_path):
  for split, rows in dict(train=ROWS[:4], validation=ROWS[4:]).items():
    write_table(tmp_path / f'{split}.jsonl', rows)
  for path in (tmp_path, tmp_path / '{split}.jsonl'):
    source = open_file(path, 'validation', COLUMNS)
    assert [e['text'] for e in source.examples] == [
        r['sentence'] for r in ROWS[4:]]
    assert source.labels == ('0', '1', '2')  # Those of train.
    assert source.name == f'file:{path} validation'
    with pytest.raises(ValueError, match="no split 'valid'; .*'validation'"):
      open_file(path, 'valid', COLUMNS)


def test_a_single_file_is_not_two_splits(tmp_path):
  """Otherwise one would test on what one trained on."""
  path = write_table(tmp_path / 'some.jsonl', ROWS)
  with pytest.raises(ValueError, match="no split 'test'; choose from all"):
    open_file(path, 'test', COLUMNS)
  first = open_file(path, 'all[:80%]', COLUMNS).examples
  last = open_file(path, 'all[80%:]', COLUMNS).examples
  assert (len(first), len(last)) == (4, 2)
  assert [e['text'] for e in first + last] == [r['sentence'] for r in ROWS]


@pytest.mark.parametrize('split, want', [
    ('all', range(10)), ('all[:3]', range(3)), ('all[3:]', range(3, 10)),
    ('all[-2:]', range(8, 10)), ('all[25%:50%]', range(2, 5)),
    ('all[:99%]', range(9))])
def test_parts(split, want):
  assert list(part(list(range(10)), split)) == list(want)


@pytest.mark.parametrize('row, kind', [
    (dict(text='a', label=1), 'classification'),
    (dict(text='a', text_b='b', label=1), 'classification'),
    (dict(text='a', text_b='b', label=.5), 'regression'),
    (dict(text='a', text_b='b'), 'retrieval'),
    (dict(text='a'), 'lm'),
    (dict(tokens=['a', 'b'], tags=['O', 'B-X']), 'tagging'),
    (dict(source='a', target='b'), 'seq2seq'),
    (dict(messages=[dict(role='user', content='a')]), 'seq2seq')])
def test_kind_follows_from_the_columns(tmp_path, row, kind):
  path = write_table(tmp_path / 'some.jsonl', [row])
  source = open_file(path, 'all')
  assert source.kind == kind and source.examples == [row]


def test_ambiguous_columns(tmp_path):
  path = write_table(tmp_path / 'some.jsonl',
                     [dict(text='a', source='b', target='c')])
  with pytest.raises(ValueError, match='fit seq2seq, lm; give columns= or kin'):
    open_file(path, 'all')
  assert open_file(path, 'all', kind='lm').kind == 'lm'
  write_table(path, [dict(review='a')])
  with pytest.raises(ValueError, match='fit no kind'):
    open_file(path, 'all')
  with pytest.raises(ValueError, match="kind 'ln'; .*'lm'"):
    open_file(path, 'all', kind='ln')


def test_names_as_labels(tmp_path):
  rows = [dict(text=str(i), label=l) for i, l in enumerate('bca')]
  path = write_table(tmp_path / 'train.csv', rows)
  write_table(tmp_path / 'test.csv', rows[:1])
  source = open_file(tmp_path, 'test')
  assert source.labels == ('a', 'b', 'c')  # Of train: 'b' alone would be 0.
  assert source.examples[0]['label'] == 1
  given = open_file(path, 'all', labels=('c', 'b', 'a'))
  assert [e['label'] for e in given.examples] == [1, 0, 2]
  digits = write_table(tmp_path / 'digits.csv', [dict(text='a', label=1)])
  assert open_file(digits, 'all', labels=('no', 'yes')).examples == [
      dict(text='a', label=1)]


def test_csv_regression(tmp_path):
  path = write_table(tmp_path / 'some.csv', [
      dict(text='a', label='2.5'), dict(text='b', label='3')])
  source = open_file(path, 'all')
  assert source.kind == 'regression' and source.labels == ()
  assert [e['label'] for e in source.examples] == [2.5, 3.]
  whole = write_table(tmp_path / 'whole.csv', [dict(text='a', label='4')])
  assert open_file(whole, 'all', kind='regression').examples[0]['label'] == 4.


def test_images_in_parquet(tmp_path):
  pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
  buffer = io.BytesIO()
  PIL.Image.fromarray(pixels).save(buffer, 'png')
  path = write_table(tmp_path / 'some.parquet', [
      dict(img=dict(bytes=buffer.getvalue(), path='a.png'), label=0)])
  source = open_file(path, 'all', dict(image='img'))
  assert source.kind == 'image'
  np.testing.assert_array_equal(source.examples[0]['image'], pixels)


# ------------------------------------------------------------------ errors


def test_missing_columns(tmp_path):
  path = write_table(tmp_path / 'some.csv', ROWS)
  with pytest.raises(ValueError, match="no column 'sentense'; .*'sentence'"):
    open_file(path, 'all', dict(text='sentense'))
  with pytest.raises(ValueError, match="'txt' is no canonical name; .*'text'"):
    open_file(path, 'all', dict(txt='sentence'))
  with pytest.raises(ValueError, match="example 0 .* has no 'label', which a "
                                       'classification example needs; it has '
                                       'text'):
    write_table(path, [dict(text='a')])
    open_file(path, 'all', kind='classification')


@pytest.mark.parametrize('bad, match', [
    (dict(text='x', label=None), "example 2 of .* has no 'label'"),
    (dict(text=None, label=1), "example 2 of .* has no 'text'"),
    (dict(text='x', label=3), 'label 3 of example 2 .* expected 0 .. 1'),
    (dict(text='x', label=-1), 'label -1 of example 2 .* expected 0 .. 1'),
    (dict(text='x', label=.5), 'label 0.5 of example 2'),
    (dict(text='x', label=True), None)])
def test_bad_rows(tmp_path, bad, match):
  rows = [dict(text='a', label=0), dict(text='b', label=1), bad]
  path = write_table(tmp_path / 'some.jsonl', rows)
  open_ = lambda: open_file(path, 'all', labels=('no', 'yes'),
                            kind='classification')
  if match is None:
    assert open_().examples[2]['label'] == 1
  else:
    with pytest.raises(ValueError, match=match):
      open_()


def test_label_of_another_split(tmp_path):
  write_table(tmp_path / 'train.jsonl', ROWS[:2])
  write_table(tmp_path / 'test.jsonl', ROWS[:3])
  with pytest.raises(ValueError, match='label 2 of example 2 .*test .* 0 .. 1'):
    open_file(tmp_path, 'test', COLUMNS)
  write_table(tmp_path / 'train.csv', [dict(text='a', label='good')])
  (tmp_path / 'train.jsonl').unlink()
  (tmp_path / 'test.jsonl').unlink()
  write_table(tmp_path / 'test.csv', [dict(text='a', label='goood')])
  with pytest.raises(ValueError, match="label 'goood' of example 0 .*'good'"):
    open_file(tmp_path, 'test')


def test_tags(tmp_path):
  path = write_table(tmp_path / 'some.jsonl', [
      dict(tokens=['a'], tags=['O']), dict(tokens=['a', 'b'], tags=['O'])])
  with pytest.raises(ValueError, match='example 1 .* 2 tokens and 1 tags'):
    open_file(path, 'all')
  write_table(path, [dict(tokens=['a'], tags=['B-PRE'])])
  with pytest.raises(ValueError, match="tag 'B-PRE' in example 0 .*'B-PER'"):
    open_file(path, 'all', labels=('O', 'B-PER'))


@pytest.mark.parametrize('name, content, match', [
    ('a.jsonl', b'', 'is empty'),
    ('a.json', b'', 'is empty'),
    ('a.csv', b'', 'is empty'),
    ('a.csv', b'text,label\n', 'is empty'),
    ('a.jsonl', b'{"text": "a"}\n{"text"\n', 'line 2: no JSON'),
    ('a.jsonl', b'["a"]\n', 'line 1: expected an object, found list'),
    ('a.json', b'{"text": "a"}', 'expected a list of objects'),
    ('a.csv', b'text,label\na,1,2\n', 'line 2: expected 2 cells'),
    ('a.csv', b'text,label\na\n', 'line 2: expected 2 cells'),
    ('a.csv', b'text,text\na,b\n', 'a column name occurs twice'),
    ('a.csv', b'text\n"a', 'cannot read'),
    ('a.jsonl.gz', b'no gzip', 'cannot read'),
    ('a.jsonl.gz', gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:40], 'cannot read'),
    ('a.jsonl', b'{"text": "\xff"}\n', 'cannot read'),
    ('a.parquet', b'PAR1', 'cannot read'),
    ('a.npz', b'PK', 'cannot read'),
    ('a.txt', b'text', "unknown ending"),
    ('a.parquet.gz', b'text', 'unknown ending')])
def test_unreadable_files(tmp_path, name, content, match):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(ValueError, match=match) as error:
    open_file(path, 'all')
  assert name in str(error.value)


def test_files_that_are_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='no file or folder'):
    open_file(tmp_path / 'none.jsonl', 'all')
  with pytest.raises(FileNotFoundError, match='no file matches'):
    open_file(tmp_path / '{split}.jsonl', 'train')
  with pytest.raises(ValueError, match='found neither'):
    open_file(tmp_path, 'train')
  write_table(tmp_path / 'train.csv', ROWS)
  write_table(tmp_path / 'train.jsonl', ROWS)
  with pytest.raises(ValueError, match="two files of the split 'train'"):
    open_file(tmp_path, 'train')


# ------------------------------------------------------------------ images


def arrays(**changes):
  out = {}
  for split, n in dict(train=6, val=3, test=4).items():
    out[f'x_{split}'] = np.arange(n * 16, dtype=np.uint8).reshape(n, 4, 4)
    out[f'y_{split}'] = np.arange(n) % 3
  out.update(changes)
  return {k: v for k, v in out.items() if v is not None}


def test_npz(tmp_path):
  path = tmp_path / 'some.npz'
  np.savez(path, **arrays())
  source = open_file(path, 'validation')
  assert source.kind == 'image' and len(source.examples) == 3
  assert source.labels == ('0', '1', '2')
  assert source.examples[2]['image'].shape == (4, 4, 1)
  assert source.examples[2]['image'][0, 0, 0] == 32
  assert [e['label'] for e in source.examples] == [0, 1, 2]
  assert len(open_file(path, 'train[:50%]').examples) == 3
  small = {k: v.astype(np.uint8) for k, v in arrays().items()}
  np.savez(path, **small)  # labels as images are stored
  assert open_file(path, 'test').labels == ('0', '1', '2')
  np.savez(path, image=np.zeros((2, 4, 4, 3), np.uint8), label=[0, 1])
  assert open_file(path, 'all').examples[1]['image'].shape == (4, 4, 3)


@pytest.mark.parametrize('changes, match', [
    (dict(y_test=np.array([0, 1, 2, 3])), 'label 3 of example 3 .* 0 .. 2'),
    (dict(y_test=None), "no array 'y_test'; .*'x_test'"),
    (dict(y_test=np.zeros(3, int)), r'shape \[3\] with 4 images'),
    (dict(y_test=np.zeros(4)), 'y_test is float64; expected integers'),
    (dict(x_test=np.zeros((4, 2, 2))), 'x_test is float64 .* expected uint8'),
    (dict(x_test=np.zeros((0, 2, 2), np.uint8), y_test=np.zeros(0, int)),
     'is empty')])
def test_bad_npz(tmp_path, changes, match):
  path = tmp_path / 'some.npz'
  np.savez(path, **arrays(**changes))
  with pytest.raises(ValueError, match=match):
    open_file(path, 'test')


def test_npz_of_something_else(tmp_path):
  np.savez(tmp_path / 'some.npz', weight=np.zeros(3))
  with pytest.raises(ValueError, match='has the arrays weight; expected'):
    open_file(tmp_path / 'some.npz', 'train')
  with pytest.raises(ValueError, match='columns=.* is no table'):
    np.savez(tmp_path / 'some.npz', **arrays())
    open_file(tmp_path / 'some.npz', 'train', COLUMNS)


def pictures(folder, counts):
  for i, (name, n) in enumerate(counts.items()):
    (folder / name).mkdir(parents=True)
    for j in range(n):
      shape = (5, 4, 3) if j % 2 else (5, 4)
      PIL.Image.fromarray(np.full(shape, 10 * i + j, np.uint8)).save(
          folder / name / f'{j}.png')


def test_folders_of_images(tmp_path):
  pictures(tmp_path / 'train', dict(dog=2, cat=3))
  pictures(tmp_path / 'test', dict(dog=1))
  source = open_file(tmp_path, 'train')
  assert source.labels == ('cat', 'dog')
  assert [e['label'] for e in source.examples] == [0, 0, 0, 1, 1]
  assert source.examples[3]['image'].shape == (5, 4, 1)
  assert source.examples[-1]['image'].shape == (5, 4, 3)
  assert (source.examples[4]['image'] == 1).all()
  assert open_file(tmp_path, 'test').examples[0]['label'] == 1
  assert len(open_file(tmp_path / 'train', 'all[:2]').examples) == 2
  with pytest.raises(ValueError, match="no split 'valid'; choose from test, t"):
    open_file(tmp_path, 'valid')
  pictures(tmp_path / 'test', dict(dgo=1))
  with pytest.raises(ValueError, match="outside the label set; .*'dog'"):
    open_file(tmp_path, 'test')


def test_files_that_are_no_images(tmp_path):
  pictures(tmp_path, dict(cat=1))
  (tmp_path / 'cat' / '0.png').write_bytes(b'no png')
  with pytest.raises(ValueError, match='cannot read the image .*0.png'):
    open_file(tmp_path, 'all').examples[0]
  (tmp_path / 'cat' / 'notes.txt').write_text('')
  with pytest.raises(ValueError, match='notes.txt is no image'):
    open_file(tmp_path, 'all')
