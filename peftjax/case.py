"""A case: what a config trains or an adapter is evaluated on.

`load` opens the data, loads the base with the head that the task needs, and
encodes the examples, or says what does not fit before anything is trained.
"""

import os
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from peftjax import bases
from peftjax.data import pipeline, sources, text
from peftjax.method import nearest
from peftjax.tasks import base as base_lib
from peftjax.tasks import classification

# Task -> (kinds of data, head of a model from a folder, argument of its call).
TASKS = dict(
    image=(('image',), 'classify', 'images'),
    classify=(('classification',), 'classify', 'ids'),
    regress=(('regression',), 'classify', 'ids'))


class Case(NamedTuple):
  """A task with its model and its data."""

  task: base_lib.Task
  base: bases.Base
  classes: int | None  # outputs of the head; None: it has no classes
  arrays: Any  # {split: {name: [N, ...]}}

  def example(self):
    """(args, kwargs) of the model for one row, for `describe`."""
    arrays = next(iter(self.arrays.values()))
    return self.task.inputs({k: v[:1] for k, v in arrays.items()})


def keep(cache, kind, key, make):
  """make(), or what it returned last for this kind, if the key is the same.

  Args:
    cache: Mapping that is filled; None: nothing is kept.
    kind: One value a kind is kept.
    key: Anything that can be compared.
    make: Function without arguments.
  """
  if cache is None:
    return make()
  if cache.get(kind, (None,))[0] != key:
    cache.pop(kind, None)  # before the next is made: they may be large
    cache[kind] = (key, make())
  return cache[kind][1]


def load(config, splits, classes=None, cache=None):
  """The case of a config.

  Args:
    config: ConfigDict as in `peftjax.config`: `task`, `data`, `model`, `dtype`
      and `loss` are read.
    splits: Names of the splits to encode.
    classes: Outputs of the head; None: as many as the data have.
    cache: Mapping that keeps the base and the arrays for the next call with
      the same config; see `keep`.

  Returns:
    A `Case`.

  Raises:
    FileNotFoundError, ValueError: data, base, tokenizer or task that cannot be
      had, or do not fit each other.
  """
  spec, name = config.task, config.task.name
  if name not in TASKS:
    raise ValueError(f'task.name={name!r}: unknown task{nearest(name, TASKS)}')
  kinds, head, argument = TASKS[name]
  if config.loss.label_smoothing and name in ('regress', 'retrieve'):
    raise ValueError(
        f'loss.label_smoothing={config.loss.label_smoothing}: task {name!r} has '
        'no classes to smooth over; expected 0')
  opened = {s: _open(config.data, s) for s in splits}
  for source in opened.values():
    if source.kind not in kinds:
      fitting = [t for t, (k, *_) in TASKS.items() if source.kind in k]
      raise ValueError(
          f'task.name={name!r} needs data of the kind {" or ".join(kinds)}; '
          f'{source.name} is {source.kind}, which fits '
          f'{" or ".join(map(repr, fitting)) or "no task"}')
  first = next(iter(opened.values()))
  classes = classes or _classes(name, first.labels)
  task = _task(spec, first, classes)
  weights = config.model.weights
  base = keep(
      cache, 'base', (weights, _age(weights), head, classes, config.model.scan,
                      config.model.remat, config.dtype),
      lambda: bases.load(
          weights, spec.head or head, classes, config.model.scan,
          config.model.remat, jnp.dtype(config.dtype), config.model.name))
  base_lib.must_take(base.model, argument, name)
  arrays = {}
  for split, source in opened.items():
    key = (config.data.to_dict(), spec.to_dict(), split, weights, classes)
    arrays[split] = keep(
        cache, f'arrays {split}', key,
        lambda source=source: _encode(spec, source, base, classes))
  return Case(task, base, classes, arrays)


