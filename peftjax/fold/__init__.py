"""Folds an adapter folder into a file of plain weights.

  python -m peftjax.fold --adapter=DIR --out=FILE.safetensors [--weights=BASE]

Loads the base that the adapter was trained on, checks its fingerprint, folds,
compares the outputs of the folded and of the adapted model on real inputs, and
writes weights that `load_weights` reads. A method that changes activations
rather than weights is refused.

The difference is given as it is, and in units in the last place (ulp): the
distance from the largest output magnitude, of either model, to the next
float32 (`trees.difference`). Both models compute in float32 and in a different
order, so a few units are rounding; thousands are not.

This is a package so that `peftjax.fold` can be both: the function, as an
attribute of peftjax, and the command.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import trees
from peftjax.apply import apply
from peftjax.artifact import check_base, load_adapter
from peftjax.folding import fold, must_fold
from peftjax.method import as_methods
from peftjax.models.weights import load_weights, read_config, save_weights
from peftjax.sites import describe

BATCH = 64


def fold_adapter(adapter_dir, out, weights=None):
  """Folds an adapter into its base and writes plain float32 weights.

  Args:
    adapter_dir: What `save_adapter` wrote; its `base` entries 'weights',
      'classes', 'scan' and 'data' are read.
    out: File to write, '*.safetensors'.
    weights: Name or path of the base; by default what the adapter says.

  Returns:
    dict(max_abs, max_ulp: largest difference of the outputs; largest: largest
    output magnitude; inputs: what they were measured on; methods; out).

  Raises:
    ValueError: a method that cannot fold, another base, a base that is not
      named, an output that cannot be written; nothing is written then.
  """
  methods, theta, meta = load_adapter(adapter_dir)
  for name, method in as_methods(methods).items():
    must_fold(name, method)
  out = os.fspath(out)
  if not out.endswith('.safetensors'):
    raise ValueError(f"out={out!r}: expected a file named '*.safetensors', "
                     f'such as {out + ".safetensors"!r}')
  base = meta['base']
  weights = weights or base.get('weights')
  if not weights:
    raise ValueError(f'{adapter_dir} does not name its base; give --weights')
  model, params = load_weights(
      weights, classes=base.get('classes'), scan=bool(base.get('scan')))
  config = read_config(weights)
  shape, dtype = config['input'], config.get('dtype', 'float32')
  sites = describe(model, jax.ShapeDtypeStruct(shape, dtype))
  check_base(adapter_dir, meta, sites, params)

  x, inputs = _inputs(base.get('data'), shape, dtype)

  @jax.jit
  def both(params, theta, x):
    folded = fold(methods, params, theta, sites)
    return folded, apply(model, methods, params, theta, x)[0]

  folded, adapted = both(params, theta, x)
  # A program of its own: sharing one, XLA could compute both the same way.
  plain = jax.jit(model.apply)({'params': folded}, x)
  far, ulps = trees.difference(plain, adapted)
  args = dict(config['args'])
  if base.get('classes') is not None:
    args['classes'] = base['classes']
  try:
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    save_weights(out, folded, dict(config, args=args, adapter=dict(
        methods=meta['methods'], base=base)), dtype=jnp.float32)
  except OSError as e:
    raise ValueError(f'cannot write {out!r}: {e}; choose a folder that can be '
                     'written') from e
  largest = max(float(jnp.abs(v).max()) for v in jax.tree.leaves(adapted))
  return dict(max_abs=far, max_ulp=ulps, largest=largest, inputs=inputs,
              methods=list(as_methods(methods)), out=out)


def _inputs(data, shape, dtype):
  """(batch [B, ...], what it is): test images, or fixed random numbers."""
  if data:
    from peftjax.data.pipeline import load_split  # slow to import
    arrays = load_split(data, 'test', size=shape[1])
    return jnp.asarray(arrays['image'][:BATCH], dtype), f'{data}, test split'
  rng, shape = np.random.RandomState(0), (BATCH, *shape[1:])
  if jnp.issubdtype(dtype, jnp.integer):
    return jnp.asarray(rng.randint(0, 2, shape), dtype), 'random ids'
  return jnp.asarray(rng.standard_normal(shape), dtype), 'normal noise'
