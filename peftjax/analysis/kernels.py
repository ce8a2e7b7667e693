"""The kernels of a params tree as methods see them, one layer at a time.

The layers of a scanned stack are kernels of their own, 'blocks/mlp/up (layer
3)', and so are the slices of a fused kernel. All are float32 or better: small
singular vectors do not survive float16.
"""

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import sites as sites_lib
from peftjax import trees
from peftjax import views as views_lib
from peftjax.folding import fold, over_stack, own_leaves
from peftjax.method import Method


def chosen_sites(sites, chosen=sites_lib.kernels):
  """{path: Site} of the kernels to look at.

  Args:
    sites: What `describe` returned.
    chosen: Predicate on sites; by default every kernel but heads and tables,
      which are in neither of the models that papers compare.

  Raises:
    ValueError: a part of `chosen` that matches nothing, or a site without a
      kernel that is a matrix.
  """
  found = sites_lib.matched(Method('analysis', chosen, None), sites)
  for path, site in found.items():
    if 'kernel' not in site.params or len(site.params['kernel'].shape) != 2:
      raise ValueError(f'analysis: {path!r} ({site.kind}) has no kernel that '
                       f'is a matrix; it has {sorted(site.params)}')
  return found


def each(sites, *params, chosen=sites_lib.kernels):
  """Yields (name, kernel [d_in, d_out] of each of the params trees).

  Args:
    sites: What `describe` returned.
    *params: Params trees of the model.
    chosen: As of `chosen_sites`.
  """
  flats = [trees.flatten(p) for p in params]
  for site in chosen_sites(sites, chosen).values():
    for index in np.ndindex(*site.stack):
      yield (_name(site.path, index),
             *(_kernel(site, flat, index) for flat in flats))


def replace(fn, sites, params, *others, chosen=sites_lib.kernels):
  """params with every chosen kernel K replaced by fn(K, K of others...).

  Structure and dtypes are those of params.
  """
  flat = dict(trees.flatten(params))
  flats = [flat, *map(trees.flatten, others)]
  for path, site in chosen_sites(sites, chosen).items():
    new = jnp.stack([fn(*(_kernel(site, f, index) for f in flats))
                     for index in np.ndindex(*site.stack)])
    new = new.reshape(*site.stack, *new.shape[1:])
    base, view = views_lib.split_path(path)[0], site.leaves['kernel']
    key = f'{base}/{view.leaf}' if base else view.leaf
    put = over_stack(view.put, site.stack)
    flat[key] = put(_widen(flat[key]), new).astype(flat[key].dtype)
  return trees.refill(params, flat)


def tuned(methods, params, theta, sites):
  """(params, params with theta folded in), both float32 or better.

  Widened before folding: in bfloat16 the difference would be rounding.

  Raises:
    ValueError: a method that cannot fold.
  """
  wide = jax.tree.map(_widen, params)
  return wide, jax.jit(lambda p, t: fold(methods, p, t, sites))(wide, theta)


def _name(path, index):
  at = ', '.join(map(str, index))
  return f'{path} (layer {at})' if at else path


def _kernel(site, flat, index):
  view = site.leaves['kernel']
  return _widen(view.get(own_leaves(site, flat)[view.leaf][index]))


def _widen(v):
  if not jnp.issubdtype(v.dtype, jnp.floating):
    return v
  return jnp.asarray(v, jnp.promote_types(v.dtype, jnp.float32))
