"""OFT: OFT and COFT.

  ours                          PEFT
  q [n, B (B - 1) / 2]          oft_R.weight, the same with another sign where
                                use_cayley_neumann is False

PEFT's exact branch solves for the transposed rotation of its Neumann branch, so
an adapter of the one, read as the other, turns the wrong way. Dropout of blocks
(module_dropout) is stored but never applied by PEFT. A convolution over more
than one pixel is refused: PEFT rotates patches of the image and adds them up
again where they overlap, which is not what it merges.
"""

import re

import numpy as np

from peftjax.interop.peft.part import array, one, Part, sites_of

METHODS = ('orthogonal.oft', 'orthogonal.coft')
SUFFIXES = ('oft_R.weight',)
CONFIG = dict(r=0, oft_block_size=0, module_dropout=0.0, coft=False, eps=6e-5,
              block_share=False, use_cayley_neumann=True,
              num_cayley_neumann_terms=5, fan_in_fan_out=False,
              init_weights=True)


def _check(module):
  if module.kind not in ('linear', 'conv'):
    raise ValueError(
        f'{module.name}: PEFT has no OFT of a {module.kind} that turns its '
        "input; leave it out of the sites, or write the folded model (format "
        "'merged')")
  if module.kind == 'conv' and module.shape[:2] != (1, 1):
    raise ValueError(
        f'{module.name}: OFT of a convolution over {module.shape[:2]} pixels '
        'is not the same function in PEFT; leave it out of the sites')


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  given, sizes, modules = part.settings, {}, {}
  exact = given['cayley'] == 'exact'
  for path, t in part.theta.items():
    module, _ = names.module(path)
    _check(module)
    sizes[path] = block(t['q'].shape[-1])
    q = np.asarray(t['q'])
    modules[module.name] = {'oft_R.weight': array(-q if exact else q)}
  coft = part.spec['name'] == 'orthogonal.coft'
  for path, t in part.theta.items() if coft else ():
    norms = np.sqrt(2 * (np.asarray(t['q'], float) ** 2).sum(-1))
    most = given['eps'] / np.sqrt(len(norms))
    if norms.max() > most * (1 + 1e-4):
      raise ValueError(
          f'{path!r}: a block of norm {norms.max():.3g} outside the radius '
          f'{most:.3g} of eps={given["eps"]}; PEFT would move it when it runs; '
          'train on, or project by the method\'s after_step')
  config = dict(
      r=0, oft_block_size=one(sizes, 'the block size'),
      module_dropout=given['block_dropout'], coft=coft,
      block_share=bool(given['shared']), use_cayley_neumann=not exact,
      num_cayley_neumann_terms=given['terms'], fan_in_fan_out=False,
      init_weights=True)
  if coft:
    config['eps'] = given['eps']
  return config, modules


def block(n):
  """B of n = B (B - 1) / 2."""
  return int((1 + (1 + 8 * n) ** 0.5) / 2 + 1e-9)


def _number(version):
  """(0, 18) of '0.18.2.dev0'."""
  found = re.match(r'(\d+)\.(\d+)', version)
  return tuple(map(int, found.groups())) if found else (0, 0)


def read(config, modules, names, sites):
  """See `peftjax.interop.peft`."""
  theta, sizes = {}, {}
  version = str(config.get('peft_version') or '0').partition('@')[0]
  if config['use_cayley_neumann'] and _number(version) < (0, 18):
    raise ValueError(
        f'an OFT of PEFT {version if version != "0" else "before 0.18"} with '
        'use_cayley_neumann: its series was another; train it again with PEFT '
        '0.18 or newer')
  exact = not config['use_cayley_neumann']
  for name, t in modules.items():
    module = names.path(name)
    _check(module)
    q = t['oft_R.weight']
    size = block(q.shape[-1])
    d_in = sites[module.path].params['kernel'].shape[0]
    blocks = 1 if config['block_share'] else d_in // size
    if q.ndim != 2 or q.shape[0] != blocks or d_in % size or (
        q.shape[1] != size * (size - 1) // 2):
      raise ValueError(
          f'{name}: oft_R.weight {list(q.shape)} does not rotate {d_in} inputs'
          f'{" in shared blocks" if config["block_share"] else ""}; the adapter '
          'is of another base')
    sizes[name] = size
    theta[module.path] = dict(q=array(-q if exact else q))
  # PEFT moves a size that does not divide d_in: what is stored counts.
  spec = dict(
      name='orthogonal.coft' if config['coft'] else 'orthogonal.oft',
      shared=config['block_share'], cayley='exact' if exact else 'neumann',
      block_dropout=config['module_dropout'], sites=sites_of(theta))
  if config['oft_block_size'] and len(set(sizes.values())) == 1:
    spec['block_size'] = one(sizes, 'the block size')
  elif config['r']:
    spec['blocks'] = config['r']
  else:
    spec['block_size'] = one(sizes, 'the block size')
  if not exact:
    spec['terms'] = config['num_cayley_neumann_terms']
  if config['coft']:
    spec['eps'] = config['eps']
  return Part(spec, theta)
