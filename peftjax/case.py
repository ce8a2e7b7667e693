"""A case: what a config trains or an adapter is evaluated on.

`load` opens the data, loads the base with the head that the task needs, and
encodes the examples, or says what does not fit before anything is trained.
"""

import functools
import os
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp

from peftjax import bases
from peftjax import config as config_lib
from peftjax import sharding
from peftjax.data import packing, pipeline, sources, stream, text
from peftjax.data.examples import Examples, Source
from peftjax.method import nearest
from peftjax.tasks import base as base_lib
from peftjax.tasks import classification, images, lm, regression, retrieval
from peftjax.tasks import seq2seq, tagging

# config.task.name -> its module.
TASKS = dict(image=images, classify=classification, regress=regression,
             tag=tagging, lm=lm, seq2seq=seq2seq, retrieve=retrieval)
# Their labels are no classes.
_UNSMOOTHED = ('regress', 'retrieve')


class Case(NamedTuple):
  """A task with its model and its data."""

  task: base_lib.Task
  base: bases.Base
  head: str | None  # of the model
  classes: int | None  # outputs of the head; None: it has no classes
  arrays: Any  # {split: {name: [N, ...]}, or a stream.Split of it}

  def sample(self, split=None, count=1):
    """{name: [count, ...]}, the first rows of a split; None: of any."""
    arrays = self.arrays[split or next(iter(self.arrays))]
    if isinstance(arrays, stream.Split):
      return stream.sample(arrays, count)
    return {k: v[:count] for k, v in arrays.items()}

  def example(self):
    """(args, kwargs) of the model for one row, for `describe`."""
    return self.task.inputs(self.sample())


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


def load(config, splits, classes=None, cache=None, mesh=None,
         read=None):
  """The case of a config.

  Args:
    config: ConfigDict as in `peftjax.config`: `task`, `data`, `model`, `dtype`
      and `loss` are read.
    splits: Names of the splits to encode.
    classes: Outputs of the head; None: as many as the data have.
    cache: Mapping that keeps the base and the arrays for the next call with
      the same config; see `keep`.
    mesh: Where the base is to lie, by `config.shard_rules`; None: on the host.
      A folder is read straight onto the devices, a weight file is not.
    read: `bases.shapes`, without a mesh, or None: `bases.load`.

  Returns:
    A `Case`.

  Raises:
    FileNotFoundError, ValueError: data, base, tokenizer or task that cannot be
      had, or do not fit each other.
  """
  spec, name = config.task, config.task.name
  module = _module(name)
  if config.loss.label_smoothing and name in _UNSMOOTHED:
    raise ValueError(
        f'loss.label_smoothing={config.loss.label_smoothing}: task {name!r} '
        'has no classes to smooth over; expected 0')
  opened = {s: keep(
      cache, f'source {s}', config.data.to_dict(),
      lambda s=s: _open(config.data, s)) for s in splits}
  for source in opened.values():
    if source.kind not in module.KINDS:
      fitting = [t for t, m in TASKS.items() if source.kind in m.KINDS]
      raise ValueError(
          f'task.name={name!r} needs data of the kind '
          f'{" or ".join(module.KINDS)}; {source.name} is {source.kind}, which '
          f'fits {" or ".join(map(repr, fitting)) or "no task"}')
  held_out = opened[splits[-1]]
  classes = classes or module.outputs(held_out)
  model, weights = config.model, config.model.weights
  head = spec.head or module.HEAD
  more = {} if mesh is None else dict(shardings=functools.partial(
      sharding.params_sharding, mesh, config.shard_rules))
  base = keep(
      cache, 'base', (weights, _age(weights), head, classes, model.to_dict(),
                      config.dtype, mesh, config_lib.to_json(config)[
                          'shard_rules'] if mesh else None),
      lambda: _base(config, read or bases.load, head, classes, **more))
  base_lib.must_take(base.model, module.CALL, name)
  task = module.task(spec, held_out, classes, base)
  tokenizer = None if module is images else _tokenizer(spec, base)
  encode = module.arrays
  if config.data.stream:
    encode = functools.partial(_stream, module, config.data.augment)
  arrays = {}
  for split, source in opened.items():
    train = split == 'train' and len(opened) > 1
    key = (config.data.to_dict(), spec.to_dict(), train, weights, classes)
    arrays[split] = keep(
        cache, f'arrays {split}', key,
        lambda source=source, train=train: encode(
            spec, source, base, tokenizer, classes, train))
  if module is seq2seq:
    task = task._replace(generate=seq2seq.writer(
        spec, held_out, base, tokenizer, config.eval_batch,
        config.data.stream))
  return Case(task, base, head, classes, arrays)


