"""What the kinds of adapters share: one method's numbers, and patterns."""

import inspect
import re
from typing import NamedTuple

import numpy as np

from peftjax import trees
from peftjax.method import factory


class Part(NamedTuple):
  """One method of an adapter, on the sites of an unrolled model."""

  spec: dict  # keywords for `peftjax.load`
  theta: dict  # {path: {leaf: array}}
  shared: dict = {}  # {leaf: array} of all sites

  @property
  def settings(self):
    """Every hyper-parameter, those at their default too."""
    known = inspect.signature(factory(self.spec['name'])).parameters
    return {**{k: p.default for k, p in known.items()}, **self.spec}


def grouped(module, site):
  """Whether it is a convolution in groups, whose factors in PEFT are others."""
  return module.kind == 'conv' and site.x.shape[-1] != module.shape[-2]


def sites_of(paths):
  """Keywords of `select` for exactly these paths."""
  return dict(path='^(' + '|'.join(map(re.escape, sorted(paths))) + ')$')


def at(patterns, path, default):
  """What ordered (regex, value) pairs, or a mapping, say of a path of ours."""
  pairs = patterns.items() if hasattr(patterns, 'items') else patterns
  return trees.first_match(tuple(map(tuple, pairs)), path, default)


def matched(patterns, module, default):
  """What a mapping of PEFT says of a module: ends of names, as regexes."""
  for key, value in (patterns or {}).items():
    if re.match(rf'(.*\.)?({key})$', module):
      return value
  return default


def commonest(values):
  values = list(values)
  return max(dict.fromkeys(values), key=values.count)


def plain(x):
  """A whole number as an int: what PEFT expects of alphas."""
  return int(x) if float(x).is_integer() else float(x)


def array(x):
  """In memory as safetensors writes it."""
  return np.ascontiguousarray(np.asarray(x))


def one(values, what):
  """The value that all share; adapters of PEFT hold one for all modules."""
  found = set(values.values())
  if len(found) > 1:
    a, b = sorted(found)[:2]
    where = {v: p for p, v in values.items()}
    raise ValueError(
        f'{what} is {a} at {where[a]!r} and {b} at {where[b]!r}; PEFT has one '
        'for a whole adapter: train with one, or write the folded model '
        "(format 'merged')")
  return found.pop()
