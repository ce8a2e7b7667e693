"""EVA: LoRA that starts at the principal components of a layer's inputs.

How much of the variance they carry says how the ranks are shared out among
layers.

Source: "One Initialization to Rule them All: Fine-tuning via Explained Variance
Adaptation" (arXiv 2410.07170).

  y = x K + b + s (dropout(x) A) B    as `lowrank.lora`, s as in it
  A = P_{:r}^T                        [d_in, r]; P [q, d_in] orthonormal rows,
                                      the principal directions of x, centred
  B = 0                               [r, d_out]

Ranks: with rho = 1 every layer has its r. Otherwise q = rho r components of
every layer are candidates, each with its share of its layer's variance, S_j^2 /
sum of squares of the centred x; the R = sum of r over layers with the largest
shares win, and a layer's rank is how many of its own do, from 0 to q (at most
the smaller side of its kernel). A layer that wins none has no adapter. s stays
what it was, alpha / r of the rank that was asked for, so alpha becomes alpha
r_i / r.

Layers stacked by `nn.scan` are layers of their own in this. Their arrays have
one shape, that of the largest rank among them; what another layer has less is
filled with pairs of a zero column of A and a zero row of B, whose gradients are
both zero. A stack that wins nothing at all has no adapter.

`fit` shares the ranks out: training does it by itself, `calibrate.fitted` for
statistics that were collected by hand. Adapters keep the ranks in their
`rank_pattern` and `alpha_pattern`; a config that goes on from one by
`config.start` has to give them.

Init: exactly the base model, as B = 0. The principal components are found
batch by batch (`statistics.components`), and batches end early where all layers
have settled: the first r directions, r being the largest that was asked for,
change by a cosine of at least tau. Layers that read the same share their
components.

Count: r (d_in + d_out) a kernel, r being its rank after sharing out; of stacked
layers the largest of theirs.

Where sources differ:
  The decomposition. The paper speaks of that of x; code, and this, centre x.
  Batches. Hugging Face PEFT goes through its data again and again until all
    layers have settled. Here there are as many as config.calibrate says.
  Settled. PEFT asks it of the components that win as of now, and leaves a
    settled layer out of further batches.
  Rows. Tokens that have a label, as in PEFT, where tokens have labels; the
    paper does not say. The first token of a text, which nothing predicts, has
    none here and one in PEFT. label_mask=False: all that are no padding.
  Experts of a mixture. As in `lowrank.corda`: all of them read all tokens.
  Equal shares, as of layers that read the same. The one that is called first
    wins; PEFT lets the layer whose components the others share win.
  Ranks of layers that read the same. PEFT gives all of them the candidates of
    the one with the largest r.
  rsLoRA. PEFT multiplies alpha by r_i / r there too, so that s grows with
    sqrt(r_i). Here s stays what it was.
  Decomposition of large matrices: randomised, as PEFT's of all.
  Scale. alpha = 1 as in the authors' runs; PEFT's is 8.
"""

import math
import numbers
import re

import jax.numpy as jnp
import numpy as np

from peftjax.calibrate import readable
from peftjax.methods.lowrank.lora import by_site, lora
from peftjax.ops import statistics

EXAMPLE = dict(rank=2, alpha=4.0)


