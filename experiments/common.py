"""What the experiments' configs share: defaults, tasks, config arguments.

  def get_config(arg=None):
    return common.kmnist(
        method=(dict(name='lowrank.lora', rank=8), common.HEAD), lr=3e-3,
        arg=arg)

A config's argument stands after a colon: `--config=FILE.py:runlocal,seed=3`.
"""

from peftjax import config as config_lib
from peftjax.method import nearest

# The head is new, so every method trains it beside what it does elsewhere.
HEAD = dict(name='selective.full', sites=dict(roles='head'), group='head')

_SHORT = dict(lr='optim.lr')
_LOCAL = {'steps': 2, 'batch': 16, 'eval_batch': 32, 'data.train': 64,
          'data.validation': 32, 'data.test': 32}


def base():
  """A config with every key at its default."""
  return config_lib.defaults()


def kmnist(method, lr, arg=None, steps=120, **more):
  """Kuzushiji-MNIST, 10 classes: 800 images to train, 2000 to test.

  Args:
    method: Tuple of mappings for `peftjax.load`, innermost first.
    lr: Learning rate.
    arg: The config's argument, as in `parse_arg`; it is applied last.
    steps: Steps of batch 32.
    **more: Further keys of the config: seed=1, optim=dict(weight_decay=0.1).

  Raises:
    ValueError: an unknown key, or a value of another type.
  """
  config = base()
  config.method = tuple(method)
  config.steps = steps
  config.optim.lr = lr
  config.data.name = 'kmnist'
  for key, value in _flat(more):
    put(config, key, value)
  for key, value in parse_arg(arg).items():
    if key != 'runlocal':
      put(config, key, value)
  return config


def choose(arg, **defaults):
  """Takes the words that a suite has of its own out of a config's argument.

  Args:
    arg: 'task=rte,runlocal,seed=3', or None.
    **defaults: Words it has, with their values where `arg` names none.

  Returns:
    ({word: value}, the rest of `arg`, for `parse_arg`).
  """
  chosen, rest = dict(defaults), []
  for word in (w.strip() for w in (arg or '').split(',')):
    key, equals, value = word.partition('=')
    if equals and key in chosen:
      chosen[key] = value
    elif word:
      rest.append(word)
  return chosen, ','.join(rest)


def pick(text, known, word):
  """Names of a config's argument, as 'a+b', in the order of `known`; '': all.

  Raises:
    ValueError: a name that is not known.
  """
  asked = [n for n in text.split('+') if n]
  for name in asked:
    if name not in known:
      raise ValueError(f'{word}={text!r}: there is no {name!r}'
                       f'{nearest(name, known)}')
  return [n for n in known if not asked or n in asked]


def parse_arg(arg):
  """'runlocal,seed=3,lr=1e-3' -> {'runlocal': True, 'seed': 3, ...}.

  'runlocal' makes the run tiny: two steps on a few images. A key is one of the
  config's, with dots ('data.train=100'); 'lr' is short for 'optim.lr'. Values
  get the type of the key's default.

  Returns:
    {key: value} in the order of the argument, with what 'runlocal' stands for.

  Raises:
    ValueError: an unknown word or key, or a value of another type.
  """
  out, example = {}, dict(_flat(base().to_dict()))
  for part in filter(None, (arg or '').split(',')):
    key, equals, text = part.strip().partition('=')
    if key == 'runlocal' and not equals:
      out |= {'runlocal': True, **_LOCAL}
      continue
    key = _SHORT.get(key, key)
    if key not in example or isinstance(example[key], tuple) or not equals:
      known = [k for k, v in example.items() if not isinstance(v, tuple)]
      raise ValueError(
          f'config argument {part!r}: expected runlocal or key=value'
          f'{nearest(key, ["runlocal", *_SHORT, *known])}')
    out[key] = _typed(key, text, example[key])
  return out


def _typed(key, text, example):
  kind = float if example is None else type(example)
  try:
    if kind is bool:
      return {'true': True, 'false': False}[text.lower()]
    return kind(text)
  except (KeyError, ValueError) as e:
    near = 'True or False' if kind is bool else f'such as {example!r}'
    raise ValueError(f'config argument {key}={text!r}: expected a '
                     f'{kind.__name__}, {near}') from e


def _flat(tree, at=''):
  """(dotted key, value) of every leaf of nested mappings."""
  for key, value in tree.items():
    if hasattr(value, 'items'):
      yield from _flat(value, f'{at}{key}.')
    else:
      yield at + key, value


def put(config, key, value):
  """Sets a dotted key; a ValueError for an unknown one or another type."""
  *parents, last = key.split('.')
  for name in parents:
    if name not in config:
      raise ValueError(f'config has no key {key!r}{nearest(name, config)}')
    config = config[name]
  if last not in config:
    raise ValueError(f'config has no key {key!r}{nearest(last, config)}')
  try:
    config[last] = value
  except TypeError as e:
    raise ValueError(f'config key {key!r}: {e}') from e
