"""Evaluation: THE loop, and the command that evaluates an adapter folder.

  python -m peftjax.evaluate --adapter=DIR [--weights=BASE] [--data=kmnist] \
      [--split=test]

prints a JSON object with the metrics of the base and of the adapted model. The
base, a new head of zeros on it where the task has one, must be the one that the
adapter was trained on, to the bit.
"""

import json

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import optax

from peftjax import sharding
from peftjax.apply import apply
from peftjax.artifact import load_adapter
from peftjax.data import pipeline
from peftjax.models.weights import load_weights, read_config
from peftjax.sites import describe


def evaluator(model, methods, arrays, batch, mesh=None):
  """Makes `(params, theta) -> metrics`, compiled once however often it is run.

  Args:
    model: A Linen module, images [B, ...] -> logits [B, classes].
    methods: As given to `init`; () for the base alone, with theta {}.
    arrays: dict(image [N, ...], label [N]).
    batch: Images at a time; rounded up to what divides over the mesh.
    mesh: From `sharding.make_mesh`; by default one device.

  Returns:
    A function to dict(accuracy, loss, n): the mean of correct first choices and
    of the cross-entropy in nats over all n examples.
  """
  mesh = mesh or sharding.make_mesh(dict(data=1, model=1))
  parts = mesh.shape['data']
  batch = -(-min(batch, len(arrays['label'])) // parts) * parts
  place = sharding.batch_sharding(mesh)

  @jax.jit
  def sums(params, theta, batch):
    logits, _ = apply(model, methods, params, theta, batch['image'])
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch['label'])
    right = logits.argmax(-1) == batch['label']
    mask = batch['mask']
    # Filled-up rows may hold anything, NaN too: chosen away, not multiplied.
    return dict(loss=jnp.where(mask, loss, 0).sum(),
                right=jnp.where(mask, right, False).sum(), n=mask.sum())

  def run(params, theta):
    found = [sums(params, theta, sharding.put_global(b, place))
             for b in pipeline.eval_batches(arrays, batch)]
    total = {k: sum(v[k].item() for v in jax.device_get(found))
             for k in ('loss', 'right', 'n')}
    return dict(accuracy=total['right'] / total['n'],
                loss=total['loss'] / total['n'], n=total['n'])

  return run


def evaluate(model, methods, params, theta, arrays, batch=200, mesh=None):
  """Metrics of the adapted model over all examples; see `evaluator`."""
  return evaluator(model, methods, arrays, batch, mesh)(params, theta)


def evaluate_adapter(path, weights=None, data=None, split='test', batch=200):
  """Metrics of an adapter folder and of its base.

  Args:
    path: What `save_adapter` wrote.
    weights: Name or path of the base, if not what the adapter says.
    data: Data set, if not what the adapter says.
    split: Its part: 'train', 'validation' or 'test'.
    batch: Images at a time.

  Returns:
    dict(base, adapted: metrics; data, split, trained, stored: counts).

  Raises:
    ValueError: another base, or one that neither adapter nor caller names.
  """
  base = load_adapter(path).meta['base']
  weights, data = weights or base.get('weights'), data or base.get('data')
  for value, flag in ((weights, 'weights'), (data, 'data')):
    if not value:
      raise ValueError(f'{path} does not name its {flag}; give --{flag}')
  model, params = load_weights(
      weights, classes=base.get('classes'), scan=bool(base.get('scan')))
  shape = tuple(read_config(weights)['input'])
  sites = describe(model, jax.ShapeDtypeStruct(shape, jnp.float32))
  methods, theta, meta = load_adapter(path, sites, params)
  arrays = pipeline.load_split(data, split, size=shape[1])
  return dict(
      base=evaluate(model, (), params, {}, arrays, batch),
      adapted=evaluate(model, methods, params, theta, arrays, batch),
      data=data, split=split, trained=meta['trained'], stored=meta['stored'])


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
  _SPLIT = flags.DEFINE_string('split', 'test', 'Its part.')
  app.run(main)
