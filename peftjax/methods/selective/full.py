"""Full fine-tuning of chosen layers: theta holds their own leaves, whole.

  y = f(x; p'),   p' = t,   t = p at init

With every site chosen this is full fine-tuning; with the head alone it is the
linear probe ("Understanding intermediate layers using linear classifier
probes", arXiv 1610.01644, in its common use: a new head on frozen features);
with the norms alone, norm tuning. In a tuple it gives another method the new
task's head: (lora(), full(sites=select(roles='head'), group='head')).

Init: the base's own values in float32, so the adapted model starts as the base.
Costs nothing at run time, and folding is a copy. Gradients are dense: on chosen
kernels there is nothing of the savings that a small theta brings.

Count: every number of the layer's own leaves.
"""

import math

import jax.numpy as jnp

from peftjax import trees
from peftjax.method import Method

EXAMPLE = {}


def sites_with_leaves(site):
  """Every layer that has parameters of its own."""
  return bool(site.params)


def full(sites=sites_with_leaves, group=''):
  """Full fine-tuning of the chosen sites.

  Args:
    sites: Predicate on sites; by default every site with leaves of its own.
    group: Optimiser group of all its leaves ('head' for a head with a learning
      rate of its own); '' is the default group.

  Raises:
    ValueError: a chosen site has no leaves of its own.
  """

  def check(found):
    for path, site in found.items():
      if not site.params:
        leaves = sorted({n for s in found.values() for n in s.params})
        raise ValueError(
            f'full: {path!r} ({site.kind}) has no parameters of its own, only '
            f'its children have; choose layers, as in select(leaf={leaves})')

  def init(key, site, p, stats):
    del key, site, stats
    return {n: v.astype(jnp.float32) for n, v in p.items()}

  def count(site):
    return sum(math.prod(v.shape) for v in site.params.values())

  return Method('full', sites, init, replaces=True, check=check, count=count,
                labels=trees.Rules(('', group)))
