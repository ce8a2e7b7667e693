"""DenseLoRA: factors that all layers share, and a small core of every layer.

Source: "DenseLoRA: Dense Low-Rank Adaptation of Large Language Models" (arXiv
2505.23808).

  h = drop(phi(drop(x) E))           E [d_in, r], D [r, d_out]: one pair for all
  y = x K + b + s drop(phi(h M D))   layers of a type; M [r, r] a layer's own

phi is GELU by the error function, after the encoder E and after the decoder D;
s = alpha / r. With activation='identity' it is a LoRA with A = E and B = M D:
then it folds, K' = K + s E M D, and is the control of what phi does.

Layers are of one type where their roles (q, k, v, o, up, gate, down) and their
kernels' shapes are the same; layers without a role share by shape alone. E and
D stand as 'e.<type>' and 'd.<type>' in the arrays that all sites see, M as
'm.<type>' at its site. The gradients of E and D are sums over all layers of the
type: a lower learning rate than a LoRA's may suit them.

Init: E ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), M ~ U(-1/sqrt(r), 1/sqrt(r)), D = 0,
so the adapted model starts as the base, as phi(0) = 0. In the first step only D
has a gradient.

Count: r^2 a kernel, and r (d_in + d_out) once a type.

Where sources differ:
  The published layer sets its type to 'denseLora' and tests for 'denselora': it
    makes no M and adds nothing to the output. Its sizes are those of Llama 3
    8B. Here is the form that it means; the paper's text was not compared.
"""

import math
import zlib

import jax
import jax.numpy as jnp

from peftjax.method import Method, nearest
from peftjax.methods.lowrank.lora import by_site, check_rate, dropped
from peftjax.models import layers
from peftjax.ops import products

EXAMPLE = dict(rank=2, alpha=4.0)
ACTIVATIONS = {'gelu': layers.gelu, 'identity': lambda x: x}


def usual(site):
  """Default sites: kernels of queries, keys, values, up and down."""
  return 'kernel' in site.params and site.role in ('q', 'k', 'v', 'up', 'down')


def dense_lora(rank=16, alpha=32.0, activation='gelu', dropout=0.0,
               sites=usual):
  """DenseLoRA.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernels.
    alpha: Numerator of the scale alpha / r, any positive number.
    activation: 'gelu', or 'identity', which folds.
    dropout: Rate on the input, after the encoder and after the decoder, while
      training.
    sites: Predicate on sites; by default the roles q, k, v, up and down.

  Raises:
    ValueError: a rank outside [1, min(d_in, d_out)], an alpha that is not
      positive, an unknown activation, a dropout outside [0, 1), or a site
      without a kernel.
  """
  check_rate(dropout)
  if activation not in ACTIVATIONS:
    raise ValueError(f'unknown activation {activation!r}'
                     f'{nearest(activation, ACTIVATIONS)}')
  phi = ACTIVATIONS[activation]
  _, scale_of, check = by_site(rank, alpha, 'lora', (), ())

  def kind(site):
    d_in, d_out = site.params['kernel'].shape
    return f'{site.role}.{d_in}x{d_out}'

  def shared(key, found):
    out = {}
    for name, site in {kind(s): s for s in found.values()}.items():
      d_in, d_out = site.params['kernel'].shape
      out[f'e.{name}'] = uniform(
          jax.random.fold_in(key, zlib.crc32(name.encode())), d_in, rank)
      out[f'd.{name}'] = jnp.zeros((rank, d_out))
    return out

  def init(key, site, p, stats):
    del p, stats
    return {f'm.{kind(site)}': uniform(key, rank, rank)}

  def prepare(t, ctx):
    name, = (n[2:] for n in t if n.startswith('m.'))
    return dict({n: t[f'{n}.{name}'] for n in 'emd'},
                scale=jnp.float32(scale_of(ctx.path)))

  def fold(p, t):
    delta = t['scale'] * (t['e'] @ t['m'] @ t['d'])
    return {**p, 'kernel': p['kernel'] + delta}

  def layer(f, x, t, ctx):
    def drop(x, i):
      key = None if ctx.rng is None else jax.random.fold_in(ctx.rng, i)
      return dropped(x, dropout, ctx._replace(rng=key))

    h = drop(phi(ctx.dot(drop(x, 0), t['e'])), 1)
    return f(x) + t['scale'] * drop(phi(products.thin(h @ t['m'], t['d'])), 2)

  return Method('dense_lora', sites, init, prepare,
                fold if activation == 'identity' else None, layer,
                needs_x=False, shared=shared, check=check,
                count=lambda site: rank ** 2)


def uniform(key, d_in, d_out):
  """[d_in, d_out] ~ U(-1/sqrt(d_in), 1/sqrt(d_in))."""
  bound = 1 / math.sqrt(d_in)
  return jax.random.uniform(key, (d_in, d_out), minval=-bound, maxval=bound)
