"""The field's data sets through tensorflow-datasets, without TensorFlow.

  open_tfds('glue/sst2', 'validation')
  open_tfds('vtab/cifar100', 'train800')
  open_tfds('imdb_reviews', 'train[:90%]')

Nothing is downloaded here. On a machine that is online, once:

  python -m peftjax.data.tfds_sets glue/sst2 [folder]

which writes array records below the folder, ~/tensorflow_datasets if none is
given. Builders may ask for further packages there, some (CIFAR, SVHN, dSprites,
smallNORB) for TensorFlow, to write PNG. Prepared folders can be copied, and are
read without any of that and from their own metadata, whichever version of
tensorflow-datasets wrote them, as long as they hold array records.

`SETS` is the table. Sources: GLUE (arXiv 1804.07461), SuperGLUE (arXiv
1905.00537), VTAB (arXiv 1910.04867; splits and labels as in
google-research/task_adaptation). Where the field's habits differ:

  * 'gem/e2e_nlg' is the cleaned E2E (Dusek et al., 2019), one row a reference;
    validation and test are gathered here to one example a meaning
    representation. Scores are not those of the original E2E, which LoRA's paper
    uses: read that through 'file:'.
  * 'super_glue/copa' is one pair example with both choices in text_b;
    'super_glue/record' and 'squad' are sequence to sequence.
  * Sets with no validation split have none here either; slice train.
"""

import collections
import importlib
import importlib.util
import pathlib
import re
import sys
import types
from typing import Callable, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from peftjax.data.examples import check_example
from peftjax.data.examples import Examples
from peftjax.data.examples import plain
from peftjax.data.examples import Source
from peftjax.data.vtab import VTAB
from peftjax.method import nearest

# tensorflow-datasets registers a builder when its module is imported.
_MODULES = ('image', 'image_classification', 'question_answering',
            'structured', 'text')


class Set(NamedTuple):
  """How one set of tensorflow-datasets becomes canonical examples."""
  builder: str                        # its name there, with its config
  kind: str                           # see `peftjax.data.examples`
  example: Callable                   # dict of theirs -> canonical dict
  splits: dict                        # {our name: split of theirs}
  metric: str
  labels: object = 'label'            # their feature with the names, or names
  hidden: tuple = ()                  # splits whose labels were not released
  gather: bool = False                # one example a source, all references


def rename(**columns):
  """Canonical name -> their name; a string."""
  return lambda e: {k: e[v] for k, v in columns.items()}


def _same(*names):
  return {n: n for n in names}


def _glue(config, text, text_b=None, metric='accuracy', **changes):
  columns = dict(text=text, label='label')
  if text_b:
    columns['text_b'] = text_b
  return Set(f'glue/{config}', 'classification', rename(**columns),
             _same('train', 'validation', 'test'), metric,
             hidden=('test',))._replace(**changes)


def _super_glue(config, example, metric='accuracy', kind='classification',
                labels='label'):
  return Set(f'super_glue/{config}', kind, example,
             _same('train', 'validation', 'test'), metric, labels,
             hidden=('test',))


def _copa(e):
  ask = dict(cause='What was the cause?', effect='What happened as a result?')
  # Anything but the two is left as it is.
  question = ask.get(e['question'], e['question'])
  return dict(text=f'{e["premise"]} {question}',
              text_b=f'{e["choice1"]} or {e["choice2"]}', label=e['label'])


def _multirc(e):
  # Its exact match is counted by question: all of a group must be right.
  return dict(text=e['paragraph'], text_b=f'{e["question"]} {e["answer"]}',
              label=e['label'],
              group=f'{e["idx"]["paragraph"]}-{e["idx"]["question"]}')


def _record(e):
  source = (f'query: {e["query"]} entities: {", ".join(e["entities"])} '
            f'passage: {e["passage"]}')
  answers = list(e['answers'])
  return dict(source=source, target=answers[0] if answers else None,
              references=answers)


def _wic(e):
  return dict(text=f'{e["word"]}: {e["sentence1"]}', text_b=e['sentence2'],
              label=e['label'])


def _wsc(e):
  # Does the pronoun between the stars stand for text_b? Places are of words.
  words, at = e['text'].split(' '), int(e['span2_index'])
  end = at + len(e['span2_text'].split(' '))
  marked = [*words[:at], '*', *words[at:end], '*', *words[end:]]
  return dict(text=' '.join(marked), text_b=e['span1_text'], label=e['label'])


def _squad(e):
  answers = list(e['answers']['text'])
  return dict(source=f'question: {e["question"]} context: {e["context"]}',
              target=answers[0] if answers else None, references=answers)


def _e2e(e):
  return dict(source=e['meaning_representation'], target=e['target'],
              references=list(e['references']) or [e['target']])


_IMAGE = rename(image='image', label='label')
_NLI = ('premise', 'hypothesis')

