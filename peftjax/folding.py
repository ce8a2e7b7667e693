"""Fold: theta written into plain parameters, for any params tree.

Fold is the definition of a weight method, its export, and the oracle of its
fast path. It knows nothing of Flax beyond the views that `describe` recorded.
"""

import contextlib
import zlib

import jax
import jax.numpy as jnp

from peftjax import trees
from peftjax import views as views_lib
from peftjax.method import as_methods, check_theta, Context, nearest, SHARED


def _native(site):
  """The site with its leaves as they are stored (whole leaves only)."""
  if any(v.span for v in site.leaves.values()):
    return site
  params = {
      v.leaf: jax.ShapeDtypeStruct(v.shape, site.params[n].dtype)
      for n, v in site.leaves.items()}
  return site._replace(params=params, leaves={
      n: views_lib.native_view(n, s) for n, s in params.items()})


def site_for(method, site):
  return _native(site) if method.replaces else site


def own_leaves(site, flat):
  """The stored leaves of one site, {stored name: array}, stack axes first.

  Raises:
    ValueError: a leaf is missing, boxed, or of another shape.
  """
  base, _ = views_lib.split_path(site.path)
  own = {}
  for view in site.leaves.values():
    key = f'{base}/{view.leaf}' if base else view.leaf
    if key not in flat:
      raise ValueError(f'params has no {key!r}{nearest(key, flat)}')
    want = (*site.stack, *view.shape)
    if not hasattr(flat[key], 'shape'):
      raise ValueError(
          f'params {key!r} is a {type(flat[key]).__name__}, expected an array '
          f'of shape {want}; unbox boxed params by flax.linen.meta.unbox')
    if tuple(flat[key].shape) != want:
      raise ValueError(f'params {key!r} has shape {flat[key].shape}, the model '
                       f'needs {want}')
    own[view.leaf] = flat[key]
  return own


@contextlib.contextmanager
def located(name, path):
  """Errors inside, such as shapes that do not fit, say where they arose."""
  try:
    yield
  except Exception as e:
    e.add_note(f'in {name} at {path!r}')
    raise


def over_stack(fn, stack):
  for _ in stack:
    fn = jax.vmap(fn)
  return fn


def _widen(v):
  low = jnp.issubdtype(v.dtype, jnp.floating) and v.dtype.itemsize < 4
  return v.astype(jnp.float32) if low else v


def fold_site(method, leaves, own, t, ctx):
  """Own leaves of one layer with one method folded in; float32 inside."""
  p = {n: _widen(v.get(own[v.leaf])) for n, v in leaves.items()
       if v.leaf in own}
  with located(method.name, ctx.path):
    t = method.prepare({n: _widen(v) for n, v in t.items()}, ctx)
    new = {**p, **t} if method.replaces else method.fold(p, t)
  out = dict(own)
  for name, value in new.items():
    if name not in leaves:
      raise ValueError(
          f'{method.name} at {ctx.path!r}: folding needs a leaf {name!r} that '
          f'the layer does not have (it has {sorted(leaves)}); build the layer '
          f'with one, leave it out of `sites`, or keep {method.name} unfolded')
    view = leaves[name]
    old = own.get(view.leaf)
    out[view.leaf] = view.put(old, value).astype(
        value.dtype if old is None else old.dtype)
  return out


def must_fold(name, method):
  if method.fold is None and not method.replaces:
    raise ValueError(
        f'{name} has no fold: it changes activations, not weights, so it '
        'cannot be written as plain parameters')


def fold(methods, params, theta, sites, *, train=False, rng=None):
  """Folds theta into plain parameters: the definition of a weight method.

  Works for any params tree, Linen or not.

  Args:
    methods: As given to `init`.
    params: The base's params tree.
    theta: What was trained.
    sites: What `describe` returned for the model or the tree.
    train: Whether random parts (dropout of blocks, gates) are drawn.
    rng: Key for them.

  Returns:
    A params tree of the base's structure and dtypes.

  Raises:
    ValueError: a method that cannot fold, or theta for an unknown site.
  """
  named = as_methods(methods)
  check_theta(named, theta)
  for name, m in named.items():
    must_fold(name, m)
  flat = dict(trees.flatten(params))
  # An accelerator's shorter products are for steps of training alone.
  exact = (contextlib.nullcontext() if train
           else jax.default_matmul_precision('highest'))
  for name, m in named.items():
    common = theta[name].get(SHARED, {})
    for path, t in theta[name].items():
      if path == SHARED:
        continue
      if path not in sites:
        raise ValueError(f'{name}: no site {path!r}{nearest(path, sites)}')
      site = site_for(m, sites[path])
      base, _ = views_lib.split_path(path)
      keys = None
      if rng is not None:
        keys = jax.random.fold_in(rng, zlib.crc32(f'{name}/{path}'.encode()))
        keys = jax.random.split(keys, site.stack) if site.stack else keys

      def one(own, t, k, m=m, site=site, common=common):
        ctx = Context(site.path, site, train=train, rng=k)
        return fold_site(m, site.leaves, own, {**common, **t}, ctx)

      with exact:
        new = over_stack(one, site.stack)(own_leaves(site, flat), t, keys)
      flat.update({f'{base}/{n}' if base else n: v for n, v in new.items()})
  return trees.refill(params, flat)
