"""Checks of factories: what a method must refuse, and how it says so.

A check here is a function of a `Subject`, and runs once, not in every form of
the model. It raises AssertionError or Skip, as in `checks`.
"""

import inspect
import math
import re

import jax
import jax.numpy as jnp

from peftjax import calibrate
from peftjax import folding
from peftjax import method as method_lib
from peftjax import sites as sites_lib
from peftjax import theta as theta_lib
from peftjax import trees


class Skip(Exception):
  """A check does not apply; the message says why."""


def raises(fn, words, what):
  """Raises unless fn() raises a ValueError that holds all words."""
  try:
    fn()
  except ValueError as e:
    missing = [w for w in map(str, words) if w not in str(e)]
    assert not missing, f'{what}: the error does not say {missing}: {e}'
    return
  except Exception as e:
    raise AssertionError(
        f'{what} raises {type(e).__name__}: {e}; expected a ValueError') from e
  raise AssertionError(f'{what} is accepted')


ALLOWS = {  # value -> how the docstring's entry of a keyword allows for it
    0: r'\b0\b|zero|any', -1: r'negative|any|-1', 10**9: r'any|inf|at least'}


def bad_hyperparameters(subject):
  """Absurd numbers raise, or are documented and work."""
  parameters = inspect.signature(subject.factory).parameters
  doc = inspect.getdoc(subject.factory) or ''
  for name, p in parameters.items():
    if p.default is not None and type(p.default) not in (int, float):
      continue
    kind = float if isinstance(p.default, float) else int
    entry = re.search(rf'^  {name}: (.*(?:\n    .*)*)', doc, re.M)
    assert entry, f'the docstring has no entry for {name!r}'
    values = [*ALLOWS, math.nan] if kind is float else ALLOWS
    for value in values:
      value = kind(value)
      if value == p.default:
        continue
      what = f'{name}={value}'

      def use(name=name, value=value, what=what):
        for v in jax.tree.leaves(_one_layer(subject, {name: value})):
          assert jnp.isfinite(v).all(), f'{what} gives numbers not finite'

      try:
        use()
      except ValueError as e:
        assert str(value) in str(e), f'{what}: the error does not say so: {e}'
      except TypeError:
        assert p.default is None, f'{what} raises TypeError, not ValueError'
      else:
        allowed = ALLOWS.get(value, '(?!)')
        assert re.search(allowed, entry[1]), (
            f'{what} is accepted, but its docstring entry does not allow for '
            f'it: {entry[1]!r}')


def _one_layer(subject, keywords):
  """Theta and folded parameters of the first site, made op by op."""
  sites, params, _ = subject.setting(False)
  method = subject.make(**{**subject.example, **keywords})
  found = sites_lib.matched(method, sites)
  site = folding.site_for(method, next(iter(found.values())))
  own, key = folding.own_leaves(site, trees.flatten(params)), jax.random.key(0)
  p = {n: v.get(own[v.leaf]) for n, v in site.leaves.items()}
  stats = calibrate.stand_in(method, found).get(method.name, {}).get(site.path)
  t = {**method.shared(key, found), **method.init(key, site, p, stats)}
  if not (method.fold or method.replaces):
    return t
  ctx = method_lib.Context(site.path, site)
  return t, folding.fold_site(method, site.leaves, own, t, ctx)


def unknown_hyperparameter(subject):
  """A misspelt keyword raises and names the nearest."""
  if subject.method.spec is None:
    raise Skip('not under peftjax/methods: Python itself refuses')
  known = list(inspect.signature(subject.factory).parameters)[0]
  wrong = known[:-1] + 'x' + known[-1:]
  raises(lambda: subject.make(**{wrong: 1}), [repr(wrong), repr(known)],
          f'{wrong}=1')


def missing_target(subject):
  """A selection that matches nothing raises and lists what there is."""
  if 'sites' not in inspect.signature(subject.factory).parameters:
    raise AssertionError('the factory has no keyword `sites`')
  sites, params, _ = subject.setting(False)
  for keywords, words in (
      (dict(path='no_such_layer'), ['no_such_layer', next(iter(sites)) or '/']),
      (dict(kind='Dens'), ['Dens', 'Dense']),
      (dict(roles='gate'), ['gate'])):
    method = subject.make(**{**subject.example,
                             'sites': sites_lib.select(**keywords)})
    raises(lambda m=method: theta_lib.init(
        m, jax.random.key(0), sites, params), words, f'sites={keywords}')


ONCE = (bad_hyperparameters, unknown_hyperparameter, missing_target)
