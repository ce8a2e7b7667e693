"""(IA)^3: trained factors on keys, values and the inner layer of perceptrons.

Source: "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning" (arXiv 2205.05638).

  k = l * (x K + b), v alike           l [d_out], the bias inside
  y = (l * x) K + b                    l [d_in, 1], on the down projection
  fold: K' = K l,  b' = b l            on the output side
        K' = diag(l) K,  b' = b        on the input side

The paper scales keys, values and what an MLP's activation puts out: here the
outputs of the key and value projections, and the input of the down projection.
`inputs` says which sites are scaled on the input side; any other kernel among
`sites` is scaled on the output side. With rotary positions keys are scaled
before they are rotated, as in Hugging Face PEFT; the other order would not
fold. A convolution has a factor for every channel, not for every tap. Slices of
a fused kernel are sites of their own.

Init: l = 1, exactly the base model. l takes no weight decay, which would pull
it to 0. The paper starts from factors trained on its mixture of tasks.

Count: d_out a kernel, d_in (channels of a convolution) on the input side. That
is L (d_k + d_v + d_ff) in a decoder, d_k and d_v being the widths of all key
and value heads together.

PEFT picks other layers in some families (queries and keys in OPT), and for BERT
by the name's end 'output.dense', which takes in the attention's output:
inputs=('down', 'o') with sites=select(roles=('k', 'v', 'o', 'down')).
"""

import re

import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.method import Method, nearest

EXAMPLE = {}
KEYS_VALUES_DOWN = sites_lib.select(roles=('k', 'v', 'down'))


def ia3(inputs=('down',), sites=KEYS_VALUES_DOWN):
  """(IA)^3.

  Args:
    inputs: Which of the sites are scaled on the input side: roles, or else
      regular expressions searched in the path (r'fc2$'); () for none of them.
    sites: Predicate on sites; by default the roles k, v and down.

  Raises:
    ValueError: a broken regular expression in `inputs` or one that matches no
      site, a site without a kernel, or an input side that cannot be scaled.
  """
  inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
  for pattern in inputs:
    try:
      re.compile(pattern)
    except (re.error, TypeError) as e:
      raise ValueError(
          f'ia3: inputs={pattern!r}: expected a role out of '
          f'{sites_lib.ROLES} or a regular expression: {e}') from e

  def matches(pattern, site):
    if pattern in sites_lib.ROLES:
      return site.role == pattern
    return re.search(pattern, site.path) is not None

  def at_input(site):
    return any(matches(pattern, site) for pattern in inputs)

  def check(found):
    for pattern in inputs:  # a role is a rule for what has it, if anything
      if pattern not in sites_lib.ROLES and not any(
          matches(pattern, s) for s in found.values()):
        raise ValueError(f'ia3: inputs={pattern!r} matches none of its sites'
                         f'{nearest(pattern, (*sites_lib.ROLES, *found))}')
    for path, site in found.items():
      kernel = site.params.get('kernel')
      if kernel is None or len(kernel.shape) != 2:
        raise ValueError(
            f'ia3: {path!r} ({site.kind}) has no kernel of two dimensions: it '
            f'has {sorted(site.params)}; choose linear layers')
      if at_input(site) and (site.kind == 'Embed' or 'Conv' in site.kind and (
          site.leaves['kernel'].dims[0][0] != site.x.shape[-1])):
        raise ValueError(
            f'ia3: {path!r} ({site.kind}) takes ids or has groups of channels: '
            'its input cannot be scaled; leave it out of '
            f'inputs={inputs} to scale its output')

  def width(site):
    d_in, d_out = site.params['kernel'].shape
    if not at_input(site):
      return d_out
    return site.x.shape[-1] if 'Conv' in site.kind else d_in

  def init(key, site, p, stats):
    del key, p, stats
    d = width(site)
    return dict(l=jnp.ones((d, 1) if at_input(site) else d))

  def fold(p, t):
    kernel, l = p['kernel'], t['l']
    if l.ndim == 2:
      taps = kernel.shape[0] // l.shape[0]
      return {**p, 'kernel': kernel * jnp.repeat(l, taps, axis=0)}
    new = {**p, 'kernel': kernel * l}
    if 'bias' in p:
      new['bias'] = p['bias'] * l
    return new

  def layer(f, x, t, ctx):
    del ctx
    l = t['l']
    return f(x * l[:, 0]) if l.ndim == 2 else f(x) * l

  # needs_x: x is read where it is an array of channels only, see `check`.
  return Method('ia3', sites, init, fold=fold, layer=layer, needs_x=False,
                check=check, labels=dict(l='no_decay'), count=width)
