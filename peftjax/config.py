"""Training configs: what a run can be told, checked before any work.

A config is a python file with `get_config(arg=None)` that returns an
`ml_collections.ConfigDict` with exactly the keys of `defaults`.
"""

import json
import math
from collections.abc import Mapping

import ml_collections
from ml_collections import config_dict

from peftjax import trees
from peftjax.method import nearest
from peftjax.sites import FUSED_RULES

DTYPES = ('float32', 'bfloat16')
SCHEDULES = ('cosine', 'linear', 'constant')
SPLITS = ('test', 'validation', 'train')

# Keys that change what is written, not what is trained: a run may be continued
# with other values.
COSMETIC = ('log_every', 'eval_every', 'watch_split', 'checkpoint_every',
            'keep')

# Keys that say where numbers lie, not what they are: a run may be continued on
# other devices. The batch stays as it was.
PLACEMENT = ('mesh', 'shard_rules')

# Of the images that are trained on: not at all; the crop anywhere; and mirrored,
# which digits and letters must not be.
AUGMENT = ('', 'crop', 'crop_flip')

# Keys below which anything may stand; checked where it is used.
_FREE = ('method', 'shard_rules', 'optim.groups', 'data.options',
         'calibrate.options')


def defaults():
  """A config with every key; `method` is left to be given."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.steps = 150
  c.batch = 32
  c.eval_batch = 200
  c.eval_split = 'test'
  c.eval_before = True  # also before the first step
  c.dtype = 'float32'  # of the computation
  # weights: what `bases.load` takes: the name of a weight file of the package,
  # a path of one, a folder in Hugging Face's layout or a hub id; name: the
  # module of peftjax.models that they must be of, '': any.
  # param_dtype: what the base is kept in; theta stays float32.
  # fused: kernels that hold several projections side by side (GPT-2's qkv) are
  # 'split' into a site each, or kept 'whole' as adapters of PEFT have them.
  c.model = dict(name='', weights='vit_s', scan=False, remat=False,
                 fused='split', param_dtype='float32')
  # Adapter folder whose theta training starts from; '': what `init` makes.
  c.start = ''
  # name, path, options: as `data.sources.open_split` takes them. The first so
  # many examples of the splits are used; 0: all. splits: what the set calls
  # them, or parts of them: 'train[:80%]'. stream: examples are read and encoded
  # while the steps run, for sets that do not fit into memory; augment: one of
  # AUGMENT, with stream.
  c.data = dict(name='kmnist', path='', train=800, validation=0, test=0,
                options={}, splits={s: s for s in SPLITS}, stream=False,
                augment='')
  c.task = dict(
      name='image',  # see peftjax.tasks
      metric='',  # that learning rates are chosen by; '': the task's first
      head='',  # of the model; '': the task's
      tokenizer='',  # folder or file; '': where the weights are
      length=128,  # most tokens of a text; of prompt and answer together
      target_length=0,  # of an encoder-decoder's targets; 0: length
      buckets=0,  # lengths that batches may have, the last halved; 0: one
      packed=False,  # lm, seq2seq: several texts in a row of training
      prompt='plain',  # seq2seq: see peftjax.data.chat
      max_new_tokens=64,  # seq2seq: written at evaluation
      answer='',  # seq2seq: see measures.answer; '': as the answers look
      temperature=0.05,  # retrieve: what cosines are divided by
      scale=5.0)  # retrieve: the largest similarity
  # ({'name': 'lowrank.lora', 'rank': 8}, ...), innermost first.
  c.method = ()
  c.loss = dict(label_smoothing=0.0)
  # What methods that start from data see of it: so many batches of so many rows
  # (0: batch) of the training data, or of the set that name, path, split and
  # options say, encoded for the same task; at_once: layers whose statistics are
  # held at a time (0: all), at a pass over the batches for each group of them.
  c.calibrate = dict(batches=8, batch=0, at_once=0, name='', path='',
                     split='train', options={})
  number = lambda: config_dict.placeholder(float)
  c.optim = dict(
      lr=1e-3, weight_decay=0.0, clip=1.0, schedule='cosine', warmup=0.1,
      b1=0.9, b2=0.999, eps=1e-8, ema=0.0,
      # What a group has of its own; None: as the built-in groups of optim.py.
      groups={g: dict(lr=number(), lr_abs=number(), weight_decay=number(),
                      clip=number(), b1=number(), b2=number())
              for g in ('head', 'gate', 'fast', 'no_decay', 'search',
                        'strength')})
  c.mesh = dict(data=-1, model=1)  # -1: the rest of the devices
  c.shard_rules = ()  # ((regex on a param's path, axes of its dims), ...)
  c.log_every = 10
  c.eval_every = 0  # 0: only before and after
  c.watch_split = ''  # what eval_every looks at; '': eval_split
  c.checkpoint_every = 50  # 0: only at the end
  c.keep = 2  # checkpoints
  return c


def to_json(config):
  """The config as JSON values: tuples are lists, unset placeholders None."""
  return json.loads(json.dumps(
      config.to_dict(), default=lambda v: v.to_dict()))


def check(config):
  """Raises a ValueError for keys and values that no run can use."""
  if not hasattr(config, 'to_dict'):
    raise ValueError(f'expected a ConfigDict, got {config!r}; get_config must '
                     'return one')
  have, want = config.to_dict(), defaults().to_dict()
  _check_keys(have, want, '')
  if not isinstance(config.method, (tuple, list)) or not config.method:
    raise ValueError(f'method={config.method!r}: expected a tuple of mappings '
                     "such as (dict(name='lowrank.lora', rank=8),)")
  for m in config.method:
    if not hasattr(m, 'items') or 'name' not in m:
      raise ValueError(f'method entry {m!r}: expected a mapping with a name '
                       "such as dict(name='lowrank.lora', rank=8)")
  for key, choices in (('dtype', DTYPES), ('model.param_dtype', DTYPES),
                       ('eval_split', SPLITS), ('watch_split', ('', *SPLITS)),
                       ('model.fused', FUSED_RULES),
                       ('optim.schedule', SCHEDULES),
                       ('data.augment', AUGMENT)):
    value = _get(have, key)
    if value not in choices:
      raise ValueError(f'{key}={value!r}{nearest(value, choices)}')
  for key, least in (('steps', 0), ('seed', 0), ('batch', 1), ('eval_batch', 1),
                     ('data.train', 0), ('data.validation', 0),
                     ('data.test', 0), ('task.length', 1),
                     ('task.target_length', 0), ('task.buckets', 0),
                     ('task.max_new_tokens', 1),
                     ('calibrate.batches', 1), ('calibrate.batch', 0),
                     ('calibrate.at_once', 0), ('log_every', 1),
                     ('eval_every', 0), ('checkpoint_every', 0), ('keep', 1)):
    if _get(have, key) < least:
      raise ValueError(f'{key}={_get(have, key)}: expected at least {least}')
  for key in ('optim.ema', 'optim.b1', 'optim.b2', 'optim.warmup',
              'loss.label_smoothing'):
    if not 0 <= _get(have, key) < 1:
      raise ValueError(f'{key}={_get(have, key)}: expected a number in [0, 1)')
  for key in ('task.temperature', 'task.scale'):
    if not 0 < _get(have, key) < math.inf:
      raise ValueError(f'{key}={_get(have, key)}: expected a finite number '
                       'above 0')
  for key in ('optim.lr', 'optim.weight_decay', 'optim.clip', 'optim.eps'):
    if not 0 <= _get(have, key) < math.inf:
      raise ValueError(f'{key}={_get(have, key)}: expected a finite number, at '
                       'least 0')
  _check_stream(config)


def _check_stream(config):
  """Raises for what examples cannot be, read one batch at a time or at once."""
  data, task = config.data, config.task
  if data.augment and task.name != 'image':
    raise ValueError(f"data.augment={data.augment!r}: task {task.name!r} has no "
                     "images; expected ''")
  if data.augment and not data.stream:
    raise ValueError(
        f'data.augment={data.augment!r}: images that are kept in memory are '
        "encoded once; expected data.stream=True, or ''")
  if not data.stream:
    return
  if task.name == 'retrieve':
    raise ValueError("data.stream=True: task 'retrieve' compares all texts of "
                     'a split; expected False')
  for key in ('buckets', 'packed'):
    if task[key]:
      raise ValueError(
          f'task.{key}={task[key]}: rows are put together by the lengths of '
          'all texts, which a stream does not know; expected '
          f'{type(task[key])()}, or data.stream=False')


def _get(tree, key):
  for part in key.split('.'):
    tree = tree[part]
  return tree


def _check_keys(have, want, at):
  """Same keys and kinds of values as the defaults, level by level."""
  for key in have:
    if key not in want:
      raise ValueError(f'config has an unknown key {at + str(key)!r}'
                       f'{nearest(key, want)}')
  for key, example in want.items():
    name = at + key
    if key not in have:
      raise ValueError(f'config lacks the key {name!r}; its default is '
                       f'{example!r}; start from peftjax.config.defaults()')
    value = have[key]
    if name in _FREE:
      continue
    if isinstance(example, Mapping):
      if not isinstance(value, Mapping):
        raise ValueError(f'{name}={value!r}: expected the keys '
                         f'{sorted(example)}')
      _check_keys(value, example, f'{name}.')
    elif not _fits(value, example):
      raise ValueError(f'{name}={value!r}: expected a '
                       f'{type(example).__name__} such as {example!r}')


def _fits(value, example):
  if isinstance(value, bool) or isinstance(example, bool):
    return isinstance(value, bool) and isinstance(example, bool)
  if isinstance(example, float):
    return isinstance(value, (int, float))
  return isinstance(value, type(example))


def differences(saved, config):
  """['optim.lr: 0.001 in the checkpoint, 0.003 now', ...] of two JSON configs.

  Keys in `COSMETIC` and `PLACEMENT` are passed over. A key that the saved one
  lacks is newer than it, and had its default.
  """
  flat = [{k.replace('/', '.'): v for k, v in trees.flatten(c).items()
           if k.split('/')[0] not in COSMETIC + PLACEMENT}
          for c in (saved, config, to_json(defaults()))]
  flat[0] |= {k: v for k, v in flat.pop().items()
              if k in flat[1] and k not in flat[0]}
  out = []
  for key in sorted(set(flat[0]) | set(flat[1])):
    a, b = (f.get(key, 'not set') for f in flat)
    if a != b:
      out.append(f'{key}: {a!r} in the checkpoint, {b!r} now')
  return out
