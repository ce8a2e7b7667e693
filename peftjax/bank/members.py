"""Members of a bank: what each changes of the config, and whether they fit."""

import collections
import itertools
import json
import re

import ml_collections

from peftjax import config as config_lib
from peftjax.method import nearest

# Keys that members may differ in; 'data' stands for all that is below it.
CHANGEABLE = ('seed', 'optim.lr', 'optim.warmup', 'data')


def product(members=None, seeds=None, lrs=None):
  """[{config key: value}]: each of `members` with each seed and each rate."""
  seeds = [dict(seed=s) for s in seeds or ()]
  lrs = [{'optim.lr': lr} for lr in lrs or ()]
  found = []
  for parts in itertools.product(members or [{}], seeds or [{}], lrs or [{}]):
    twice = [k for k, n in collections.Counter(
        k for p in parts for k in p).items() if n > 1]
    if twice:
      raise ValueError(f'{twice[0]!r} is given by --members and by a flag of '
                       'its own: give it once')
    found.append({k: v for p in parts for k, v in p.items()})
  return found


def expand(config, members):
  """The config of every member, by the name of its folder.

  Args:
    config: What they have in common.
    members: [{config key: value}], what each of them changes.

  Returns:
    {name: ConfigDict}, in their order.

  Raises:
    ValueError: no members, two that are the same, a key that members cannot
      differ in, or a value that no run can use.
  """
  if not members:
    raise ValueError('a bank needs members: give --seeds, --lrs or --members')
  found = {}
  for i, changes in enumerate(members):
    one = ml_collections.ConfigDict(config.to_dict())
    for key, value in changes.items():
      _put(one, key, value, i)
    try:
      config_lib.check(one)
    except ValueError as e:
      raise ValueError(f'member {i}: {e}') from e
    for j, other in enumerate(found.values()):
      if config_lib.to_json(other) == config_lib.to_json(one):
        raise ValueError(f'members {j} and {i} are the same: {members[j]!r} '
                         f'and {changes!r}')
    said = (f'{k.rpartition(".")[2]}_{v}' for k, v in changes.items())
    label = re.sub(r'[^\w.+-]+', '_', '-'.join((str(i), *said)))
    found[label[:80]] = one
  return found


def _put(config, key, value, i):
  if key not in CHANGEABLE and key.split('.')[0] not in CHANGEABLE:
    raise ValueError(
        f'member {i}: {key!r} cannot differ within a bank, which is one '
        f'program; what can: {", ".join(CHANGEABLE)} (all below it)'
        f'{nearest(key, CHANGEABLE)}')
  *parents, last = key.split('.')
  node = config
  for name in parents:
    node = node.get(name) if hasattr(node, 'get') else None
  if not hasattr(node, 'get') or (last not in node
                                  and parents[1:] != ['options']):
    known = node if hasattr(node, 'get') else config.data
    raise ValueError(
        f'member {i}: config has no key {key!r}{nearest(last, known)}')
  with node.unlocked(), node.ignore_type():
    node[last] = value


def check_alike(names, cases):
  """Raises where members cannot be stacked."""
  def form(case):
    return {k: f'{v.dtype}[B, {", ".join(map(str, v.shape[1:]))}]'
            for k, v in case.sample('train').items()}

  first = form(cases[0])
  for name, case in zip(names, cases):
    if case.classes != cases[0].classes:
      raise ValueError(
          f'member {name} has {case.classes} classes, {names[0]} has '
          f'{cases[0].classes}: members of a bank share their head\'s shape')
    if form(case) != first:
      raise ValueError(
          f'member {name} has batches of {form(case)}, {names[0]} of {first}: '
          'members of a bank are stacked; train them apart, or give them data '
          'of the same shapes')


def read(path):
  """The list of members in a JSON file."""
  with open(path, encoding='utf-8') as f:
    try:
      found = json.load(f)
    except ValueError as e:
      raise ValueError(f'{path} is no JSON: {e}') from e
  if not isinstance(found, list) or not all(
      isinstance(m, dict) for m in found):
    raise ValueError(f'{path}: expected a list of members such as '
                     '[{"seed": 1, "optim.lr": 0.001}]')
  return found
