"""Random mask: a random share of all entries is trained, the rest stays.

The control of sparse methods: what choosing entries well is worth is measured
against as many entries chosen at random. It is the `rand_uniform` control of
"BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models" (arXiv 2106.10199), drawn leaf by leaf, and the second phase of
`sparse.diff_pruning` with a support that nobody chose.

  p' = p + scatter(index, value)       index int32 [k] frozen, value [k] = 0
  k = the largest with k / size <= density, for every leaf of every chosen layer

Count: k a leaf. Stored: k values and k positions. Starts as the base. There is
no layer view: the layer is folded where it runs.
"""

import math

from peftjax.methods.sparse import diff_pruning

EXAMPLE = dict(density=0.1)


def random_mask(density=0.005, sites=diff_pruning.leaves_but_not_head):
  """Random mask.

  Args:
    density: Share of every leaf's entries that are trained.
    sites: Predicate on sites; by default every layer with parameters of its own
      but the head.

  Raises:
    ValueError: a density outside (0, 1], or too small to keep one parameter.
  """
  if not 0 < density <= 1:
    raise ValueError(f'random_mask: density={density}: expected a share in '
                     '(0, 1]; the default is 0.005')

  def count(site):
    return sum(diff_pruning.budget(density, math.prod(v.shape))
               for v in site.params.values())

  return diff_pruning.fixed_mask(density, sites)._replace(
      name='random_mask', count=count)
