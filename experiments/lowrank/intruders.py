r"""Intruder dimensions and effective ranks of what the grid has trained.

  PEFTJAX_DATA=DATA python -m experiments.lowrank.intruders --task=mpqa

Reads the adapters of the finished cells of grid.py: full fine-tuning, LoRA of
ranks 1, 8 and 64, rsLoRA of rank 64. For every kernel of the blocks: intruders
among the first 10 directions (cosine below 0.5), the rank that holds 90 % of
the change, and two controls of the change's own norm: `noise`, normal entries,
and `random`, a product of normal factors of the arm's rank. Arms stand at the
rates that the search chose, so not quite at one accuracy; it is printed beside
them. Writes intruders.json, means over the 36 kernels.
"""

import json
import os
import zlib

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments.lowrank import stories
from peftjax import analysis
from peftjax import report
from peftjax.analysis import intruder_dimensions
from peftjax.analysis import kernels
from peftjax.artifact import load_adapter
from peftjax.fold import load_base
from peftjax.sites import describe

# arm: rank of the control; None: the kernel's own.
ARMS = {'full': None, 'lora_r1': 1, 'lora': 8, 'lora_r64': 64, 'rslora_r64': 64}
TOP, EPS = 10, 0.5


def random(key, shape, rank, norm):
  """A product of normal factors, of that rank and Frobenius norm."""
  left, right = jax.random.split(key)
  rank = rank or min(shape)
  delta = jax.random.normal(left, (shape[0], rank)) @ jax.random.normal(
      right, (rank, shape[1]))
  return delta * (norm / jnp.linalg.norm(delta))


def controls(adapter, found, rank):
  """{control: mean number of intruders} for the changes of `analyse`."""
  meta = load_adapter(adapter).meta
  base, (args, kwargs), _ = load_base(adapter, meta, meta['base']['weights'])
  sites, out = describe(base.model, *args, **kwargs), dict(noise=[], random=[])
  for name, k in kernels.each(sites, base.params):
    if name not in found:
      continue
    key = jax.random.key(zlib.crc32(name.encode()))
    norm = found[name]['norm']['delta']
    for control, r in (('noise', None), ('random', rank)):
      delta = (jax.random.normal(key, k.shape) if control == 'noise' else
               random(key, k.shape, r, norm))
      delta *= norm / jnp.linalg.norm(delta)
      seen = intruder_dimensions.directions(k, k + delta, TOP)
      out[control].append(int((seen.cosines < EPS).sum()))
  return {name: float(np.mean(v)) for name, v in out.items()}


def measure(adapter, rank):
  """Means over the kernels of one adapter."""
  found = analysis.analyse(adapter, top=TOP, eps=EPS)['kernels']
  mean = lambda of: float(np.mean([of(k) for k in found.values()]))
  against = controls(adapter, found, rank)
  return dict(
      intruders=mean(lambda k: k['intruders']['intruders']),
      subspace=mean(lambda k: k['intruders']['subspace_intruders']),
      **{f'intruders_{n}': v for n, v in against.items()},
      rank=mean(lambda k: k['rank']['delta']),
      rank_noise=mean(lambda k: k['rank']['noise']),
      share=mean(lambda k: k['rank']['delta'] / min(k['shape'])),
      moved=mean(lambda k: k['norm']['delta'] / k['norm']['base']),
      # For the figures: squares of the change's singular values, summed up.
      kernels={n: dict(intruders=k['intruders']['intruders'],
                       rank=k['rank']['delta']) for n, k in found.items()})


def main(argv):
  del argv
  rows = []
  for arm, seed, path in stories.finished(
      _WORKDIR.value, _TASK.value, ARMS):
    with open(os.path.join(os.path.dirname(path), 'summary.json'),
              encoding='utf-8') as f:
      score = json.load(f)['after']['accuracy']
    rows.append(dict(arm=arm, task=_TASK.value, seed=seed, score=score,
                     **measure(path, ARMS[arm])))
  with open(_OUT.value, 'w', encoding='utf-8') as f:
    json.dump(rows, f, indent=1)
    f.write('\n')
  print(report.markdown(lines(rows)))


def lines(rows):
  """[{column: text}], a line an arm: means over seeds."""
  out = []
  for arm in dict.fromkeys(r['arm'] for r in rows):
    mean = lambda k, arm=arm: float(np.mean(
        [r[k] for r in rows if r['arm'] == arm]))
    out.append({
        'arm': arm, 'accuracy %': f'{100 * mean("score"):.1f}',
        'intruders of 10': f'{mean("intruders"):.2f}',
        'in subspaces': f'{mean("subspace"):.2f}',
        'of random, same rank and norm': f'{mean("intruders_random"):.2f}',
        'of noise, same norm': f'{mean("intruders_noise"):.2f}',
        'rank of 90 %': f'{mean("rank"):.1f}',
        'of noise': f'{mean("rank_noise"):.1f}',
        'change / base': f'{mean("moved"):.3f}'})
  return out


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_string('workdir', 'runs/lowrank', 'The finished grid.')
  _TASK = flags.DEFINE_string('task', 'mpqa', 'Its task.')
  _OUT = flags.DEFINE_string(
      'out', os.path.join(os.path.dirname(__file__), 'intruders.json'),
      'JSON file to write.')
  app.run(main)
