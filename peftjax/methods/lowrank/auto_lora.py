"""AutoLoRA: ranks from a search on data of its own, then LoRA from scratch.

Source: "AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation
Based on Meta Learning" (arXiv 2403.09113).

  y = x K + b + s ((dropout(x) A) * p) B   p = softmax(l), l [r]; s = alpha / r
  fold: K' = K + s A diag(p) B             A [d_in, r], B [r, d_out]

While it searches, A, B and what other methods train (the head) follow the loss
on 70 % of the training rows, and l the hypergradient of the loss on the others,
through one step of A, B and the rest of size xi (`peftjax.bilevel`). Then, in
the phase 'retrain', a site keeps as many ranks as have

  r p_j >= threshold

and plain LoRA of these ranks is trained from its start on all the data, with s
as it was: it is data of the site. A site of rank 0 is left out. Stacked layers
have the largest of their ranks, and those with fewer are filled up with pairs
A_j = 0, B_j = 0: the gradient of either is a product with the other, so that
both stay 0 whatever the optimiser and its decay.

Shares order the terms of a site; they do not say what the site is worth. Of two
sites in a small test, one with a target of rank 2 and one with but noise to
learn, both keep 2 to 4 ranks of 8. A site that has nothing to learn keeps all 8
or, with a threshold above 1, none.

Init: A, B as in `lowrank.lora` and l = 1, exactly the base model. After the
search this method starts so again. Theta of others, of a new head say, goes on
from where it was: a phase changes its own method alone.

Count: r (d_in + d_out + 1) a kernel in the search, then r_i (d_in + d_out).

Where sources differ:
  The rule. One of the released scripts compares l_j / sum l with 1 / r, the
    other p_j. By default ranks whose shares are equal but for rounding are kept.
  The scale. The released code retrains with alpha / r_i, of a site's own rank.
  The head. In the released code it stays as it was drawn while it searches.
  The step xi. The released code leaves it out of the second term, as if it were
    1, and takes the differences around weights that have moved. The default is
    the paper's learning rate.
  Learning rates. The paper has 3e-4 for the weights and for l; so l has that of
    the config here, and Adam's decays are (0.5, 0.999) (group 'search').
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import bilevel
from peftjax import sites as sites_lib
from peftjax.folding import over_stack
from peftjax.method import identity
from peftjax.methods.lowrank.lora import lora
from peftjax.phases import Phase

EXAMPLE = dict(rank=4, alpha=4.0)


def auto_lora(rank=8, alpha=16.0, xi=3e-4, hypergradient='exact', inner=0.7,
              search=0.5, threshold=0.999, permute=None, dropout=0.0,
              sites=sites_lib.kernels):
  """AutoLoRA.

  Args:
    rank: r of the search, at least 2 and at most the smaller side of the
      kernel.
    alpha: Numerator of the scale, any positive number.
    xi: Size of the step that the hypergradient goes through: 0, for one that
      does not see it, or any number above.
    hypergradient: 'exact', or 'darts' for finite differences, where a layer has
      no gradient of its gradient (cuDNN's attention).
    inner: Share of the rows that train A and B while it searches, in (0, 1).
    search: Share of the steps that it searches, in (0, 1).
    threshold: Least r p_j of a rank that is kept, any number above 0.
    permute: Seed, any whole number from 0, of a permutation of the ranks found
      over all layers, for a control arm; None: each keeps its own.
    dropout: Rate on the adapter's input while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: what `lora` and `bilevel.outer` refuse, or a number outside
      these bounds.
  """
  for name, value, fits, want in (
      ('rank', rank, rank >= 2, 'at least 2: one rank has nothing to choose'),
      ('search', search, 0 < search < 1, 'a share of the steps in (0, 1)'),
      ('threshold', threshold, 0 < threshold < np.inf,
       'a finite number above 0; the default is 0.999'),
      ('permute', permute, permute is None or permute >= 0,
       'a seed, at least 0, or None')):
    if not fits:
      raise ValueError(f'auto_lora: {name}={value}: expected {want}')
  base = lora(rank, alpha, dropout=dropout, sites=sites)

  def start(key, site, p, stats):
    t = base.init(key, site, p, stats)
    return {**t, 'scale': jnp.float32(alpha / rank)}

  def init(key, site, p, stats):
    return {**start(key, site, p, stats), 'logits': jnp.ones(rank)}

  def prepare(t, ctx):
    del ctx
    p = jax.nn.softmax(t['logits'])
    return dict(a=t['a'] * p, b=t['b'], scale=t['scale'])

  def restart(theta, key, sites):
    found = ranks(theta, threshold)
    if permute is not None:
      found = permuted(found, permute)
    out = {}
    for path, r in found.items():
      if not r.max():
        continue
      site, fresh = sites[path], lora(int(r.max()))
      k = jax.random.fold_in(key, zlib.crc32(path.encode()))
      k = jax.random.split(k, site.stack) if site.stack else k
      t = over_stack(lambda k, site=site, fresh=fresh: fresh.init(
          k, site, site.params, None), site.stack)(k)
      own = np.arange(r.max()) < r[..., None]
      out[path] = dict(a=t['a'] * own[..., None, :], b=t['b'] * own[..., None],
                       scale=theta[path]['scale'])
    return out

  def count(site):
    return rank * (sum(site.params['kernel'].shape) + 1)

  plain = base._replace(name='auto_lora', init=start, prepare=identity,
                        frozen=('scale',), count=None)
  return plain._replace(
      init=init, prepare=prepare, count=count, labels=dict(logits='search'),
      outer=bilevel.outer(('logits',), xi, hypergradient, inner),
      phases=(Phase('retrain', search, plain, restart),))


def ranks(theta, threshold=0.999):
  """{path: ranks that a search found, integers of the shape of the stack}."""
  out = {}
  for path, t in theta.items():
    p = np.asarray(jax.nn.softmax(t['logits']))
    out[path] = (p.shape[-1] * p >= threshold).sum(-1)
  return out


def permuted(found, seed):
  """The ranks of all layers in another order."""
  sizes = np.cumsum([r.size for r in found.values()])
  mixed = np.random.default_rng(seed).permutation(
      np.concatenate([r.ravel() for r in found.values()]))
  parts = np.split(mixed, sizes[:-1])
  return {p: v.reshape(r.shape) for (p, r), v in zip(found.items(), parts)}
