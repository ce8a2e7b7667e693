"""What one batch tells of layers: what they read, their kernels' gradients.

The state of every layer goes through the model with the batch, and comes out
with what the layer saw added to it, by a `Reducer`. `calibrate` puts the
batches together.
"""

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import theta as theta_lib
from peftjax import views as views_lib
from peftjax.apply import apply
from peftjax.folding import over_stack
from peftjax.method import Method
from peftjax.ops.statistics import Reducer
from peftjax.tasks.base import mean_loss


def adding(model, task, reducer, chosen):
  """`(state, params, batch, key) -> state` of the sites {path: Site}."""
  over = _over_inputs if reducer.of == 'inputs' else _over_gradients
  return over(model, task, reducer, chosen)


def empty(reducer, chosen):
  """{path: state} before any batch, the axes of `site.stack` first."""
  return {p: over_stack(lambda _, s=s: reducer.init(s), s.stack)(
      jnp.zeros(s.stack)) for p, s in chosen.items()}


# ------------------------------------------------------------------- inputs
def _bits(state):
  """Numbers as integers: the engine casts floats to the layer's own dtype."""
  return {n: jax.lax.bitcast_convert_type(v, jnp.int32)
          for n, v in state.items()}


def _floats(state):
  return {n: jax.lax.bitcast_convert_type(v, jnp.float32)
          for n, v in state.items()}


def _span(path):
  span = views_lib.split_path(path)[1]
  return f'{span[0]}:{span[1]}' if span else ''


def _tap(chosen, update):
  """A method that leaves layers as they are and sows update(state, x, keep)."""
  def layer(f, x, t, ctx):
    d, rows = ctx.site.params['kernel'].shape[0], x.shape[:-1]
    if x.shape[-1] != d:
      raise ValueError(
          f'calibration: {ctx.path!r} ({ctx.site.kind}) reads {list(x.shape)}, '
          f'expected rows of {d}, as its kernel has; leave it out of the sites')
    # What has no mask of its shape is pooled, or has no padding.
    keep = next((m for m in ctx.batch if m.shape == rows), jnp.ones(rows, bool))
    new = update(_floats(t), x.reshape(-1, d).astype(jnp.float32),
                 keep.reshape(-1))
    for n, v in _bits(new).items():
      ctx.sow(f'tap{_span(ctx.path)}|{n}', v)
    return f(x)

  return Method('tap', lambda site: site.path in chosen,
                lambda *unused: {}, layer=layer)


def _sown(aux, path, names):
  """What a tap sowed at a site: {name: value}."""
  base, _ = views_lib.split_path(path)
  node = aux
  for part in base.split('/') if base else ():
    node = node[part]
  out = {}
  for n in names:
    values = node[f'tap{_span(path)}|{n}']
    if len(values) != 1:
      raise ValueError(f'calibration: the model calls {path!r} {len(values)} '
                       'times, expected once; leave it out of the sites')
    out[n] = values[0]
  return out


def _over_inputs(model, task, reducer, chosen):
  """`(state, params, batch, key) -> state`."""
  tap = _tap(chosen, reducer.update)

  def step(state, params, batch, key):
    args, kwargs, masks = _read(task, batch, reducer.labelled)
    _, aux = apply(model, tap, params, {'tap': {
        p: _bits(s) for p, s in state.items()}}, *args, train=reducer.train,
                   rng=key, batch=masks, **kwargs)
    return {p: _floats(_sown(aux, p, s)) for p, s in state.items()}

  return step


def _labelled(batch):
  """Which tokens a loss is taken of, bool [B, T]; None where none has one."""
  if 'weights' in batch:  # of texts that are continued
    return batch['weights'] > 0
  if 'labels' in batch:  # tags
    return batch['labels'] >= 0
  return None


def _read(task, batch, labelled=False):
  """(args, kwargs) of the model's call, and the masks of its tokens, bool.

  With `labelled`, a mask leaves out tokens without a label of their own, where
  others have one. Layers know a mask by its shape: an encoder-decoder's texts,
  where both have one length, get another token of padding.
  """
  targets = batch.get('targets_in')
  if targets is not None and targets.shape == batch['ids'].shape:
    batch = {**batch, **{n: jnp.pad(batch[n], ((0, 0), (0, 1)))
                         for n in ('ids', 'mask')}}
  args, kwargs = task.inputs(batch)
  masks = [kwargs.get('mask')]
  with_label = _labelled(batch) if labelled else None
  if with_label is not None and masks[0] is not None:
    masks[0] = masks[0].astype(bool) & with_label
  if targets is not None:
    masks.append(batch['target_weights'] > 0)
  return args, kwargs, [m.astype(bool) for m in masks if m is not None]


# ---------------------------------------------------------------- gradients
def _over_gradients(model, task, reducer, chosen):
  """`(state, params, batch, key) -> state`, of kernels' gradients."""
  kernels = Method(
      'kernels', lambda site: site.path in chosen,
      lambda key, site, p, stats: dict(kernel=p['kernel'].astype(jnp.float32)),
      fold=lambda p, t: {**p, 'kernel': t['kernel']})

  def gradient(params, batch, key):
    theta = theta_lib.init(kernels, jax.random.key(0), chosen, params)

    def loss(theta):
      args, kwargs = task.inputs(batch)
      out, _ = apply(model, kernels, params, theta, *args,
                     train=reducer.train, rng=key, **kwargs)
      return mean_loss(*task.loss(out, batch, None))

    return {p: t['kernel'] for p, t in jax.grad(loss)(theta)['kernels'].items()}

  def add(state, params, batch, key):
    grads = gradient(params, batch, key)
    return {p: over_stack(lambda s, g: reducer.update(s, g, None),
                          chosen[p].stack)(state[p], grads[p]) for p in state}

  if reducer.of == 'gradient':
    return add

  def step(state, params, batch, key):
    rows = {k: v[:, None] for k, v in batch.items()}
    keys = jax.random.split(key, len(jax.tree.leaves(batch)[0]))
    return jax.lax.scan(
        lambda s, row: (add(s, params, *row), None), state, (rows, keys))[0]

  return step


# ------------------------------------------------------------ equal inputs
def owners(model, params, chosen, task, batch, train=False):
  """{path: path whose layer reads the same}, seen on one batch.

  Query, key and value kernels read one array; what is computed for one of them
  serves all. Told by a few of the numbers, which have to be equal to the bit.

  Args:
    model, params, task, batch: As of `collect`.
    chosen: {path: Site}.
    train: Whether the base runs as in training, with dropout.
  """
  def peek(state, x, keep):
    del state, keep
    flat = x.reshape(-1)
    at = np.linspace(0, flat.size - 1, min(flat.size, 257)).astype(int)
    return dict(some=flat[at])

  one = Reducer('inputs', lambda site: dict(some=jnp.zeros(1)), peek,
                train=train)
  seen = jax.device_get(jax.jit(_over_inputs(model, task, one, chosen))(
      empty(one, chosen), params, batch, jax.random.key(0)))
  first, out = {}, {}
  for path, s in seen.items():
    mark = (s['some'].shape, s['some'].tobytes(),
            chosen[path].params['kernel'].shape[0])
    out[path] = first.setdefault(mark, path)
  return out
