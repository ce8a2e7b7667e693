"""Theta, the trained values of methods: made, split, projected.

Theta is a tree of its own, {method: {path: {leaf: array}}}, apart from the
base's params. Gradients, optimiser state and checkpoints see theta only.
"""

import zlib

import jax
from jax.sharding import NamedSharding, PartitionSpec

from peftjax import sites as sites_lib
from peftjax import trees
from peftjax import views as views_lib
from peftjax.folding import over_stack, own_leaves, site_for
from peftjax.method import as_methods, check_theta, SHARED


def init(methods, key, sites, params, stats=None):
  """Makes theta for methods on the sites of a model.

  Args:
    methods: A Method or a sequence of them, the first innermost.
    key: PRNG key. A site's values depend on the key and its path only.
    sites: What `describe` returned.
    params: The base's params tree.
    stats: {method name: {path: statistics}} from `calibrate.collect`, for the
      methods that start from data.

  Returns:
    {method name: {path: {leaf: array}}}; arrays that all sites of a method
    share stand under the path '*'.

  Raises:
    ValueError: a selection that matches nothing, params that do not fit the
      model, NaN or infinity in the base, a method that must be innermost
      (it replaces or drops leaves), a method that drops a leaf which another
      trains, or one that starts from data without statistics of a site.
  """
  sites_lib.check_fits(sites, params)
  bad = trees.nonfinite(params)
  if bad:
    raise ValueError(f'the base holds NaN or infinity in {", ".join(bad)}')
  named = as_methods(methods)
  chosen = {n: sites_lib.matched(m, sites) for n, m in named.items()}
  touched, inside = set(), set()
  for name, m in named.items():
    mine = {views_lib.split_path(p)[0] for p in chosen[name]}
    if m.replaces and mine & touched:
      raise ValueError(
          f'{name} replaces leaves of {sorted(mine & touched)[0]!r}, which an '
          f'inner method changes: put {name} first')
    if m.drops and mine & inside:
      raise ValueError(
          f'{name} holds {m.drops[0]!r} of {sorted(mine & inside)[0]!r} itself, '
          'and what an inner method does there would be lost: put it first, on '
          'layers of no other base')
    touched |= mine
    inside |= set() if m.replaces else mine
  stats = stats or {}
  for name, m in named.items():
    missed = sorted(set(chosen[name]) - set(stats.get(name, {})))
    if m.calibration and missed:
      raise ValueError(
          f'{name} starts from statistics of the data, and has none of '
          f'{missed[0]!r}: collect them with peftjax.calibrate.collect and give '
          f'them as stats={{{name!r}: ...}}; training does it by itself')
  whole = _gather(params)
  reads = {n: m.reads(sites) if m.reads else {} for n, m in named.items()}

  def make(key, params, stats):
    flat, theta = trees.flatten(params), {}
    for i, (name, m) in enumerate(named.items()):
      root = jax.random.fold_in(key, i)
      theta[name] = {}
      more = whole({n: flat[leaf] for n, leaf in reads[name].items()})
      common = m.shared(jax.random.fold_in(root, 0), chosen[name])
      if common:
        theta[name][SHARED] = common
      for path, site in chosen[name].items():
        site = site_for(m, site)
        k = jax.random.fold_in(root, zlib.crc32(path.encode()))
        k = jax.random.split(k, site.stack) if site.stack else k

        def one(k, own, found, m=m, site=site, more=more):
          p = {n: v.get(own[v.leaf]) for n, v in site.leaves.items()}
          return m.init(k, site, {**p, **more}, found)

        own = whole(own_leaves(site, flat))
        found = stats.get(name, {}).get(path)
        t = over_stack(one, site.stack)(k, own, found)
        if t:  # a budget may leave a site with nothing
          theta[name][path] = t
          _check_dropped(named, theta, name, path)
    return theta

  return jax.jit(make)(key, params, stats)


def _gather(params):
  """What puts a layer's leaves together, where the base is split over devices.

  Theta then starts from the same numbers however the base lies. Leaves that no
  method reads are left where they are.
  """
  for value in jax.tree.leaves(params):
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
      continue
    at = value.sharding
    if isinstance(at, NamedSharding) and not at.is_fully_replicated:
      everywhere = NamedSharding(at.mesh, PartitionSpec())
      return lambda own: jax.lax.with_sharding_constraint(own, everywhere)
  return lambda own: own


def _check_dropped(named, theta, name, path):
  """Raises where a method drops a leaf that an inner one trains."""
  base, _ = views_lib.split_path(path)
  for inner, by_path in theta.items():
    for other, t in by_path.items():
      lost = sorted(set(t) & set(named[name].drops))
      if (named[inner].replaces and inner != name and lost
          and views_lib.split_path(other)[0] == base):
        raise ValueError(
            f'{name} drops {lost[0]!r} of {path!r}, which {inner} trains: leave '
            'this layer out of the sites of one of them')


def partition(methods, theta):
  """Splits theta into what is trained and what is data: (trained, frozen)."""
  named = as_methods(methods)
  check_theta(named, theta)

  def keep(wanted):
    return {name: {path: {leaf: v for leaf, v in t.items()
                          if (leaf in named[name].frozen) != wanted}
                   for path, t in by_path.items()}
            for name, by_path in theta.items()}

  return keep(True), keep(False)


def combine(trained, frozen):
  """Inverse of `partition`."""
  return {name: {path: {**t, **frozen.get(name, {}).get(path, {})}
                 for path, t in by_path.items()}
          for name, by_path in trained.items()}


def penalty(methods, theta, aux, step):
  """Sum of the methods' penalties, a scalar; 0 where none has one."""
  return sum((m.penalty(theta[n], aux, step)
              for n, m in as_methods(methods).items() if m.penalty), 0.0)


def after_step(methods, theta):
  """Theta after the methods' projections, run after every update."""
  return {n: m.after_step(theta[n]) if m.after_step else theta[n]
          for n, m in as_methods(methods).items()}
