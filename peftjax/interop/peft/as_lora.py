"""Any foldable adapter as the nearest LoRA of a rank, the loss told.

The change of every kernel, K' - K with K' folded, is cut to its first r singular
values: the best approximation of rank r in the Frobenius norm (Eckart and
Young). Where fewer carry all of it, fewer are written. Biases that changed go
along as they are, and so do norms and modules that are trained whole, as
modules_to_save.
"""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import trees
from peftjax import views as views_lib
from peftjax.folding import fold, own_leaves
from peftjax.interop.peft import files
from peftjax.interop.peft.part import Part, sites_of
from peftjax.interop.peft.source import open_adapter
from peftjax.interop.peft.writing import BIAS, convert, FULL
from peftjax.ops import svd

# Singular values below this share of the largest are rounding of float32.
NOTHING = 1e-6


def export_lora(adapter_dir, out, rank, base=None, head='keep',
                transformers=5):
  """Writes a LoRA adapter of PEFT; see the module docstring.

  Args:
    adapter_dir: What `save_adapter` wrote.
    out: Folder to make.
    rank: Largest rank of a site.
    base, head, transformers: As of `writing.export_adapter`.

  Returns:
    dict(out, residual: ||change - LoRA|| / ||change|| over all sites, sites:
    {path: dict(rank, residual)}, left_out).

  Raises:
    ValueError: a method that has no fold, nothing that changed, or what PEFT has
      no counterpart of; nothing is written then.
  """
  source, adapter, parts = open_adapter(
      adapter_dir, base, keep_head=head, transformers=transformers)
  methods, theta, _ = adapter
  # In the base's own bfloat16 most of the change would be rounded away.
  wide = jax.tree.map(
      lambda v: np.asarray(v, np.float32)
      if jnp.issubdtype(v.dtype, jnp.floating) else v, source.base.params)
  folded = jax.jit(lambda p, t: fold(methods, p, t, source.sites))(wide, theta)
  if source.names.scan:
    folded = trees.unstack(folded)
  new, report = split(source, trees.flatten(folded), parts, rank)
  names = copy.copy(source.names)
  names.scan = False  # the patterns of `new` are of the unrolled model
  config, tensors, left = convert(new, source._replace(names=names), base)
  files.write(out, config, tensors, {
      'peftjax.methods': json.dumps([p.spec['name'] for p in parts]),
      'peftjax.residual': repr(report['residual']),
      **source.metadata})
  return dict(out=str(out), **report, left_out=left)


def split(source, folded, parts, rank):
  """([Part], dict(residual, sites)) of what folding changed."""
  # A head stays what it is, trained whole; so do norms.
  heads = {p for p, s in source.unrolled.items() if s.role == 'head'}
  whole = [p._replace(theta={k: t for k, t in p.theta.items() if k in heads})
           for p in parts if p.spec['name'] == FULL]
  whole = [p for p in whole if p.theta]
  taken = {path for p in whole for path in p.theta}
  lora, biases, norms, sites, lost, total = {}, {}, {}, {}, 0.0, 0.0
  for path, site in source.unrolled.items():
    base, _ = views_lib.split_path(path)
    if path in taken or base in taken or not site.leaves:
      continue
    old = own_leaves(site, source.flat)
    change = {
        name: np.asarray(view.get(folded[_key(base, view.leaf)]), np.float64)
        - np.asarray(view.get(old[view.leaf]), np.float64)
        for name, view in site.leaves.items()}
    change = {name: v for name, v in change.items() if v.any()}
    if not change:
      continue
    if 'kernel' not in change and base in source.names.by_path and (
        source.names.by_path[base].kind == 'norm'):
      norms[base] = {v.leaf: np.asarray(folded[_key(base, v.leaf)])
                     for v in site.leaves.values()}
      continue
    for name in change:
      if name not in ('kernel', 'bias'):
        raise ValueError(f'{path!r}: its {name!r} changed, which no LoRA can '
                         "say; write the folded model (format 'merged')")
    if 'bias' in change:
      biases[base] = dict(bias=np.asarray(folded[_key(base, 'bias')]))
    if 'kernel' in change:
      if change['kernel'].ndim != 2:
        raise ValueError(f'{path!r}: a kernel of {list(change["kernel"].shape)} '
                         'has no matrix form; leave it out of the sites')
      lora[path], kept, all_of_it = nearest(change['kernel'], rank)
      sites[path] = dict(rank=lora[path]['a'].shape[1], residual=float(
          np.sqrt(max(all_of_it - kept, 0) / all_of_it)))
      lost, total = lost + max(all_of_it - kept, 0), total + all_of_it
  if not lora:
    raise ValueError('no kernel changed: there is nothing to write as a LoRA')
  ranks = {p: s['rank'] for p, s in sites.items()}
  r = max(ranks.values())
  patterns = [[sites_of([p for p in ranks if ranks[p] == n])['path'], n]
              for n in sorted(set(ranks.values()) - {r})]
  spec = dict(name='lowrank.lora', rank=r, alpha=float(r),
              rank_pattern=patterns, sites=sites_of(lora),
              alpha_pattern=[[p, float(n)] for p, n in patterns])
  made = [Part(spec, lora)]
  if biases:
    made.append(Part(dict(name=BIAS), biases))
  if norms:
    made.append(Part(dict(name=FULL), norms))
  return made + whole, dict(residual=float(np.sqrt(lost / total)), sites=sites)


def _key(base, leaf):
  return f'{base}/{leaf}' if base else leaf


def nearest(change, rank):
  """(dict(a, b) with a b near `change`, squares kept, squares in all)."""
  # numpy's: in float64, which jax does not have on every device.
  u, s, vt = svd.signed(*np.linalg.svd(change, full_matrices=False))
  r = max(1, min(rank, int((s > NOTHING * s[0]).sum())))
  a, b = svd.weighed(u[:, :r], s[:r], vt[:r])
  return dict(a=np.asarray(a, np.float32), b=np.asarray(b, np.float32)), float(
      (s[:r] ** 2).sum()), float((s ** 2).sum())