SETS = {
    'glue/cola': _glue('cola', 'sentence', metric='matthews_correlation'),
    'glue/sst2': _glue('sst2', 'sentence'),
    'glue/mrpc': _glue('mrpc', 'sentence1', 'sentence2', 'accuracy/F1'),
    'glue/qqp': _glue('qqp', 'question1', 'question2', 'accuracy/F1'),
    'glue/stsb': _glue('stsb', 'sentence1', 'sentence2', 'pearson/spearman',
                       kind='regression', labels=()),
    'glue/mnli': _glue(
        'mnli', *_NLI, splits=dict(
            validation='validation_matched', test='test_matched',
            **_same('train', 'validation_matched', 'validation_mismatched',
                    'test_matched', 'test_mismatched')),
        hidden=('test', 'test_matched', 'test_mismatched')),
    'glue/qnli': _glue('qnli', 'question', 'sentence'),
    'glue/rte': _glue('rte', 'sentence1', 'sentence2'),
    'glue/wnli': _glue('wnli', 'sentence1', 'sentence2'),
    'glue/ax': _glue('ax', *_NLI, 'matthews_correlation',
                     splits=_same('test')),

    'super_glue/boolq': _super_glue('boolq', rename(
        text='question', text_b='passage', label='label')),
    'super_glue/cb': _super_glue('cb', rename(
        text='premise', text_b='hypothesis', label='label'), 'accuracy/F1'),
    'super_glue/copa': _super_glue('copa', _copa),
    'super_glue/multirc': _super_glue('multirc', _multirc, 'F1/exact match'),
    'super_glue/record': _super_glue('record', _record, 'F1/exact match',
                                     'seq2seq', ()),
    'super_glue/rte': _super_glue('rte', rename(
        text='premise', text_b='hypothesis', label='label')),
    'super_glue/wic': _super_glue('wic', _wic),
    'super_glue/wsc': _super_glue('wsc.fixed', _wsc),

    'ag_news': Set('ag_news_subset', 'classification', lambda e: dict(
        text=f'{e["title"]} {e["description"]}', label=e['label']),
                   _same('train', 'test'), 'accuracy'),
    'imdb_reviews': Set(
        'imdb_reviews/plain_text', 'classification',
        rename(text='text', label='label'),
        _same('train', 'test', 'unsupervised'), 'accuracy',
        hidden=('unsupervised',)),
    'conll2003': Set(
        'conll2003/conll2003', 'tagging', rename(tokens='tokens', tags='ner'),
        dict(train='train', validation='dev', test='test'), 'span F1', 'ner'),
    'gem/e2e_nlg': Set(
        'gem/e2e_nlg', 'seq2seq', _e2e, _same('train', 'validation', 'test'),
        'BLEU/NIST/METEOR/ROUGE-L/CIDEr over all references', (), gather=True),
    'gsm8k': Set(
        'gsm8k', 'seq2seq', rename(source='question', target='answer',
                                   answer='short_answer'),
        _same('train', 'test'), 'exact match of the number after ####', ()),
    'squad': Set('squad/v1.1', 'seq2seq', _squad,
                 _same('train', 'validation'), 'F1/exact match', ()),

    'cifar10': Set('cifar10', 'image', _IMAGE, _same('train', 'test'),
                   'accuracy'),
    'cifar100': Set('cifar100', 'image', _IMAGE, _same('train', 'test'),
                    'accuracy'),
    **{f'vtab/{name}': Set(t.builder, 'image', t.example, t.splits, 'accuracy',
                           t.labels) for name, t in VTAB.items()},
}


def open_tfds(name, split, path='', labelled=True):
  """One split of one set of `SETS`.

  Args:
    name: key of `SETS`.
    split: a split of the set; 'train800', 'val200', 'train800val200' and 'test'
      of the VTAB tasks; a slice in the notation of tensorflow-datasets, such
      as 'train[:90%]', of a split that is theirs as well.
    path: folder of the prepared sets; theirs if empty, which is
      $TFDS_DATA_DIR or ~/tensorflow_datasets.
    labelled: False to open a split without its labels. The only way to open
      one whose labels were never released, such as GLUE's test splits.

  Returns:
    A `Source`.

  Raises:
    ValueError: unknown set or split, no released labels, another file format;
      at an example: a label outside the label set.
    FileNotFoundError: the set is not prepared; says how it is.
  """
  if name not in SETS:
    raise ValueError(f'unknown data set tfds:{name}{nearest(name, SETS)}')
  entry = SETS[name]
  their_split, words = _their_split(name, entry, split)
  if labelled and set(words) & set(entry.hidden):
    seen = [s for s in entry.splits if s not in entry.hidden]
    raise ValueError(
        f'the labels of tfds:{name} {split} were never released; labelled='
        f'False opens it without, labelled are {", ".join(seen) or "none"}')
  builder = _builder(entry.builder, path)
  rows = _data_source(builder, their_split, name, path)
  labels = entry.labels
  if isinstance(labels, str):
    feature = builder.info.features[labels]
    labels = getattr(feature, 'feature', feature).names  # That of a sequence.
  labels, full = tuple(labels), f'tfds:{name} {split}'
  if not len(rows):
    raise ValueError(f'{full} is empty: expected at least one example')

  def get(i):
    example = {k: plain(v) for k, v in entry.example(_texts(rows[i])).items()
               if v is not None}
    if entry.kind == 'tagging':
      example['tags'] = [labels[tag] for tag in example['tags']]
    if not labelled:
      return {k: v for k, v in example.items()
              if k not in ('label', 'tags', 'target', 'references', 'answer')}
    return check_example(example, entry.kind, labels, i, full)
  examples = Examples(len(rows), get)
  if entry.gather and 'train' not in words:
    examples = _gathered(examples)
  return Source(examples, entry.kind, labels, entry.metric, full)