def eva(rank=8, alpha=1.0, rho=2.0, tau=0.99, whiten=False, scaling='lora',
        label_mask=True, rank_pattern=(), alpha_pattern=(), dropout=0.0,
        sites=readable):
  """EVA.

  Args:
    rank: r, the mean rank; at least 1 and at most the smaller side of the
      kernel.
    alpha: Numerator of the scale, any positive number.
    rho: A layer's rank is at most rho r; at least 1, which leaves ranks as they
      are.
    tau: Cosine between directions before and after a batch from which on they
      have settled, from 0 to 1.
    whiten: Whether columns of A are divided by the roots of their singular
      values, which the authors found to help on images.
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    label_mask: Whether tokens without a label are left out, where others have
      one, such as the prompts of answers.
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`. At rank 0 there is no adapter.
    alpha_pattern: The same for alpha.
    dropout: Rate on the adapter's input while training.
    sites: Predicate on sites; by default every kernel that multiplies what its
      layer reads, but the head.

  Raises:
    ValueError: a rank of 0, a rho below 1, a tau outside [0, 1], what `lora`
      refuses; from `fit`, batches with fewer rows than components.
  """
  ranks = (rank, *dict(rank_pattern).values())
  for r, least in zip(ranks, (1, *len(ranks) * [0])):
    if not isinstance(r, numbers.Integral) or r < least:
      raise ValueError(f'eva: rank={r!r}: expected a whole number, at least 1, '
                       'or 0 in rank_pattern; 8 is usual')
  if not 1 <= rho < math.inf:
    raise ValueError(f'eva: rho={rho}: expected a finite number, at least 1; '
                     '2.0 is usual')
  if not 0 <= tau <= 1:
    raise ValueError(f'eva: tau={tau}: expected a cosine from 0 to 1; 0.99 is '
                     'usual')
  base = lora(rank, alpha, scaling, rank_pattern, alpha_pattern, dropout, sites)
  rank_of, scale_of, check = by_site(
      rank, alpha, scaling, rank_pattern, alpha_pattern, least=0)
  root = math.sqrt if scaling == 'rslora' else float

  def init(key, site, p, stats):
    del key
    r = rank_of(site.path)
    if not r:
      return {}
    a = stats['directions'][:r].T
    if whiten:
      values = stats['values'][:r]
      # Below this share a direction is rounding, and would be all of A.
      floor = jnp.maximum(values, 1e-6 * values[0])
      a /= jnp.sqrt(jnp.where(floor > 0, floor, 1))
    if 'rank' in stats:  # this layer's own, within its stack
      a *= jnp.arange(r) < stats['rank']
    return dict(a=a, b=jnp.zeros((r, p['kernel'].shape[1])))

  def fit(stats, found):
    most = {path: min(round(rho * rank_of(path)), *s.params['kernel'].shape)
            for path, s in found.items()}
    budget = sum(rank_of(p) * math.prod(s.stack) for p, s in found.items())
    won = share_out({p: shares_of(stats[p], most[p], p) for p in found}, budget)
    ranks, alphas, new = {}, {}, {}
    for path, site in found.items():
      own = f'^{re.escape(path)}$'
      ranks[own] = int(won[path].max())
      if ranks[own]:
        alphas[own] = scale_of(path) * root(ranks[own])
      new[path] = {**stats[path], 'rank': won[path].reshape(site.stack)}
    return dict(rank_pattern=ranks, alpha_pattern=alphas), new

  return base._replace(
      name='eva', init=init, check=check, fit=fit,
      calibration=statistics.components(
          round(rho * max(ranks)), max(ranks), tau)._replace(
              labelled=bool(label_mask)))


def shares_of(stats, most, path):
  """Shares of the variance of the first components, [layers, most]."""
  values = np.asarray(stats['values'], float)
  if not np.all(stats['rows']):
    raise ValueError(
        f'eva: {path!r} met no batch of at least {values.shape[-1]} rows, as '
        'many as components; raise calibrate.batch, or lower rank or rho')
  square = values.reshape(-1, values.shape[-1])[:, :most] ** 2
  total = np.asarray(stats['total'], float).reshape(-1, 1)
  return square / np.where(total > 0, total, 1)


def share_out(shares, budget):
  """{path: int32 [layers]}: how many of a layer's shares are among the largest.

  Args:
    shares: {path: [layers, q]}; of equal ones the first wins.
    budget: How many win, over all layers.
  """
  layers = [row for s in shares.values() for row in s]
  owner = np.repeat(np.arange(len(layers)), [len(row) for row in layers])
  best = np.argsort(-np.concatenate(layers), kind='stable')[:budget]
  ranks = np.bincount(owner[best], minlength=len(layers)).astype(np.int32)
  ends = np.cumsum([len(s) for s in shares.values()])[:-1]
  return dict(zip(shares, np.split(ranks, ends)))
