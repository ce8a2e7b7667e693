"""BOFT.

  ours                       PEFT
  q [m, n, B (B - 1) / 2]    boft_R [m, n, B, B] = A with Q = -(A - A^T) / 2 in
                             our sign; written as the upper triangle -2 q
  s [d_out]                  boft_s [d_out, 1]; of a convolution [1, d_out]

PEFT builds more than one factor only where its CUDA extension compiles;
elsewhere it makes boft_n_butterfly_factor 1, and an adapter with more does not
load there.
"""

import numpy as np

from peftjax.interop.peft.part import array, one, Part, sites_of

METHODS = ('orthogonal.boft',)
SUFFIXES = ('boft_R', 'boft_s')
CONFIG = dict(boft_block_size=4, boft_block_num=0, boft_n_butterfly_factor=1,
              boft_dropout=0.0, fan_in_fan_out=False, init_weights=True)


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  given, modules = part.settings, {}
  size = given['block_size']
  upper = np.triu_indices(size, 1)
  for path, t in part.theta.items():
    module, _ = names.module(path)
    if module.kind not in ('linear', 'conv'):
      raise ValueError(
          f'{module.name}: PEFT has no BOFT of a {module.kind}; leave it out of '
          "the sites, or write the folded model (format 'merged')")
    q = np.asarray(t['q'])
    a = np.zeros((*q.shape[:2], size, size), q.dtype)
    a[..., upper[0], upper[1]] = -2 * q
    s = np.asarray(t['s'])
    modules[module.name] = dict(
        boft_R=a, boft_s=array(s[None] if module.kind == 'conv' else s[:, None]))
  config = dict(
      boft_block_size=size, boft_block_num=0,
      boft_n_butterfly_factor=given['factors'],
      boft_dropout=given['block_dropout'], fan_in_fan_out=False,
      init_weights=True)
  return config, modules


def read(config, modules, names, sites):
  """See `peftjax.interop.peft`."""
  theta, sizes, factors = {}, {}, {}
  for name, t in modules.items():
    module = names.path(name)
    if set(t) != set(SUFFIXES):
      raise ValueError(f'{name}: expected the tensors {sorted(SUFFIXES)}, found '
                       f'{sorted(t)}')
    a, s = t['boft_R'], t['boft_s'].reshape(-1)
    d_in, d_out = sites[module.path].params['kernel'].shape
    if a.ndim != 4 or a.shape[1] * a.shape[2] != d_in or len(s) != d_out or (
        a.shape[2] != a.shape[3]):
      raise ValueError(
          f'{name}: boft_R {list(a.shape)} and boft_s {list(t["boft_s"].shape)} '
          f'do not fit {d_in} inputs and {d_out} outputs; the adapter is of '
          'another base')
    sizes[name], factors[name] = a.shape[2], a.shape[0]
    upper = np.triu_indices(a.shape[2], 1)
    q = (a.swapaxes(-1, -2) - a) / 2
    theta[module.path] = dict(q=array(q[..., upper[0], upper[1]]), s=array(s))
  spec = dict(
      name='orthogonal.boft', block_size=one(sizes, 'the block size'),
      factors=one(factors, 'the number of factors'),
      block_dropout=config['boft_dropout'], sites=sites_of(theta))
  return Part(spec, theta)
