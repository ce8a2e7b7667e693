"""AdaLoRA: a budget of ranks, spent where the gradients say it matters.

Source: "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
Fine-Tuning" (arXiv 2303.10512).

  y = x K + b + s ((dropout(x) A) * e) B    A [d_in, r0], e [r0], B [r0, d_out]
  fold: K' = K + s A diag(e) B              s = alpha / (r0 + 1e-5)
  penalty = w mean(||A^T A - I||_F, ||B B^T - I||_F over all sites and layers)

A triplet is (A_j, e_j, B_j). After each update every entry p of theta, with
gradient g, has

  I = |p g|
  S <- beta1 S + (1 - beta1) I
  U <- beta2 U + (1 - beta2) |I - S|

and a triplet the score S U of e_j, plus the means of S U over A_j and over B_j.
In step t of T, counted from 1 within a stage of the run (a phase of another
method starts the budget anew), with t0 = tinit T and t1 = T - tfinal T, the
triplets of all n kernels together have the budget

  b(t) = bT + (b0 - bT) (1 - (t - t0) / (t1 - t0))^3    b0 = n r0, bT = n target

rounded down. From t0 on, every delta_t steps, e is set to 0 where the score is
not above the (b0 - b(t))-th smallest; it may come back until the next time.
What is left at t1 stays: from there on the rest of e is set to 0 after every
step. S, U and the mask are data of theta and change within the compiled step
(`Method.track`).

When the run ends, the triplets that are masked are taken out (phase 'compact'):
what is stored is A, e, B of the ranks that were found, of stacked layers those
of the largest, filled up with zeros, and s as it was. The folded kernels are
the same but for rounding, and of an average (optim.ema) what was masked is taken
out too. A site of rank 0 is left out.

Init: A, B ~ N(0, 0.02^2) and e = 0, exactly the base model.

Count: r0 (d_in + d_out + 1) a kernel, in the end that of the ranks found; S and
U are as many numbers again, each, while training.

Where sources differ:
  tinit and tfinal are shares of the run here, in Hugging Face PEFT steps.
  The gradients are those before clipping; in PEFT those that clipping left.
  The budget is computed in float32, so that next to whole numbers it may be one
    off what PEFT's float64 gives for that step.
  PEFT masks, and takes triplets out where an adapter is loaded. As there, s is
    that of r0 and not of the rank that is left.
"""

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.method import Method
from peftjax.methods.lowrank.lora import lora
from peftjax.ops import budget
from peftjax.ops.gram import off_orthonormal
from peftjax.phases import Phase

EXAMPLE = dict(rank=3, target=2, alpha=4.0)
LEAVES = ('a', 'e', 'b')
AVERAGES = tuple(f'{kind}.{leaf}' for leaf in LEAVES
                 for kind in ('sensitivity', 'uncertainty'))


