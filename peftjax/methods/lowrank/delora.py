"""DeLoRA: a low-rank delta of unit terms, and their strength apart from them.

Source: "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv
2503.18225).

  w_i = ||K_i||                    K [d_in, d_out], one norm an input; frozen
  N(A, B) = sum_i A_i B_i / (||A_i|| ||B_i||)   A_i columns of A [d_in, r], B_i
                                                rows of B [r, d_out]
  delta = lambda / r diag(w) (N(A, B) - N(A0, B0))       lambda a trained scalar
  y = x K + b + dropout(x) delta
  fold: K' = K + delta

Every term of N has norm 1, so ||lambda / r N||_F <= |lambda| whatever A and B
are, and ||delta||_F <= 2 |lambda| max w. Lengths of A_i and B_i change nothing:
they are orthogonal to their gradients, and weight decay on them only changes
how fast they turn. lambda ('strength', in an optimiser group of its own name)
has none.

Init: A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B ~ U(-1/sqrt(r), 1/sqrt(r)), A0 = A
and B0 = B frozen copies, lambda = strength: exactly the base. The difference of
products is made of differences, as in `lowrank.pissa`: it is zero to the bit at
the start, and small ones are not drowned by rounding.

Count: r (d_in + d_out) + 1 a kernel; as many again and d_in are stored.

form='peft' is Hugging Face PEFT's: B = 0 at the start, no A0 and B0, norms
below 1e-4 taken as 1e-4: delta = lambda / r diag(w) N(A, B). It, too, starts as
the base, and is bounded by |lambda| max w. But the first step that takes
||B_i|| beyond 1e-4 takes the delta to full strength: warm up. And the gradient
of B, at norms of 1e-4, is hundreds of times what it is later: clip it, or
Adam's second moment holds B back for long.

Where sources differ:
  Copies. In the authors' code A0 and B0 share their memory with A and B until
    they are moved to a device, so that on a CPU the delta stays 0. Here they
    are arrays of their own.
  Norms. w is one norm an input, as in both codes; the paper's formula is also
    read as the one number ||K||_F.
  Strength. 15 is PEFT's; the authors' scripts for GLUE have 4 or 12, and a
    learning rate of its own: `optim.groups.strength.lr_abs`.

A column of zeros has no direction; its term is 0. An input to which K gives no
weight, w_i = 0, keeps none.
"""

import math

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.method import nearest
from peftjax.methods.lowrank.lora import by_site, lora

EXAMPLE = dict(rank=2, strength=4.0)
FORMS = ('paper', 'peft')
LEAST = 1e-4  # of norms in PEFT's form


def delora(rank=8, strength=15.0, form='paper', rank_pattern=(), dropout=0.0,
           sites=sites_lib.kernels):
  """DeLoRA.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernel.
    strength: lambda at the start, any positive number.
    form: 'paper' (less the start) or 'peft' (B = 0 at the start).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    dropout: Rate on the adapter's input while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: a strength that is not positive, an unknown form, and what
      `lora` refuses.
  """
  if not 0 < strength < math.inf:
    raise ValueError(f'delora: strength={strength}: expected a finite number '
                     'above 0; 15 is usual')
  if form not in FORMS:
    raise ValueError(f'delora: unknown form {form!r}{nearest(form, FORMS)}')
  # Its scale is not used: the strength stands in for it.
  base = lora(rank, rank_pattern=rank_pattern, dropout=dropout, sites=sites)
  rank_of, _, _ = by_site(rank, 1.0, 'lora', rank_pattern, ())

  def init(key, site, p, stats):
    del stats
    (d_in, d_out), r = p['kernel'].shape, rank_of(site.path)
    left, right = jax.random.split(key)
    a = jax.random.uniform(left, (d_in, r), minval=-1, maxval=1)
    b = jax.random.uniform(right, (r, d_out), minval=-1, maxval=1)
    a, b = a / math.sqrt(d_in), b / math.sqrt(r)
    w = jnp.linalg.norm(p['kernel'].astype(jnp.float32), axis=1)
    t = dict(a=a, b=b, w=w, strength=jnp.float32(strength))
    if form == 'peft':
      return {**t, 'b': jnp.zeros_like(b)}
    return {**t, 'a0': a, 'b0': b}

  def prepare(t, ctx):  # a LoRA, for `lora` to fold and to apply
    del ctx
    if form == 'peft':
      a, b = unit(t['a'], 0), unit(t['b'], 1)
    else:
      _, a0, da = turned(t['a'], t['a0'], 0)
      b, _, db = turned(t['b'], t['b0'], 1)
      a, b = jnp.concatenate([da, a0], 1), jnp.concatenate([b, db], 0)
    return dict(a=t['w'][:, None] * a, b=b,
                scale=t['strength'] / t['a'].shape[1])

  def count(site):
    return base.count(site) + 1

  return base._replace(
      name='delora', init=init, prepare=prepare, count=count,
      labels=dict(strength='strength'),
      frozen=('w',) if form == 'peft' else ('w', 'a0', 'b0'))


def unit(v, axis):
  """v / ||v|| along an axis; norms below 1e-4 count as 1e-4."""
  square = jnp.square(v).sum(axis, keepdims=True)
  above = square > LEAST ** 2  # the root has no derivative at 0
  return v / jnp.where(above, jnp.sqrt(jnp.where(above, square, 1)), LEAST)


def turned(v, v0, axis):
  """v / ||v||, v0 / ||v0|| and their difference, which is zero at v = v0.

  With e = v - v0 and norms n, n0 (1e-10 at least), the difference is

    e / n - v0 (e . (v + v0)) / (n n0 (n + n0))

  to the bit, where the rounding of two norms need not be the same twice.
  """
  n, n0 = (jnp.sqrt(jnp.square(u).sum(axis, keepdims=True) + 1e-20)
           for u in (v, v0))
  e = v - v0
  shift = (e * (v + v0)).sum(axis, keepdims=True) / (n * n0 * (n + n0))
  return v / n, v0 / n0, e / n - v0 * shift