def _age(weights):
  """What changes where the files of a base change."""
  if not os.path.exists(weights):
    return None
  files = [weights] if os.path.isfile(weights) else [
      os.path.join(weights, f) for f in sorted(os.listdir(weights))]
  return [(f, os.path.getmtime(f), os.path.getsize(f)) for f in files]


# ------------------------------------------------------------------------ data
def _open(data, split):
  """The `Source` of a split, cut to as many examples as the config says."""
  source = sources.open_split(
      data.name, data.splits.get(split, split), data.path,
      **_options(data.options))
  first = data['test' if split == 'test' else
               'validation' if split == 'validation' else 'train']
  n = len(source.examples)
  if first > n:
    what = 'images' if source.kind == 'image' else 'examples'
    raise ValueError(f'{first} {what} of {data.name} {split} are asked for, '
                     f'there are {n}; 0 takes all')
  examples = source.examples
  if first:
    examples = [examples[i] for i in range(first)]
  return source._replace(examples=examples)


def _options(options):
  """`data.options` as keywords of `open_split`."""
  options = options.to_dict() if hasattr(options, 'to_dict') else dict(options)
  return {k: v for k, v in options.items() if v is not None}


def _classes(name, labels):
  """Outputs of the head that a task needs, or None."""
  if name in ('image', 'classify', 'tag'):
    return len(labels)
  return 1 if name == 'regress' else None


# What data sets call their metrics -> ours.
_METRICS = {'matthews_correlation': 'matthews', 'pearson/spearman': 'pearson'}


def _task(spec, source, classes):
  """The task of `config.task` on data such as `source`."""
  metric = spec.metric or _METRICS.get(source.metric, '')
  if spec.name == 'image':
    return classification.classify(
        'image', classification.image_inputs, classes, metric)
  if spec.name == 'classify':
    return classification.classify(
        'classify', classification.text_inputs, classes, metric)
  return classification.regress(classification.text_inputs, metric)


# ------------------------------------------------------------------- encoding
def _encode(spec, source, base, classes):
  """{name: [N, ...]} of the examples of a split."""
  if spec.name == 'image':
    return _images(source, base, classes)
  tokenizer = text.load_tokenizer(_tokenizer(spec, base))
  text.check_fits(tokenizer, bases.vocabulary(base), bases.positions(base),
                  spec.length)
  arrays, _ = text.encode_classification(
      source.examples, tokenizer, spec.length,
      classes if spec.name == 'classify' else None)
  if spec.name == 'regress':
    arrays['label'] = arrays['label'].astype(np.float32)
  return _trimmed(_with_types(arrays, base.model))


def _images(source, base, classes):
  images = [e['image'] for e in _all(source.examples)]
  label = np.array([e['label'] for e in _all(source.examples)], np.int32)
  pipeline.check_labels(label, classes)
  return dict(image=pipeline.scale_images(
      np.stack(images), bases.image_side(base)), label=label)


def _all(examples):
  return (examples[i] for i in range(len(examples)))


def _tokenizer(spec, base):
  """Where the tokenizer of a base is."""
  if not (spec.tokenizer or base.folder):
    raise ValueError('task.tokenizer is not set, and the weights are one file '
                     'without a tokenizer: expected a folder or a JSON file')
  return spec.tokenizer or base.folder


def _with_types(arrays, model):
  """Without the token types that a model does not have."""
  if 'types' in arrays and getattr(model, 'types', 0) < 2:
    return {k: v for k, v in arrays.items() if k != 'types'}
  return arrays


def _trimmed(arrays, by=8):
  """Without columns that are padding in all rows, but for a multiple of `by`.

  Nothing that a model sees changes, but what it costs: `length` is what a text
  may have at most.
  """
  longest = int(arrays['mask'].sum(1).max())
  length = arrays['mask'].shape[1]
  short = min(-(-longest // by) * by, length)
  return {k: v[:, :short] if v.ndim > 1 and v.shape[1] == length else v
          for k, v in arrays.items()}
