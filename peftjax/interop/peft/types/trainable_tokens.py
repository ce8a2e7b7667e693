"""TRAINABLE_TOKENS: rows of an embedding table; also beside a LoRA.

  ours              PEFT
  rows [n, d]       trainable_tokens_delta [n, d]: the new rows, in spite of its
                    name; token_indices is a list for the whole adapter

Beside a LoRA the tensor is token_adapter.trainable_tokens_delta, and
trainable_token_indices says which rows of which module.
"""

import numpy as np

from peftjax.interop.peft.part import array, Part, sites_of

METHODS = ('selective.trainable_tokens',)
SUFFIXES = ('trainable_tokens_delta',)
CONFIG = dict(token_indices=(), init_weights=True)
BESIDE = 'token_adapter.trainable_tokens_delta'


def _rows(part, names):
  """{module: rows}; raises where a module is no table that PEFT can follow."""
  out = {}
  for path, t in part.theta.items():
    module, _ = names.module(path)
    names.tied(path)  # PEFT ties the decoder's rows as the model does
    out[module.name] = array(t['rows'])
  return out


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  del sites
  rows = _rows(part, names)
  modules = {n: dict(trainable_tokens_delta=v) for n, v in rows.items()}
  config = dict(token_indices=list(map(int, part.settings['tokens'])),
                target_modules=names.targets(rows), init_weights=True)
  for name, v in rows.items():  # PEFT looks for the rows of a tied decoder too
    decoder = names.tied(names.modules[name].path)
    if decoder:
      modules[decoder] = dict(trainable_tokens_delta=v)
  return config, modules


def beside(part, names):
  """({full name: rows}, trainable_token_indices) beside a LoRA."""
  rows = _rows(part, names)
  tokens = list(map(int, part.settings['tokens']))
  return ({f'{names.written(n)}.{BESIDE}': v for n, v in rows.items()},
          {names.written(n): tokens for n in rows})


def read(config, modules, names, sites):
  """See `peftjax.interop.peft`."""
  tokens = list(config['token_indices'])
  theta = {}
  for name, t in modules.items():
    table = names.table_of(name)
    if table:  # PEFT saves the rows of a tied decoder again
      rows = modules.get(table.name, {}).get('trainable_tokens_delta')
      if not np.array_equal(t['trainable_tokens_delta'], rows):
        raise ValueError(f'{name} decodes with {table.name}, but their rows '
                         'differ')
      continue
    module = names.path(name)
    if module.kind != 'embedding':
      raise ValueError(f'{name} is a {module.kind} here and no table')
    names.tied(module.path)
    rows, table = t['trainable_tokens_delta'], sites[module.path].params['kernel']
    if rows.shape != (len(tokens), table.shape[1]):
      raise ValueError(
          f'{name}: rows {list(rows.shape)} for {len(tokens)} token_indices and '
          f'a table of {list(table.shape)}; the adapter is of another base')
    theta[module.path] = dict(rows=array(rows))
  spec = dict(name='selective.trainable_tokens', tokens=tokens,
              sites=sites_of(theta))
  return Part(spec, theta)