def shapes(config, classes=None):
  """The case of a config without its weights and, mostly, without its data.

  The base's params are ShapeDtypeStructs, and so are the arrays, of one row
  that is as long as any may be. Tasks whose rows depend on the data (they have
  no `shapes`) open it all the same.

  Args:
    config: As of `load`.
    classes: Outputs of the head; None: as many as the data have, or where they
      cannot be opened, as the base's own head.

  Raises:
    FileNotFoundError, ValueError: as `load`.
  """
  spec, module = config.task, _module(config.task.name)
  if not hasattr(module, 'shapes'):
    case = load(config, ('train',), classes, read=bases.shapes)
    return case._replace(arrays=dict(
        train=jax.eval_shape(lambda: case.sample('train'))))
  if classes is None and module.HEAD != 'lm':
    try:
      classes = module.outputs(_open(config.data, 'train'))
    except (ImportError, OSError, ValueError) as e:
      logging.warning('the data cannot be opened, so the head is as large as '
                      'the base says: %s', e)
  head = spec.head or module.HEAD
  base = _base(config, bases.shapes, head, classes)
  base_lib.must_take(base.model, module.CALL, spec.name)
  if classes is None and module.HEAD != 'lm':
    classes = base.model.classes
  task = module.task(
      spec, Source((), module.KINDS[0], (), '', 'no data'), classes, base)
  return Case(task, base, head, classes, dict(train={
      name: jax.ShapeDtypeStruct((1, *shape), kind)
      for name, (shape, kind) in module.shapes(spec, base).items()}))


def _module(name):
  if name not in TASKS:
    raise ValueError(f'task.name={name!r}: unknown task{nearest(name, TASKS)}')
  return TASKS[name]


def _base(config, read, head, classes, **more):
  """The base of a config, by `bases.load` or `bases.shapes`."""
  model = config.model
  return read(model.weights, head, classes, model.scan, model.remat,
              jnp.dtype(config.dtype), model.name,
              param_dtype=jnp.dtype(model.param_dtype), **more)


def config_of(meta, weights=None, data=None, where='the adapter'):
  """The config of the case that an adapter was trained on.

  Args:
    meta: `Adapter.meta`, whose entry 'base' names weights, data and task.
    weights, data: In the place of what it names; None: what it names.
    where: The adapter, for messages.

  Raises:
    ValueError: weights or data that nobody names, or a task of another version.
  """
  base = meta['base']
  weights, data = weights or base.get('weights'), data or base.get('data')
  for value, flag in ((weights, 'weights'), (data, 'data')):
    if not value:
      raise ValueError(f'{where} does not name its {flag}; give --{flag}')
  config = config_lib.defaults()
  config.model.weights, config.model.scan = weights, bool(base.get('scan'))
  config.model.fused = base.get('fused', 'split')
  config.model.param_dtype = base.get('param_dtype', 'float32')
  config.data.train = 0  # all
  config.data.stream = bool(base.get('stream'))
  config.data.name = data
  if data == base.get('data'):
    config.data.path = base.get('path', '')
    config.data.options = base.get('options', {})
    config.data.splits.update(base.get('splits', {}))
  # An adapter that names no task is of images, the first task there was.
  for key, value in base.get('task', {}).items():
    if key not in config.task:
      raise ValueError(f'{where}: unknown setting task.{key}'
                       f'{nearest(key, config.task)}')
    config.task[key] = value
  return config


def batches(config, arrays, shard=0, shards=1):
  """Batches to train on, and the lengths that they have.

  Args:
    config: ConfigDict; batch, seed and task.buckets are read.
    arrays: {name: [N, ...]}, or a `stream.Split`.
    shard, shards: Which part of every batch is read here.

  Returns:
    (iterator with get_state and set_state, tuple of numbers of tokens); one
    None where all batches have the shape of the arrays.
  """
  if isinstance(arrays, stream.Split):
    return stream.stream(
        *arrays[:2], batch_size=config.batch, seed=config.seed,
        augment=arrays.augment, shard_index=shard, shard_count=shards), (None,)
  args = (arrays, config.batch, config.seed)
  count = config.task.buckets
  if count < 2:
    return pipeline.train_iterator(*args, shard, shards), (None,)
  others = {'mask_b', 'targets_in', 'segments'} & set(arrays)
  if 'mask' not in arrays or others:
    raise ValueError(
        f'task.buckets={count}: batches of task {config.task.name!r} have no '
        f'single length to be sorted by ({", ".join(sorted(arrays))}); '
        'expected 0')
  lengths = packing.bucket_lengths(arrays['mask'].shape[1], count)
  return packing.bucket_iterator(*args, lengths, shard, shards), lengths


def cut(arrays, length):
  """Arrays with so many tokens; None: as they are."""
  if length is None:
    return arrays
  full = arrays['mask'].shape[1]
  return {k: v[:, :length] if v.ndim > 1 and v.shape[1] == full else v
          for k, v in arrays.items()}


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
  if first and data.stream:
    examples = Examples(first, examples.__getitem__)
  elif first:
    examples = [examples[i] for i in range(first)]
  return source._replace(examples=examples)


def _stream(module, augment, spec, source, base, tokenizer, classes, train):
  """The `stream.Split` of a source, in the place of `module.arrays`."""
  args = (spec, source, base, tokenizer, classes)
  if train and augment:
    return stream.Split(source.examples, module.encoder(*args, ready=True),
                        module.augment(base, augment == 'crop_flip'))
  return stream.Split(source.examples, module.encoder(*args))


def _options(options):
  """`data.options` as keywords of `open_split`."""
  options = options.to_dict() if hasattr(options, 'to_dict') else dict(options)
  return {k: v for k, v in options.items() if v is not None}


def _tokenizer(spec, base):
  """The tokenizer of a base; raises where it does not fit it."""
  if not (spec.tokenizer or base.folder):
    raise ValueError('task.tokenizer is not set, and the weights are one file '
                     'without a tokenizer: expected a folder or a JSON file')
  found = text.load_tokenizer(spec.tokenizer or base.folder)
  text.check_fits(found, base.model.vocab, bases.positions(base), spec.length)
  return found
