"""Evaluation: THE loop, and the command that evaluates an adapter folder.

  python -m peftjax.evaluate --adapter=DIR [--weights=BASE] [--data=kmnist] \
      [--split=test]

prints a JSON object with the metrics of the base and of the adapted model. The
base, a new head of zeros on it where the task has one, must be the one that the
adapter was trained on, to the bit.
"""

import collections
import json

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from peftjax import case as case_lib
from peftjax import sharding
from peftjax.apply import apply
from peftjax.artifact import load_adapter
from peftjax.data import pipeline, stream
from peftjax.sites import describe, FUSED_RULES
from peftjax.tasks import classification, images


# Batches that may be under way before the oldest one's sums are fetched.
LAG = 4


def evaluator(model, methods, arrays, batch, mesh=None, task=None):
  """Makes `(params, theta) -> metrics`, compiled once however often it is run.

  Args:
    model: A Linen module.
    methods: As given to `init`; () for the base alone, with theta {}.
    arrays: {name: [N, ...]}, what the task's batches are rows of, or a
      `stream.Split`, of which a few batches at a time are in memory.
    batch: Rows at a time; rounded up to what divides over the mesh.
    mesh: From `sharding.make_mesh`; by default one device.
    task: A `tasks.base.Task`; None: images [B, ...] -> logits [B, classes],
      with arrays image and label.

  Returns:
    A function to {metric: value} with what the task's `metrics` has, the mean
    loss, and n, the number of examples. With `write=True` there are also the
    metrics of what the model writes, where the task has such.
  """
  if task is None:
    task = classification.classify(
        'image', images.inputs, max(2, int(np.max(arrays['label'])) + 1))
  mesh = mesh or sharding.make_mesh(dict(data=1, model=1))
  parts = mesh.shape['data']
  streamed = isinstance(arrays, stream.Split)
  rows = len(arrays.examples if streamed else next(iter(arrays.values())))
  batches = stream.eval_batches if streamed else pipeline.eval_batches
  batch = -(-min(batch, rows) // parts) * parts
  place = sharding.batch_sharding(mesh)

  def sums(params, theta, batch):
    args, kwargs = task.inputs(batch)
    with sharding.rows_stay(mesh, len(batch['valid'])):
      out, _ = apply(model, methods, params, theta, *args, **kwargs)
    loss, weight = task.loss(out, batch)
    # Filled-up rows may hold anything, NaN too: chosen away, not multiplied.
    loss = jnp.where(batch['valid'], loss, 0).sum()
    if weight is not None:
      weight = jnp.where(batch['valid'], weight, 0).sum()
    return loss, weight, task.measure(out, batch)

  # Every process gets all rows of what is measured.
  sums = jax.jit(sums, out_shardings=sharding.replicated(mesh))

  def run(params, theta, write=False):
    found, pending = [], collections.deque()
    for b in batches(arrays, batch):
      pending.append(sums(params, theta, sharding.put_global(b, place)))
      if len(pending) > LAG:  # the devices hold no more batches than these
        found.append(jax.device_get(pending.popleft()))
    found += jax.device_get(list(pending))
    loss = sum(v[0].item() for v in found)
    weights = [v[1] for v in found]
    total = rows if weights[0] is None else sum(w.item() for w in weights)
    kept = {k: np.concatenate([v[2][k] for v in found])[:rows]
            for k in found[0][2]}
    out = dict(task.metrics(kept), loss=loss / max(total, 1e-8), n=rows)
    if write and task.generate:
      out |= task.generate(model, methods, params, theta)
    return out

  return run


def evaluate(model, methods, params, theta, arrays, batch=200, mesh=None,
             task=None):
  """Metrics of the adapted model over all examples; see `evaluator`."""
  return evaluator(model, methods, arrays, batch, mesh, task)(
      params, theta, write=True)


def evaluate_adapter(path, weights=None, data=None, split=None, batch=200):
  """Metrics of an adapter folder and of its base.

  Args:
    path: What `save_adapter` wrote.
    weights: Name or path of the base, if not what the adapter says.
    data: Data set, if not what the adapter says.
    split: Its part: 'train', 'validation' or 'test'; None: the one that the
      adapter was judged on.
    batch: Examples at a time.

  Returns:
    dict(base, adapted: metrics; data, split, trained, stored: counts).

  Raises:
    ValueError: another base, or one that neither adapter nor caller names.
  """
  meta = load_adapter(path).meta
  config = case_lib.config_of(meta, weights, data, path)
  split = split or meta['base'].get('split', 'test')
  case = case_lib.load(config, (split,), meta['base'].get('classes'))
  model, params = case.base.model, case.base.params
  args, kwargs = case.example()
  sites = describe(model, *args, **kwargs,
                   fused=FUSED_RULES[meta['base'].get('fused', 'split')])
  methods, theta, meta = load_adapter(path, sites, params)
  run = lambda *a: evaluate(
      model, *a, case.arrays[split], batch, task=case.task)
  return dict(
      base=run((), params, {}), adapted=run(methods, params, theta),
      data=config.data.name, split=split, trained=meta['trained'],
      stored=meta['stored'])


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; see --help')
  try:
    report = evaluate_adapter(
        _ADAPTER.value, _WEIGHTS.value, _DATA.value, _SPLIT.value)
  except (OSError, ValueError) as e:
    raise SystemExit(f'evaluate: {e}') from e
  print(json.dumps(report, indent=1))


if __name__ == '__main__':
  _ADAPTER = flags.DEFINE_string(
      'adapter', None, 'Folder that save_adapter wrote.', required=True)
  _WEIGHTS = flags.DEFINE_string(
      'weights', None, 'Name or path of the base, if not as the adapter says.')
  _DATA = flags.DEFINE_string(
      'data', None, 'Data set, if not what the adapter says.')
  _SPLIT = flags.DEFINE_string(
      'split', None, 'Its part, if not the one the adapter was judged on.')
  app.run(main)
