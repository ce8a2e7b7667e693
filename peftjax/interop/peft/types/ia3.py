"""IA3: (IA)^3.

  ours                              PEFT
  l [d_out], output side            ia3_l [d_out, 1]; of a convolution
                                    [1, d_out, 1, 1]
  l [d_in, 1], input side           ia3_l [1, d_in] of a feedforward module; of a
                                    convolution [1, c_in, 1, 1]

Slices of a fused kernel become one module, with 1 where nothing is scaled.
"""

import re

import numpy as np

from peftjax.interop.peft.part import array, Part, sites_of

METHODS = ('scaling.ia3',)
SUFFIXES = ('ia3_l',)
CONFIG = dict(feedforward_modules=None, fan_in_fan_out=False,
              init_ia3_weights=True)


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  modules, inputs, conv1d = {}, [], False
  for path, t in part.theta.items():
    module, span = names.module(path)
    if module.kind == 'embedding':
      raise ValueError(f'{module.name}: PEFT has no (IA)^3 of a table')
    conv1d |= module.kind == 'conv1d'
    l = np.asarray(t['l'])
    fed = l.ndim == 2
    l = l.reshape(-1)
    if span is not None:
      if fed:
        raise ValueError(f'{path!r}: the input of {module.name} is shared by '
                         'its slices; scale it whole, or their outputs')
      width = sites[path].leaves['kernel'].full[1]
      before = modules.get(module.name)
      whole = np.ones(width, l.dtype) if before is None else (
          before['ia3_l'].reshape(-1))
      whole[slice(*span)] = l
      l = whole
    if fed:
      inputs.append(module.name)
    if module.kind == 'conv':
      l = l[None, :, None, None]
    else:
      l = l[None] if fed else l[:, None]
    modules[module.name] = dict(ia3_l=array(l))
  config = dict(feedforward_modules=names.targets(inputs) if inputs else [],
                fan_in_fan_out=conv1d, init_ia3_weights=True)
  return config, modules


def read(config, modules, names, sites):
  """See `peftjax.interop.peft`."""
  theta, inputs = {}, []
  fed_names = config['feedforward_modules'] or []
  for name, t in modules.items():
    module = names.path(name)
    l = t['ia3_l'].reshape(-1)
    d_in, d_out = sites[module.path].params['kernel'].shape
    if module.kind == 'conv':
      d_in = sites[module.path].x.shape[-1]
    fed = _ends(name, fed_names)
    shape = t['ia3_l'].shape
    if module.kind != 'conv' and (shape[0] == 1) != fed and max(shape) > 1:
      raise ValueError(
          f'{name}: ia3_l {list(shape)} scales its '
          f'{"input" if shape[0] == 1 else "output"}, the config\'s '
          f'feedforward_modules {fed_names} say otherwise')
    if len(l) != (d_in if fed else d_out):
      raise ValueError(
          f'{name}: ia3_l {list(shape)} does not fit the '
          f'{"inputs" if fed else "outputs"} of a kernel of {d_in} x {d_out}; '
          'the adapter is of another base')
    theta[module.path] = dict(l=array(l[:, None] if fed else l))
    if fed:
      inputs.append(module.path)
  spec = dict(name='scaling.ia3', sites=sites_of(theta),
              inputs=[sites_of(inputs)['path']] if inputs else [])
  return Part(spec, theta)


def _ends(name, ends):
  """Whether PEFT finds a module in a list of ends of names, or by a regex."""
  if isinstance(ends, str):
    return re.fullmatch(ends, name) is not None
  return any(name == e or name.endswith(f'.{e}') for e in ends)
