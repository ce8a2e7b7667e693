"""What each method can do, measured: the table of `python -m peftjax.methods`.

Numbers of parameters are those of default hyper-parameters on a model of the
shape of `vit_s`, described abstractly. The rest is probed by running the
method, with the small hyper-parameters of its EXAMPLE, on the small model of
the conformance suite. The formula of the count is the docstring's line 'Count:'.
"""

import functools
import importlib
import inspect
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import calibrate
from peftjax import conformance
from peftjax import method as method_lib
from peftjax import sites as sites_lib
from peftjax import theta as theta_lib
from peftjax import trees
from peftjax.conformance import checks
from peftjax.models.vit import ViT

COLUMNS = ('method', 'family', 'trained per layer', 'on `vit_s`', 'share',
           'folds', 'exact at init', 'calibration', 'int8 base')


class Capability(NamedTuple):
  """One method's row.

  Attributes:
    method: 'lora'.
    family: 'lowrank'.
    formula: Trained numbers, from the docstring; '' where the line is missing.
    trained: Trained numbers on a model like vit_s; None where that has no site
      for the method, which needs a table of tokens, say.
    share: The same as a share of the model's parameters, or None.
    folds: Whether it can be written as plain parameters.
    exact: Whether the adapted model starts as the base, up to rounding.
    calibration: 'no', or what statistics are collected of before it starts:
      'inputs', 'gradient', 'examples'.
    int8: Whether it works on an int8 base; None where it trains nothing.
  """

  method: str
  family: str
  formula: str
  trained: int | None
  share: float | None
  folds: bool
  exact: bool
  calibration: str
  int8: bool | None

  def cells(self):
    """The row as text, one entry of COLUMNS each."""
    yes = {True: 'yes', False: 'no', None: '-'}
    size = ('-', '-') if self.trained is None else (
        f'{self.trained:,}', f'{100 * self.share:.3g} %')
    return (f'`{self.family}.{self.method}`', self.family, self.formula, *size,
            yes[self.folds], yes[self.exact], self.calibration, yes[self.int8])


def formula(name):
  """The sentence after 'Count:' in a method's module docstring, as one line."""
  doc = importlib.import_module(f'peftjax.methods.{name}').__doc__ or ''
  found = re.search(r'^Count: (.+?)\.?(?=\s*\n\s*\n|\.\s|\s*\Z)', doc,
                    re.M | re.S)
  return ' '.join(found[1].split()) if found else ''


@functools.cache
def _vit_s():
  """(sites, shapes of the parameters) of a model like vit_s."""
  model, x = ViT(), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  return sites_lib.describe(model, x), params


def required(name):
  """{keyword of the factory that has no default: its value in EXAMPLE}."""
  example = importlib.import_module(f'peftjax.methods.{name}').EXAMPLE
  known = inspect.signature(method_lib.factory(name)).parameters
  return {n: example[n] for n, p in known.items() if p.default is p.empty}


def _trained(name):
  """(trained numbers or None, all numbers) on a model like vit_s."""
  sites, params = _vit_s()
  method = method_lib.load(name, **required(name))
  if not any(map(method.sites, sites.values())):
    return None, trees.count(params)
  theta = jax.eval_shape(
      lambda p: theta_lib.init(method, jax.random.key(0), sites, p,
                               calibrate.stand_in(method, sites)), params)
  trained, _ = theta_lib.partition(method, theta)
  return trees.count(trained), trees.count(params)


def _holds(check, run):
  """Whether a check passes; None where it does not apply."""
  try:
    check(run)
  except conformance.Skip:
    return None
  except AssertionError:
    return False
  return True


@functools.cache
def measure(name):
  """Probes one method under peftjax/methods: a `Capability`."""
  run = conformance.subject(name).run('plain')
  trained, total = _trained(name)
  far = np.abs(run.value(None).out - run.base).max()
  try:
    int8 = not checks.on_int8(run)
  except conformance.Skip:
    int8 = None
  family, _, short = name.partition('.')
  return Capability(
      short, family, formula(name), trained,
      None if trained is None else trained / total,
      bool(_holds(checks.layer_equals_fold, run)),
      bool(far <= checks.EXACT * np.abs(run.base).max()),
      run.method.calibration.of if run.method.calibration else 'no',
      int8)


def rows():
  """A `Capability` of every method."""
  return [measure(name) for name in method_lib.names()]


def line(row, link=''):
  """The table's line of one `Capability`; `link` as of `markdown`."""
  name, *rest = row.cells()
  page = f'{link}{row.family}_{row.method}.md'
  return f'| {" | ".join([f"[{name}]({page})", *rest])} |'


def markdown(link='', of=None):
  """The table in Markdown.

  Args:
    link: Prefix of links to the methods' pages, such as 'docs/methods/'.
    of: `Capability`s; None: those of all methods.
  """
  head = [f'| {" | ".join(c)} |' for c in (COLUMNS, ['---'] * len(COLUMNS))]
  return '\n'.join(head + [
      line(row, link) for row in (rows() if of is None else of)])
