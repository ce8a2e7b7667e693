"""Folds an adapter folder into a file of plain weights.

  python -m peftjax.fold --adapter=DIR --out=FILE.safetensors [--weights=BASE]

Loads the base that the adapter was trained on, checks its fingerprint, folds,
compares the outputs of the folded and of the adapted model on real inputs, and
writes what the base was: a weight file that `load_weights` reads, or, for a
base in Hugging Face's layout, such a folder (--out=FOLDER). A method that
changes activations rather than weights is refused.

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

from peftjax import bases
from peftjax import trees
from peftjax.apply import apply
from peftjax.artifact import check_base, load_adapter
from peftjax.folding import fold, must_fold
from peftjax.interop import families, huggingface
from peftjax.method import as_methods
from peftjax.models.weights import save_weights
from peftjax.sites import describe, FUSED_RULES

BATCH = 64


def fold_adapter(adapter_dir, out, weights=None):
  """Folds an adapter into its base and writes plain float32 weights.

  Args:
    adapter_dir: What `save_adapter` wrote; its `base` entries are read.
    out: File to write, '*.safetensors'; for a base that is a folder, a folder.
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
  said, out = meta['base'], os.fspath(out)
  weights = weights or said.get('weights')
  if not weights:
    raise ValueError(f'{adapter_dir} does not name its base; give --weights')
  _check_out(out, weights)
  base, (args, kwargs), inputs = load_base(adapter_dir, meta, weights)
  model, params = base.model, base.params
  sites = describe(model, *args, **kwargs,
                   fused=FUSED_RULES[said.get('fused', 'split')])
  check_base(adapter_dir, meta, sites, params)

  @jax.jit
  def both(params, theta, args, kwargs):
    folded = fold(methods, params, theta, sites)
    return folded, apply(model, methods, params, theta, *args, **kwargs)[0]

  folded, adapted = both(params, theta, args, kwargs)
  # A program of its own: sharing one, XLA could compute both the same way.
  plain = jax.jit(model.apply)({'params': folded}, *args, **kwargs)
  far, ulps = trees.difference(plain, adapted)
  try:
    if base.folder:
      huggingface.save(out, model, folded, like=base.config,
                       companions=base.folder)
    else:
      os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
      made = dict(base.config['args'])
      if said.get('classes') is not None:
        made['classes'] = said['classes']
      save_weights(out, folded, dict(base.config, args=made, adapter=dict(
          methods=meta['methods'], base=said)), dtype=jnp.float32)
  except OSError as e:
    raise ValueError(f'cannot write {out!r}: {e}; choose a place that can be '
                     'written') from e
  largest = max(float(jnp.abs(v).max()) for v in jax.tree.leaves(adapted))
  return dict(max_abs=far, max_ulp=ulps, largest=largest, inputs=inputs,
              methods=list(as_methods(methods)), out=out)


def _check_out(out, weights):
  """Raises where the output is not of the form that the base has."""
  is_file = out.endswith('.safetensors')
  if bases.is_folder(weights) and is_file:
    raise ValueError(f'out={out!r}: the base is a folder; expected a folder, '
                     f'such as {out.removesuffix(".safetensors")!r}')
  if not bases.is_folder(weights) and not is_file:
    raise ValueError(f"out={out!r}: expected a file named '*.safetensors', "
                     f'such as {out + ".safetensors"!r}')


def load_base(adapter_dir, meta, weights):
  """The base of an adapter: (base, (args, kwargs) of examples, what they are).

  Args:
    adapter_dir: What `save_adapter` wrote, for messages.
    meta: Its `Adapter.meta`.
    weights: Name or path of the base.
  """
  said = meta['base']
  if said.get('data'):
    from peftjax import case as case_lib  # slow to import
    config = case_lib.config_of(meta, weights, where=adapter_dir)
    split = said.get('split', 'test')
    case = case_lib.load(config, (split,), said.get('classes'))
    inputs = case.task.inputs(case.sample(split, BATCH))
    return case.base, inputs, f'{config.data.name}, {split}'
  base = bases.load(weights, said.get('head', 'own'), said.get('classes'),
                    bool(said.get('scan')),
                    param_dtype=said.get('param_dtype', 'float32'))
  if base.folder:
    shapes = families.example(base.model, base.config)
  else:
    shapes = (jax.ShapeDtypeStruct(
        base.config['input'], base.config.get('dtype', 'float32')),)
  rng, kinds = np.random.RandomState(0), set()
  args = []
  for s in shapes:
    shape = (BATCH, *s.shape[1:])
    whole = jnp.issubdtype(s.dtype, jnp.integer)
    kinds.add('random ids' if whole else 'normal noise')
    args.append(jnp.asarray(rng.randint(0, 2, shape) if whole
                            else rng.standard_normal(shape), s.dtype))
  return base, (tuple(args), {}), ' and '.join(sorted(kinds))
