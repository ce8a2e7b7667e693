"""What both directions start from: a base, its sites, its torch names."""

import os
from typing import Any, NamedTuple

import numpy as np

from peftjax import bases
from peftjax import trees
from peftjax.artifact import Adapter, load_adapter
from peftjax.interop import families
from peftjax.interop.peft.names import Names
from peftjax.interop.peft.part import Part
from peftjax.method import as_methods, SHARED
from peftjax.sites import describe, FUSED_RULES


class Source(NamedTuple):
  """A base beside its unrolled description."""

  weights: str  # how it is found again
  base: bases.Base
  sites: Any  # of `base.model`, as it is
  unrolled: Any  # of the same model without scan
  flat: dict  # its unrolled params, {path: array}
  names: Names

  @property
  def param_dtype(self):
    """Name of the type of its parameters, which have one."""
    return str(next(iter(self.flat.values())).dtype)

  @property
  def metadata(self):
    """What an adapter's file says of its base, beside its name."""
    return {'peftjax.fingerprint': self.fingerprint,
            'peftjax.param_dtype': self.param_dtype}

  @property
  def fingerprint(self):
    """Of the unrolled parameters: one for both forms of a base."""
    if not self.names.scan:
      return self.base.fingerprint
    return trees.fingerprint(trees.unflatten(self.flat))


def open_base(weights, head='own', classes=None, scan=False, fused='split',
              keep_head='keep', transformers=5, param_dtype='float32'):
  """Loads a base and describes it.

  Args:
    weights: As of `bases.load`, but no weight file of this library.
    head, classes, scan, param_dtype: As of `bases.load`.
    fused: 'split' or 'whole', as config.model.fused.
    keep_head, transformers: As of `Names`.

  Raises:
    ValueError: weights that no class of transformers belongs to.
  """
  weights = os.fspath(weights)
  if not bases.is_folder(weights):
    raise ValueError(
        f'{weights!r} is a weight file of this library, whose model no class '
        'of transformers knows; expected a base in Hugging Face\'s layout')
  base = bases.load(weights, head, classes, scan, param_dtype=param_dtype)
  rules = FUSED_RULES[fused]
  example = lambda m: families.example(m, base.config)
  names = Names(base.model, base.config, keep_head, transformers)
  sites = describe(base.model, *example(base.model), fused=rules)
  unrolled, flat = sites, trees.flatten(base.params)
  if names.scan:
    plain = names.model
    unrolled = describe(plain, *example(plain), fused=rules)
    flat = trees.flatten(trees.unstack(base.params))
  return Source(weights, base, sites, unrolled, flat, names)


def open_adapter(adapter_dir, weights=None, **options):
  """(Source, Adapter, [Part]) of an adapter folder of this library.

  Args:
    adapter_dir: What `save_adapter` wrote.
    weights: Its base, if not what the adapter says.
    **options: keep_head, transformers, as of `open_base`.

  Raises:
    ValueError: an adapter for another base, or a base that nobody names.
  """
  said = load_adapter(adapter_dir).meta['base']
  weights = weights or said.get('weights')
  if not weights:
    raise ValueError(f'{adapter_dir} does not name its base; give --base')
  source = open_base(
      weights, said.get('head', 'own'), said.get('classes'),
      bool(said.get('scan')), said.get('fused', 'split'),
      param_dtype=said.get('param_dtype', 'float32'), **options)
  adapter = load_adapter(adapter_dir, source.sites, source.base.params)
  return source, adapter, parts_of(adapter, source.names)


def parts_of(adapter: Adapter, names):
  """A `Part` for each method, unrolled, on the host."""
  parts = []
  for name, method in as_methods(adapter.methods).items():
    theta = dict(adapter.theta[name])
    shared = theta.pop(SHARED, {})
    theta = {p: {n: np.asarray(v) for n, v in t.items()}
             for p, t in names.unroll(theta).items()}
    parts.append(Part(dict(method.spec), theta, {
        n: np.asarray(v) for n, v in shared.items()}))
  return parts
