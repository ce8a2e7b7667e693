"""BitFit: only biases are trained.

Source: "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models" (Ben Zaken et al., ACL 2022, arXiv 2106.10199).

  y = x K + b',   b' = t,   t = b at init      b [d_out], K frozen

Trains the bias of every linear, convolution and norm; subset='query_mlp' the
query's and the up-projection's. The paper trains the task's head as well: add
it as full(sites=select(roles='head'), group='head'). Starts as the base; costs
nothing at run time; folding is a copy.

Count: d_out a bias. That is 11 d in a transformer block of width d with a 4 d
perceptron (query, key, value, output: 4 d; up: 4 d; down: d; two norms: 2 d),
and 5 d for subset='query_mlp'.

The paper counts the attention's output projection as its first MLP bias, so its
"second MLP bias" is that of the up-projection (`intermediate.dense` in BERT).
The released code picks biases by substring and trains the pooler's bias even in
subsets; here sites are picked by role, and a pooler is a site like any other.

The key's bias shifts all scores of a query alike, which softmax ignores:
without relative or rotary positions its gradient is zero.
"""

import math

import jax.numpy as jnp

from peftjax.method import Method, nearest

EXAMPLE = {}
SUBSETS = dict(all=None, query_mlp=('q', 'up'))


def bias_but_not_head(site):
  """Every layer with a bias but the head."""
  return 'bias' in site.params and site.role != 'head'


def bitfit(subset='all', sites=bias_but_not_head):
  """BitFit.

  Args:
    subset: 'all', or 'query_mlp' for the sites of roles 'q' and 'up' only.
    sites: Predicate on sites; by default every one with a bias but the head.

  Raises:
    ValueError: an unknown subset, a model without biases, a chosen site
      without a bias, or a subset on a model whose roles are not known.
  """
  if subset not in SUBSETS:
    raise ValueError(f'unknown subset {subset!r}{nearest(subset, SUBSETS)}')
  roles = SUBSETS[subset]

  def query_and_up_bias(site):
    return site.role in roles and sites(site)

  def check(found):
    for role in roles or ():
      if all(s.role != role for s in found.values()):
        raise ValueError(
            f'bitfit: subset={subset!r} needs sites of roles {roles}, and none '
            f"has role {role!r}; name them with describe(..., roles=((regex, "
            f"{role!r}),)), or take subset='all'")
    for path, site in found.items():
      if 'bias' not in site.params:
        raise ValueError(
            f'bitfit: {path!r} ({site.kind}) has no bias (it has '
            f"{sorted(site.params)}); choose layers with one: "
            "select(..., leaf='bias')")

  def init(key, site, p, stats):
    del key, site, stats
    return dict(bias=p['bias'].astype(jnp.float32))

  def count(site):
    return math.prod(site.params['bias'].shape)

  return Method('bitfit', query_and_up_bias if roles else sites, init,
                replaces=True, check=check, count=count)
