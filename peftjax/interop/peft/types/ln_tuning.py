"""LN_TUNING: norms whose scale and bias are trained.

  ours                PEFT
  scale, bias [d]     ln_tuning_layers.weight, ln_tuning_layers.bias

PEFT trains every leaf of a norm.
"""

import numpy as np

from peftjax.interop.peft.part import array, Part, sites_of

METHODS = ('selective.ln_tuning',)
SUFFIXES = ('ln_tuning_layers.weight', 'ln_tuning_layers.bias')
CONFIG = {}


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  del sites
  modules = {}
  for path, t in part.theta.items():
    module, _ = names.module(path)
    if module.kind != 'norm':
      raise ValueError(f'{module.name} is a {module.kind} and no norm')
    last = dict(module.leaves)
    modules[module.name] = {
        f'ln_tuning_layers.{last[leaf]}': array(v) for leaf, v in t.items()}
  return {}, modules


def read(config, modules, names, sites):
  """See `peftjax.interop.peft`."""
  del config
  theta = {}
  for name, t in modules.items():
    module = names.path(name)
    if module.kind != 'norm':
      raise ValueError(f'{name} is a {module.kind} here and no norm')
    want = {f'ln_tuning_layers.{last}': leaf for leaf, last in module.leaves}
    if set(t) != set(want):
      raise ValueError(f'{name}: expected the tensors {sorted(want)}, found '
                       f'{sorted(t)}')
    have = sites[module.path].params
    theta[module.path] = {want[k]: array(np.asarray(v)) for k, v in t.items()}
    for leaf, v in theta[module.path].items():
      if v.shape != tuple(have[leaf].shape):
        raise ValueError(f'{name}: {leaf} of {list(v.shape)}, the base has '
                         f'{list(have[leaf].shape)}; the adapter is of another '
                         'base')
  return Part(dict(name='selective.ln_tuning', sites=sites_of(theta)), theta)
