"""What fine-tuning did to the weights; nothing is trained here.

  intruder_dimensions.py  directions that it brought in, and turning them down
  effective_rank.py       how many directions a kernel and its change have
  scaling_law.py          loss against data and scale, fitted
  kernels.py              the kernels of a params tree, one layer at a time

  python -m peftjax.analysis --adapter=DIR [--weights=BASE] [--out=FILE.json]

prints the first two for every kernel that an adapter changes.
"""

import numpy as np

from peftjax import sites as sites_lib
from peftjax.analysis import effective_rank, intruder_dimensions, kernels
from peftjax.artifact import check_base, load_adapter
from peftjax.fold import load_base
from peftjax.folding import must_fold
from peftjax.method import as_methods
from peftjax.sites import describe, FUSED_RULES


def analyse(adapter_dir, weights=None, top=10, eps=0.5, near=0.05, p=0.9):
  """Intruders, effective ranks and norms of a trained adapter.

  Args:
    adapter_dir: What `save_adapter` wrote.
    weights: Name or path of the base; by default what the adapter says.
    top, eps, near: As of `intruder_dimensions.report`.
    p: As of `effective_rank.report`.

  Returns:
    dict(methods, base, settings, kernels: {name: dict(shape, intruders, rank,
    norm, spectra), as of the two reports}, unchanged: names of kernels that are
    the base's).

  Raises:
    ValueError: a method that cannot fold, another base or one that is not
      named, an adapter that changes no kernel.
  """
  methods, theta, meta = load_adapter(adapter_dir)
  for name, method in as_methods(methods).items():
    must_fold(name, method)
  said = meta['base']
  weights = weights or said.get('weights')
  if not weights:
    raise ValueError(f'{adapter_dir} does not name its base; give --weights')
  base, (args, kwargs), _ = load_base(adapter_dir, meta, weights)
  sites = describe(base.model, *args, **kwargs,
                   fused=FUSED_RULES[said.get('fused', 'split')])
  check_base(adapter_dir, meta, sites, base.params)
  old, new = kernels.tuned(methods, base.params, theta, sites)
  changed, unchanged = set(), []
  for path, site in kernels.chosen_sites(sites).items():
    for name, k0, k1 in kernels.each({path: site}, old, new):
      if np.array_equal(k0, k1):
        unchanged.append(name)
      else:
        changed.add(path)
  if not changed:
    raise ValueError(
        f'{adapter_dir}: {", ".join(as_methods(methods))} changed no kernel '
        'but those of heads and tables: there is nothing to analyse')
  chosen = lambda site: sites_lib.kernels(site) and site.path in changed
  found = intruder_dimensions.report(old, new, sites, top, eps, near, chosen)
  ranks = effective_rank.report(old, new, sites, p, chosen=chosen)
  rows = {}
  for name, k0, _ in kernels.each(sites, old, new, chosen=chosen):
    if name not in unchanged:
      rows[name] = dict(shape=list(k0.shape), intruders=found[name],
                        **ranks[name])
  return dict(methods=list(as_methods(methods)), base=weights,
              settings=dict(top=top, eps=eps, near=near, p=p), kernels=rows,
              unchanged=unchanged)


def lines(report):
  """What `analyse` returned as a table, [{column: text}] for `report.markdown`.

  delta / base is the ratio of their Frobenius norms; noise has delta's norm.
  """
  s = report['settings']
  out = []
  for name, row in report['kernels'].items():
    found, rank, norm = row['intruders'], row['rank'], row['norm']
    out.append({
        'kernel': name, 'shape': ' x '.join(map(str, row['shape'])),
        f'intruders of {s["top"]}': str(found['intruders']),
        'in subspaces': str(found['subspace_intruders']),
        **{f'r({s["p"]:g}) {n}': str(rank[n])
           for n in ('base', 'tuned', 'delta', 'noise')},
        'norm of base': f'{norm["base"]:.4g}',
        'delta / base': f'{norm["delta"] / norm["base"]:.2e}'
                        if norm['base'] else '-'})
  return out
