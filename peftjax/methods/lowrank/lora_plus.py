"""LoRA+: LoRA whose second factor learns faster than the first.

Source: "LoRA+: Efficient Low Rank Adaptation of Large Models" (arXiv
2402.12354).

  y = x K + b + s (x A) B          as `lowrank.lora`, in every other respect too
  rate of A = eta,  rate of B = ratio eta

eta is the config's learning rate, ratio the factor of the optimiser's group
'fast': `optim.groups.fast.lr`, 16 unless a config says otherwise. Schedules
multiply both. As the width n of a kernel grows, both factors learn features
with eta of order 1/n for A and of order 1 for B; equal rates cannot do that.
The usual eta is about half of LoRA's.

Init: as LoRA: A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0, exactly the base.

Count: r (d_in + d_out) a kernel.

The ratio multiplies updates, not gradients, of which Adam takes the size out.
Every group is clipped by its own gradient norm (`optim.py`). So ratio 1 is LoRA
to the bit where nothing is clipped (`optim.clip=0`), and with clipping LoRA
whose two factors are clipped apart.

Where sources differ:
  Head and biases. PEFT's optimiser, as the authors' code, gives everything with
    one axis the rate of B without decay (biases, norms, DoRA's magnitudes), and
    every other matrix that is not B, the kernel of a fresh head too, that of A.
    Here the ratio is B's alone; a head has eta, or what its own group says.
  Embedding tables. There both factors have a rate of their own, 1e-6 unless
    told otherwise. Tables are left out by default; where chosen, their A has
    eta and their B ratio eta, although it is A that starts at zero. Give them a
    `lowrank.lora` beside this one for equal rates.
"""

from peftjax import sites as sites_lib
from peftjax.methods.lowrank.lora import lora

EXAMPLE = dict(rank=2, alpha=4.0)


def lora_plus(rank=8, alpha=16.0, scaling='lora', rank_pattern=(),
              alpha_pattern=(), dropout=0.0, sites=sites_lib.kernels):
  """LoRA+; the ratio of the rates is the config's `optim.groups.fast.lr`.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernel.
    alpha: Numerator of the scale, any positive number.
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    alpha_pattern: The same for alpha.
    dropout: Rate on the adapter's input while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: what `lora` refuses.
  """
  base = lora(rank, alpha, scaling, rank_pattern, alpha_pattern, dropout, sites)
  return base._replace(name='lora_plus', labels=dict(b='fast'))
