"""Budgets of ranks: how much each entry matters, and how many ranks may stay.

The importance of an entry p of theta with gradient g is a running average of
|p g|, S, times one of how far |p g| is from S, U:

  I = |p g|
  S <- beta1 S + (1 - beta1) I
  U <- beta2 U + (1 - beta2) |I - S|

A rank-one term A_j e_j B_j of a delta has the score S U of e_j, plus the means
of S U over A_j and over B_j. All terms of all kernels compete for one budget.

Source: "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
Fine-Tuning" (arXiv 2303.10512), as in the RankAllocator of Hugging Face PEFT.
"""

import jax
import jax.numpy as jnp


def averages(s, u, p, g, beta1, beta2):
  """(S, U) after one more gradient; all arrays of one shape."""
  now = jnp.abs(p * g)
  s = beta1 * s + (1 - beta1) * now
  return s, beta2 * u + (1 - beta2) * jnp.abs(now - s)


def scores(a, e, b):
  """Scores of terms [..., r], from S U of a [..., d, r], e, b [..., r, d]."""
  return a.mean(-2) + e + b.mean(-1)


def cubic(t, first, last, start, end):
  """The budget in step t: `start` up to step `first`, `end` from `last` on.

  Between them end + (start - end) (1 - (t - first) / (last - first))^3, rounded
  down. All may be traced; int32.
  """
  left = jnp.clip((last - t) / jnp.maximum(last - first, 1), 0, 1)
  # Whole numbers stay what they are, whatever the last digits say.
  value = (start - end) * left ** 3 + end + 1e-6 * start
  return jnp.floor(value).astype(jnp.int32)


def above(tree, k):
  """Which scores of a tree are above the k-th smallest of all together.

  Scores that are equal to it go with it. k = 0: all are above.
  """
  ordered = jnp.sort(jnp.concatenate(
      [v.ravel() for v in jax.tree.leaves(tree)]))
  least = jnp.where(k > 0, ordered[jnp.maximum(k - 1, 0)], -jnp.inf)
  return jax.tree.map(lambda v: v > least, tree)
