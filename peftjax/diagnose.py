"""Where a NaN or an infinity comes from: the first site that puts one out."""

import jax
import jax.numpy as jnp

from peftjax import trees
from peftjax import views as views_lib
from peftjax.apply import apply
from peftjax.method import as_methods, Method

_NAME = 'probe'


def nonfinite_site(model, methods, params, theta, sites, *args, rng=None,
                   **kwargs):
  """Path of the first site whose adapted output is not finite, or None.

  A last method is put around every layer that has parameters and reports on
  its output. A layer of a scanned stack is named 'blocks/mlp/up (layer 3)'.

  Args:
    model: A Linen module.
    methods: As given to `init`.
    params: The base.
    theta: As it was before the step that failed.
    sites: What `describe` returned.
    *args: Inputs of the model in that step.
    rng: Key of that step.
    **kwargs: Further inputs of the model.
  """

  def layer(f, x, t, ctx):
    del t
    y = f(x)
    ctx.sow(_NAME, jnp.all(jnp.stack(
        [jnp.isfinite(v).all() for v in jax.tree.leaves(y)])))
    return y

  # needs_x=False: it never touches x, so it runs on convolutions too.
  probe = Method(_NAME, sites=None, init=None, layer=layer, needs_x=False)
  methods = (*as_methods(methods).values(), probe)
  name = list(as_methods(methods))[-1]
  marks = {path: dict(mark=jnp.zeros(site.stack))
           for path, site in sites.items() if site.params}
  theta = {**theta, name: marks}

  def run(params, theta, args, kwargs):
    return apply(model, methods, params, theta, *args, train=True, rng=rng,
                 **kwargs)[1]

  aux = trees.flatten(jax.jit(run)(params, theta, args, kwargs))
  bad = {}
  for path in marks:
    base, _ = views_lib.split_path(path)
    for found in aux.get(f'{base}/{_NAME}' if base else _NAME, ()):
      if not found.all():
        bad[path] = found
  # A layer that holds others ends after them: the inner one is the cause.
  inner = [p for p in bad if not any(
      q != p and q.startswith(f'{p}/' if p else '') for q in bad)]
  if not inner:
    return None
  first = inner[0]  # `describe` has them in the order of their calls
  if not bad[first].ndim:
    return first
  # In a scanned stack the first is the one of the lowest layer.
  number = lambda p: int(jnp.argmin(bad[p].reshape(-1)))
  stack = [p for p in inner if bad[p].shape == bad[first].shape
           and p.split('/')[0] == first.split('/')[0]]
  first = min(stack, key=number)
  return f'{first} (layer {number(first)})'


def nonfinite_leaf(theta):
  """'method/path/leaf' of the first leaf that is not finite, or None."""
  for name, by_path in theta.items():
    for path, t in by_path.items():
      for leaf, value in t.items():
        if not jnp.isfinite(value).all():
          return f'{name}/{path}/{leaf}'
  return None
