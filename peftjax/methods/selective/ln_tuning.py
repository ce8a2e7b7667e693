"""LN tuning: only the scales and biases of norms are trained.

Source: "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM
Finetuning" (arXiv 2312.11420).

  y = s' * norm(x) + b'     s', b' [d], s' = s and b' = b at init

`selective.full` on norms: theta holds new values, which stand in for the base's
and cost nothing at run time; folding is a copy. A norm without a bias (RMSNorm)
has a scale to train. Statistics that a layer keeps among its parameters (leaves
named mean or var) are left as they are.

Init: the base's own values, so the adapted model starts as the base. They take
no weight decay, which would pull the scales to 0.

Count: 2 d a LayerNorm, d an RMSNorm.

The paper trains the norms of every block, and beside them the vision-language
connector, the word embeddings and the output head; one variant trains norms
alone. Hugging Face PEFT takes the last norm of a decoder as well, and so do the
sites here; leave it out by its path, as in select(roles='norm',
exclude='^final_norm$'). The connector, embeddings and head are added as
selective.full on their sites.
"""

from peftjax import sites as sites_lib
from peftjax.method import Method
from peftjax.methods.selective.full import full

EXAMPLE = {}
NORMS = sites_lib.select(roles='norm')
STATISTICS = ('mean', 'var')


def ln_tuning(sites=NORMS):
  """LN tuning.

  Args:
    sites: Predicate on sites; by default every norm.

  Raises:
    ValueError: a chosen site is no norm, or one without a scale and a bias.
  """
  whole = full(sites, group='no_decay')

  def trained(leaves):
    return {n: v for n, v in leaves.items() if n not in STATISTICS}

  def check(found):
    for path, site in found.items():
      if site.role != 'norm' or not trained(site.params):
        raise ValueError(
            f'ln_tuning: {path!r} ({site.kind}, role {site.role!r}) is no norm '
            f'with a scale or a bias: it has {sorted(site.params)}; choose '
            "norms by select(roles='norm', ...), name others by "
            "describe(..., roles=((regex, 'norm'),)), or take selective.full")

  def init(key, site, p, stats):
    return whole.init(key, site, trained(p), stats)

  def count(site):
    return whole.count(site._replace(params=trained(site.params)))

  return Method('ln_tuning', sites, init, replaces=True, check=check,
                labels=whole.labels, count=count)