def prepare(name, path=''):
  """Downloads a set and writes it as array records; needs to be online.

  Raises:
    ValueError: unknown set.
    ModuleNotFoundError: the set's builder needs a package; names it.
  """
  if name not in SETS:
    raise ValueError(f'unknown data set tfds:{name}{nearest(name, SETS)}')
  try:
    builder = _from_code(SETS[name].builder, path, file_format='array_record')
    builder.download_and_prepare()
  except ModuleNotFoundError as e:
    package = e.name or getattr(e.__cause__, 'name', None)
    raise ModuleNotFoundError(
        f'preparing tfds:{name} needs the package {package}: '
        f'pip install {package}') from e
  return builder


def _their_split(name, entry, split):
  """(split in their notation, names of ours in it)."""
  if split in entry.splits:
    return entry.splits[split], [split]
  words = re.findall(r'[A-Za-z_]\w*', split)
  for word in words or [split]:
    if word not in entry.splits:
      raise ValueError(f'tfds:{name} has no split {split!r}'
                       f'{nearest(word, entry.splits)}')
    if entry.splits[word] != word:
      raise ValueError(
          f'tfds:{name}: {word} is {entry.splits[word]!r} of '
          f'{entry.builder}, which cannot be cut as in {split!r}')
  return split, words


def _builder(name, path):
  """A builder from prepared files, else from code."""
  try:
    # A version makes tensorflow-datasets look for files before code.
    return tfds.builder(f'{name}:*.*.*', **_folder(path))
  except (tfds.core.registered.DatasetNotFoundError, ImportError):
    return _from_code(name, path)


def _from_code(name, path, **kwargs):
  for module in _MODULES:
    importlib.import_module(f'tensorflow_datasets.{module}')
  if not importlib.util.find_spec('tensorflow'):
    # SuperGLUE's builder (tensorflow-datasets 4.9.10) needs TensorFlow for the
    # name of one dtype alone, for which numpy's does as well.
    module = importlib.import_module('tensorflow_datasets.text.super_glue')
    module.tf = types.SimpleNamespace(int32=np.int32)
  return tfds.builder(name, **_folder(path), **kwargs)


def _folder(path):
  return dict(data_dir=str(path)) if path else {}


def _data_source(builder, split, name, path):
  try:
    return builder.as_data_source(split)
  except (AssertionError, NotImplementedError, ValueError) as e:
    folder = pathlib.Path(builder.data_dir)
    if not folder.exists():
      raise FileNotFoundError(
          f'tfds:{name} is not prepared: no {folder}. Online, run: '
          f'python -m peftjax.data.tfds_sets {name} {path}'.rstrip()) from e
    if isinstance(e, NotImplementedError):
      raise ValueError(
          f'{folder} holds {builder.info.file_format.value} files, which have '
          'no random access; remove it, or give another folder, and run: '
          f'python -m peftjax.data.tfds_sets {name} FOLDER') from e
    raise ValueError(f'tfds:{name}: cannot open {split!r}: {e}') from e


def _texts(value):
  """Bytes, which array records hold, as text, also in lists and dicts."""
  if isinstance(value, dict):
    return {k: _texts(v) for k, v in value.items()}
  if isinstance(value, bytes) or (
      isinstance(value, np.ndarray) and value.dtype.kind in 'SUO'):
    return plain(value)
  return value


def _gathered(examples):
  """One example a source, in order, with the references of all of its own."""
  groups = collections.defaultdict(list)
  for example in examples:
    if 'target' not in example:
      return examples
    groups[example['source']].append(example)
  return [{**group[0], 'references': list(dict.fromkeys(
      r for e in group for r in e['references']))}
          for group in groups.values()]


if __name__ == '__main__':
  if not 2 <= len(sys.argv) <= 3:
    sys.exit('usage: python -m peftjax.data.tfds_sets NAME [FOLDER]')
  print(prepare(*sys.argv[1:]).data_dir)
