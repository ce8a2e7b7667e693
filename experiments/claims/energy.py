"""OFT keeps the hyperspherical energy of every kernel, LoRA and full do not.

  python -m experiments.claims.energy --workdir=runs/all_methods

Reads the trained adapters of a finished grid, folds them, and compares each
kernel's energy and Gram matrix K^T K with the base's. The rule, fixed before:
shown if the relative change of energy, summed over kernels, is below 1e-4 for
OFT at every seed and above it for LoRA and full fine-tuning at every seed.
BOFT is printed beside them: its rotation keeps the energy, its scales s do too
as long as they stay positive, but not the Gram matrix.
"""

import glob
import json
import os

from absl import app
from absl import flags
import jax
import jax.numpy as jnp

import peftjax
from peftjax import report
from peftjax import trees
from peftjax.models.weights import load_weights
from peftjax.ops.energy import hyperspherical_energy

BAR = 1e-4
ARMS = ('oft', 'boft', 'lora', 'full')
KEPT = ('oft',)


def kernels(params):
  """{path: [d_in, n]} of the backbone's kernels; the head is new."""
  return {p: v.reshape(-1, v.shape[-1])
          for p, v in trees.flatten(params).items()
          if p.endswith('kernel') and not p.startswith('head')}


@jax.jit
def change(base, tuned):
  """(relative change of energy, largest relative change of a Gram matrix)."""
  moved, total, gram = 0.0, 0.0, 0.0
  for path, k in base.items():
    before, after = map(hyperspherical_energy, (k, tuned[path]))
    moved, total = moved + jnp.abs(after - before), total + before
    a, b = (jnp.matmul(m.T, m, precision='highest') for m in (k, tuned[path]))
    gram = jnp.maximum(gram, jnp.linalg.norm(b - a) / jnp.linalg.norm(a))
  return moved / total, gram


def measure(adapter):
  """Changes of one trained adapter against its base."""
  loaded = peftjax.load_adapter(adapter)
  base = loaded.meta['base']
  model, params = load_weights(base['weights'], classes=base['classes'])
  sites = peftjax.describe(model, jax.ShapeDtypeStruct(
      (1, 32, 32, 3), jnp.float32))
  loaded = peftjax.load_adapter(adapter, sites, params)
  plain = peftjax.fold(loaded.methods, params, loaded.theta, sites)
  return [float(v) for v in change(kernels(params), kernels(plain))]


def main(argv):
  del argv
  lines, rows = [], []
  for arm in ARMS:
    found = sorted(glob.glob(os.path.join(
        _WORKDIR.value, 'cells', f'{_TASK.value}-{arm}-s*', 'adapter')))
    if not found:
      raise SystemExit(f'no finished cells of {arm!r} in {_WORKDIR.value}')
    values = [measure(a) for a in found]
    energy = [v[0] for v in values]
    kept = arm in KEPT
    rows.append(dict(arm=arm, energy=energy, gram=[v[1] for v in values]))
    lines.append({
        'arm': arm, 'seeds': str(len(values)),
        'relative change of energy': f'{min(energy):.1e} to {max(energy):.1e}',
        'largest relative change of a Gram matrix':
            f'{max(v[1] for v in values):.1e}',
        f'rule ({BAR:g})': '-' if arm == 'boft' else (
            'holds' if all((e < BAR) == kept for e in energy) else 'fails')})
  print(report.markdown(lines))
  if _OUT.value:
    with open(_OUT.value, 'w') as f:
      json.dump(rows, f, indent=1)
      f.write('\n')


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_string('workdir', 'runs/all_methods',
                                 'A finished grid.')
  _TASK = flags.DEFINE_string('task', 'kmnist', 'Its task.')
  _OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
  app.run(main)
