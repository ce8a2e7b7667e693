"""Selective LoRA: a LoRA with a gate on every block, most of which close.

Source: "Fine Tuning without Catastrophic Forgetting via Selective Low Rank
Adaptation" (arXiv 2501.15377). The gate is that of TAPS (`lowrank.taps`).

  y = x K + b + I(u) s (x A) B       K [d_in, d_out], A [d_in, r], B [r, d_out]
  I(u) = 1[u >= tau]                 u a scalar a kernel; dI/du := 1
  fold: K' = K + I(u) s A B          s as in `lowrank.lora`
  loss: task + lam mean_n |u_n|      over all N gates, from step `warmup` on

So the gradient of u is that of the gate, <dL/d(gated), s (x A) B>: 0 while B is
0, when the penalty alone would move u and close every block before it has
learnt anything; hence the warm-up. A closed block passes no gradient to A and
B, but to u it does, and it may open again.

Init: A and B as in `lowrank.lora`, u = 0.15 above tau = 0.1: all blocks are
open and the adapted model starts as the base. u takes no weight decay, which
would close blocks too.

After the last step closed blocks are dropped (phase 'active'): theta is then a
LoRA, without u, on the layers that are open. Where layers are stacked by
nn.scan, a closed one beside an open one is held as zeros.

Count: r (d_in + d_out) + 1 a kernel, then r (d_in + d_out) an open one.

Where sources differ:
  No code is published, and the paper's blocks, tau, lam and warm-up are not
    known to us: a block is here one kernel (one layer of a stack, one slice of
    a fused kernel), tau and the start of u are those of TAPS's code.
  The code of TAPS divides the penalty by 52, the convolutions of a ResNet-50,
    whatever the model; here by the number of gates, as its paper does.
  Its warm-up is 2 epochs of 30; here it is a number of steps.
  There as here u is trained at the learning rate of the weights.
"""

import math

import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.methods.lowrank.lora import lora
from peftjax.ops import gates
from peftjax.phases import Phase

EXAMPLE = dict(rank=3, alpha=3.0, warmup=0, start=1.0)


def selective_lora(rank=8, alpha=16.0, lam=0.1, warmup=100, tau=0.1, start=0.15,
                   scaling='lora', rank_pattern=(), alpha_pattern=(),
                   dropout=0.0, sites=sites_lib.kernels):
  """Selective LoRA.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernel.
    alpha: Numerator of the scale, any positive number.
    lam: Weight of the penalty, at least 0.
    warmup: Steps without the penalty, at least 0.
    tau: Threshold of the gates, above 0.
    start: u at the start, any number of at least tau.
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    alpha_pattern: The same for alpha.
    dropout: Rate on the adapter's input while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: what `lora` refuses, a negative lam or warmup, a tau that is not
      above 0, or a start below tau.
  """
  base = lora(rank, alpha, scaling, rank_pattern, alpha_pattern, dropout, sites)
  return gated('selective_lora', base, 'b', lam, warmup, tau, start)


def gated(name, base, leaf, lam, warmup, tau, start):
  """A method with a gate on every site, and the gates' penalty.

  Args:
    name: The new method's.
    base: Method that changes nothing where its theta is 0.
    leaf: Which of its leaves, as `prepare` returns them, the gate multiplies.
    lam: As for `selective_lora`, like all that follow.
    warmup: Steps without the penalty.
    tau: Threshold of the gates.
    start: u at the start.

  Returns:
    A `Method` with theta of the base and u, whose last phase is the base.
  """
  if not 0 <= lam < math.inf:
    raise ValueError(
        f'{name}: lam={lam}: expected a finite number, at least 0')
  if not 0 <= warmup < math.inf:
    raise ValueError(
        f'{name}: warmup={warmup}: expected a number of steps, at least 0')
  if not 0 < tau < math.inf:
    raise ValueError(f'{name}: tau={tau}: expected a finite number above 0, or '
                     'the penalty could close no gate; the usual one is 0.1')
  if not tau <= start < math.inf:
    raise ValueError(f'{name}: start={start}: expected a finite number of at '
                     f'least tau={tau}, or no block would ever learn')

  def init(key, site, p, stats):
    return {**base.init(key, site, p, stats), 'u': jnp.float32(start)}

  def prepare(t, ctx):
    used = base.prepare({n: v for n, v in t.items() if n != 'u'}, ctx)
    return {**used, leaf: gates.indicator(t['u'], tau) * used[leaf]}

  def penalty(theta, aux, step):
    del aux
    u = jnp.concatenate([jnp.ravel(t['u']) for t in theta.values()])
    return jnp.where(step >= warmup, lam, 0.0) * jnp.abs(u).mean()

  def active(theta, key, sites):
    del key, sites
    out = {}
    for path, t in theta.items():
      is_open = gates.indicator(t['u'], tau) > 0
      if is_open.any():
        out[path] = {
            n: jnp.where(jnp.expand_dims(
                is_open, tuple(range(is_open.ndim, v.ndim))), v, 0)
            for n, v in t.items() if n != 'u'}
    return out

  last = base._replace(name=name)
  return last._replace(
      init=init, prepare=prepare, penalty=penalty,
      labels={**base.labels, 'u': 'no_decay'},
      count=lambda site: base.count(site) + 1,
      phases=(Phase('active', 1.0, last, active),))