def adalora(rank=12, target=8, alpha=16.0, tinit=0.0, tfinal=0.0, delta_t=1,
            beta1=0.85, beta2=0.85, orthogonal=0.5, dropout=0.0,
            sites=sites_lib.kernels):
  """AdaLoRA.

  Args:
    rank: r0, at least 1 and at most the smaller side of the kernel.
    target: Mean rank of all kernels in the end, from 1 to `rank`.
    alpha: Numerator of the scale, any positive number.
    tinit: Share of the steps before the budget falls; below 1 with tfinal.
    tfinal: Share of the steps after it has fallen.
    delta_t: Steps from one allocation to the next, at least 1.
    beta1: Decay of the sensitivity S, in (0, 1).
    beta2: Decay of its uncertainty U, in (0, 1).
    orthogonal: w, weight of the penalty: 0 or any number above.
    dropout: Rate on the adapter's input while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: what `lora` refuses, or a number outside these bounds.
  """
  share = 'a share of the run, both together below 1; the defaults are 0.0'
  for name, value, fits, want in (
      ('target', target, 1 <= target <= rank, f'1 to {rank}, which is rank'),
      ('tfinal', tfinal, 0 <= tfinal < 1, share),
      ('tinit', tinit, 0 <= tinit < 1 - tfinal, share),
      ('delta_t', delta_t, delta_t >= 1, 'at least 1 step'),
      ('beta1', beta1, 0 < beta1 < 1, 'a decay in (0, 1), such as 0.85'),
      ('beta2', beta2, 0 < beta2 < 1, 'a decay in (0, 1), such as 0.85'),
      ('orthogonal', orthogonal, 0 <= orthogonal < float('inf'),
       'a finite number, at least 0, such as 0.5')):
    if not fits:
      raise ValueError(f'adalora: {name}={value}: expected {want}')
  base = lora(rank, alpha, dropout=dropout, sites=sites)

  def start(key, site, p, stats):
    del site, stats
    d_in, d_out = p['kernel'].shape
    at_a, at_b = jax.random.split(key)
    return dict(a=0.02 * jax.random.normal(at_a, (d_in, rank)),
                e=jnp.zeros(rank),
                b=0.02 * jax.random.normal(at_b, (rank, d_out)),
                scale=jnp.float32(alpha / (rank + 1e-5)))

  def init(key, site, p, stats):
    t = start(key, site, p, stats)
    zeros = {name: jnp.zeros_like(t[name.split('.')[1]]) for name in AVERAGES}
    return {**t, **zeros, 'mask': jnp.ones(rank, bool)}

  def prepare(t, ctx):
    del ctx
    return dict(a=t['a'] * t['e'], b=t['b'], scale=t['scale'])

  def penalty(theta, aux, step):
    del aux, step
    far = [off_orthonormal(v).ravel() for t in theta.values()
           for v in (t['a'], t['b'].swapaxes(-1, -2))]
    return orthogonal * jnp.concatenate(far).mean()

  def seen(t, grads, on):
    """t with S and U after a step, where `on`."""
    new = {}
    for leaf in LEAVES:
      names = f'sensitivity.{leaf}', f'uncertainty.{leaf}'
      old = [t[n] for n in names]
      now = budget.averages(*old, t[leaf], grads[leaf], beta1, beta2)
      new |= {n: jnp.where(on, v, o) for n, v, o in zip(names, now, old)}
    return {**t, **new}

  def track(theta, grads, step, steps):
    t = step + 1
    first = jnp.round(tinit * steps).astype(jnp.int32)
    last = steps - jnp.round(tfinal * steps).astype(jnp.int32)
    theta = {path: seen(v, grads[path], t < last) for path, v in theta.items()}
    found = {path: budget.scores(*(
        v[f'sensitivity.{leaf}'] * v[f'uncertainty.{leaf}'] for leaf in LEAVES))
             for path, v in theta.items()}
    n = sum(v.size for v in found.values()) // rank
    left = budget.cubic(t, first, last, n * rank, n * target)
    masks = budget.above(found, n * rank - left)
    allocate = (t == last) | (first < t) & (t < last) & (t % delta_t == 0)
    for path, v in theta.items():
      mask = jnp.where(allocate, masks[path], v['mask'])
      off = (allocate | (t > last)) & ~mask
      v |= dict(mask=mask, e=jnp.where(off, 0, v['e']))
    return theta

  def count(site):
    return rank * (sum(site.params['kernel'].shape) + 1)

  small = base._replace(name='adalora', init=start, prepare=prepare,
                        frozen=('scale',), count=None)
  return small._replace(
      init=init, frozen=('scale', 'mask', *AVERAGES), count=count, track=track,
      penalty=penalty if orthogonal else None,
      phases=(Phase('compact', 1.0, small, compact),))


def compact(theta, key, sites):
  """Theta without the triplets that are masked, those of a stack aligned."""
  del key, sites
  out = {}
  for path, t in theta.items():
    keep = t['mask']  # [..., r]; an average of e is not 0 where it is False
    most = int(keep.sum(-1).max())
    if not most:
      continue
    order = jnp.argsort(~keep, stable=True)[..., :most]
    pick = jnp.take_along_axis
    keep = pick(keep, order, -1)
    # Zeros throughout: a triplet with e = 0 alone would come back if trained.
    out[path] = dict(
        a=pick(t['a'], order[..., None, :], -1) * keep[..., None, :],
        e=pick(t['e'], order, -1) * keep,
        b=pick(t['b'], order[..., None], -2) * keep[..., None],
        scale=t['scale'])
  return out
