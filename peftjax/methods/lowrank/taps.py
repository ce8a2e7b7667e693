"""TAPS: a whole delta a kernel, each with a gate, most of which close.

Source: "TAPS: Task Adaptive Parameter Sharing for Multi-Task Learning" (arXiv
2203.16708).

  K' = K + I(u) D                    K, D [d_in, d_out], u a scalar a kernel
  I(u) = 1[u >= tau]                 dI/du := 1
  loss: task + lam mean_n |u_n|      over all N gates, from step `warmup` on

A task keeps the base's kernels where a gate is closed and its own where it is
open. What is said of gates, penalty and warm-up in `lowrank.selective_lora`
holds here too. The delta is as large as the kernel: training costs what full
fine-tuning of the chosen layers does.

Init: D = 0, u = 0.15 above tau = 0.1: all gates are open and the adapted model
starts as the base. u takes no weight decay; D does, towards the base's kernel.

After the last step closed blocks are dropped (phase 'active'): theta is then D
of the layers that are open. Where layers are stacked by nn.scan, a closed one
beside an open one is held as zeros.

Count: d_in d_out + 1 a kernel, then d_in d_out an open one.

Where sources differ:
  The published code divides the penalty by 52, the convolutions of a ResNet-50,
    whatever the model; here by the number of gates, as the paper does.
  Its warm-up is 2 epochs of 30; here it is a number of steps.
  It has an option for the learning rate of the scores and does not use it: u is
    trained at the rate of the weights, as here.
  It makes one update of 8 batches, whose gradients it adds up undivided. Here a
    step is an update.
  It keeps a batch norm of the task's own after convolutions whose gate is open.
    Here norms stay the base's: train them beside (`selective.ln_tuning`).
"""

import math

import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.method import Method
from peftjax.methods.lowrank.selective_lora import gated

EXAMPLE = dict(warmup=0, start=1.0)


def taps(lam=0.1, warmup=100, tau=0.1, start=0.15, sites=sites_lib.kernels):
  """TAPS.

  Args:
    lam: Weight of the penalty, at least 0; the code's are 0.1 to 1.
    warmup: Steps without the penalty, at least 0.
    tau: Threshold of the gates, above 0.
    start: u at the start, any number of at least tau.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: a negative lam or warmup, a tau that is not above 0, a start
      below tau, or a site without a kernel.
  """

  def check(found):
    for path, site in found.items():
      if 'kernel' not in site.params:
        raise ValueError(f'taps: {path!r} ({site.kind}) has no kernel; it has '
                         f'{sorted(site.params)}')

  def init(key, site, p, stats):
    del key, site, stats
    return dict(delta=jnp.zeros(p['kernel'].shape))

  def fold(p, t):
    return {**p, 'kernel': p['kernel'] + t['delta']}

  def layer(f, x, t, ctx):
    return f(x) + ctx.dot(x, t['delta'])

  def count(site):
    return math.prod(site.params['kernel'].shape)

  base = Method('taps', sites, init, fold=fold, layer=layer, needs_x=False,
                check=check, count=count)
  return gated('taps', base, 'delta', lam, warmup, tau, start)
