"""Training step of every method against full fine-tuning, in one process.

  python -m benchmarks.step [--methods=lowrank.lora,scaling.ssf] [--pairs=20]

One AdamW step of `vit_s`'s architecture (random weights, a new head on top) on
random images. Steps are interleaved with full fine-tuning's, so that a busy
machine slows both; the ratio is the median over pairs. FLOPs and bytes are of
the compiled step and do not depend on the machine's load. `--folded` adds the
arm that folds the whole tree first, which shows what the factored form saves.
"""

import json
import statistics
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import optax
from rich import print as rich_print
from rich import table as rich_table

import peftjax
from peftjax.models.vit import ViT

_METHODS = flags.DEFINE_list(
    'methods', ['lowrank.lora', 'orthogonal.oft', 'orthogonal.boft',
                'scaling.ssf', 'selective.bitfit', 'sparse.diff_pruning'],
    'Methods to time.')
_PAIRS = flags.DEFINE_integer('pairs', 20, 'Timed pairs.', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch', 32, 'Images a step.', lower_bound=1)
_FOLDED = flags.DEFINE_bool('folded', True, 'Add LoRA folded as a tree.')
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')


def compiled_step(model, methods, params, sites, images, labels, folded=False):
  """(compiled step, its first state) of one set of methods."""
  theta = peftjax.init(methods, jax.random.key(1), sites, params)
  trained, frozen = peftjax.partition(methods, theta)
  tx = optax.adamw(1e-3)

  def loss(trained, frozen, params, rng):
    theta = peftjax.combine(trained, frozen)
    if folded:
      plain = peftjax.fold(methods, params, theta, sites)
      logits = model.apply({'params': plain}, images)
    else:
      logits, _ = peftjax.apply(
          model, methods, params, theta, images, train=True, rng=rng)
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels).mean()

  def step(trained, state, frozen, params, rng):
    grads = jax.grad(loss)(trained, frozen, params, rng)
    updates, state = tx.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state

  state = tx.init(trained)
  rng = jax.random.key(2)
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(
      trained, state, frozen, params, rng).compile()
  return compiled, [trained, state, frozen, params, rng]


def seconds(compiled, state):
  """Wall time of one step; `state` moves on."""
  start = time.perf_counter()
  state[:2] = jax.block_until_ready(compiled(*state))
  return time.perf_counter() - start


def main(argv):
  del argv
  model = ViT(classes=10)
  images = jax.random.normal(jax.random.key(0), (_BATCH.value, 32, 32, 3))
  labels = jnp.arange(_BATCH.value) % 10
  params = model.init(jax.random.key(3), images)['params']
  sites = peftjax.describe(model, images)
  head = peftjax.load('selective.full', sites=dict(roles='head'))
  arms = {'full': ((peftjax.load('selective.full'),), False)}
  for name in _METHODS.value:
    arms[name] = ((peftjax.load(name), head), False)
  if _FOLDED.value:
    arms['lowrank.lora, folded'] = (
        (peftjax.load('lowrank.lora'), head), True)
  runs = {name: compiled_step(model, methods, params, sites, images, labels,
                              folded)
          for name, (methods, folded) in arms.items()}
  for compiled, state in runs.values():
    for _ in range(3):
      seconds(compiled, state)
  times = {name: [] for name in runs}
  for _ in range(_PAIRS.value):
    for name in runs:  # each arm beside one step of full fine-tuning
      times[name].append((seconds(*runs['full']), seconds(*runs[name])))

  table = rich_table.Table(title=f'{_BATCH.value} images of 32 x 32, '
                           f'{jax.devices()[0].device_kind}, jax {jax.__version__}')
  for column in ('arm', 'ms', 'time / full', 'quartiles', 'GFLOP', 'temp MiB'):
    table.add_column(column, justify='left' if column == 'arm' else 'right')
  rows = []
  for name, (compiled, _) in runs.items():
    ratios = sorted(b / a for a, b in times[name])
    n = len(ratios)
    row = dict(
        arm=name, seconds=statistics.median(b for _, b in times[name]),
        ratio=statistics.median(ratios),
        quartiles=(ratios[n // 4], ratios[(3 * n) // 4]),
        flops=compiled.cost_analysis()['flops'],
        temp_bytes=compiled.memory_analysis().temp_size_in_bytes)
    rows.append(row)
    table.add_row(
        name, f'{1000 * row["seconds"]:.1f}', f'{row["ratio"]:.2f}',
        '{:.2f} to {:.2f}'.format(*row['quartiles']),
        f'{row["flops"] / 1e9:.2f}', f'{row["temp_bytes"] / 2**20:.0f}')
  rich_print(table)
  if _OUT.value:
    with open(_OUT.value, 'w') as f:
      json.dump(rows, f, indent=1)
      f.write('\n')


if __name__ == '__main__':
  app.run(main)
