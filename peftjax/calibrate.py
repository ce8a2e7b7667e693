"""Calibration: statistics of the base at the sites of methods, over batches.

A method that starts from data says what it wants to know of a site by a
`Reducer`. `collect` runs the base on batches and puts it together:

  of 'inputs'     what the layer reads: rows x [n, d_in] and keep [n], which
                  rows are no padding
  of 'gradient'   the gradient of a batch's loss in the kernel, [d_in, d_out]
  of 'examples'   the same of every example of a batch, one after another

Inputs are met by an interceptor, as methods meet them: scanned and
rematerialised models, fused kernels and DenseGeneral need nothing of their own.
The states of a scanned layer are stacked as its kernels are. All is float32,
whatever the model computes in.
"""

import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from peftjax import case as case_lib
from peftjax import method as method_lib
from peftjax import sites as sites_lib
from peftjax import theta as theta_lib
from peftjax import views as views_lib
from peftjax.apply import apply
from peftjax.folding import over_stack
from peftjax.method import as_methods, Method, nearest
from peftjax.ops.statistics import Reducer
from peftjax.tasks.base import mean_loss

KINDS = ('inputs', 'gradient', 'examples')
FILE = 'calibration.safetensors'


# --------------------------------------------------------------- one batch
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
    d = x.shape[-1]
    keep = ctx.batch
    if keep is None or keep.shape != x.shape[:-1]:
      keep = jnp.ones(x.shape[:-1], bool)  # pooled rows, or no padding
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
    args, kwargs = task.inputs(batch)
    _, aux = apply(model, tap, params, {'tap': {
        p: _bits(s) for p, s in state.items()}}, *args, train=reducer.train,
                   rng=key, batch=_kept(batch), **kwargs)
    return {p: _floats(_sown(aux, p, s)) for p, s in state.items()}

  return step


def _kept(batch):
  """Which tokens are no padding, [B, T]; None: rows have none."""
  mask = batch.get('mask')
  return None if mask is None else mask.astype(bool)


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
def owners(model, params, sites, chosen, task, batch):
  """{path: path whose layer reads the same}, seen on one batch.

  Query, key and value kernels read one array; what is computed for one of them
  serves all. Told by a few of the numbers, which have to be equal to the bit.
  """
  def peek(state, x, keep):
    del state, keep
    flat = x.reshape(-1)
    at = np.linspace(0, flat.size - 1, min(flat.size, 257)).astype(int)
    return dict(some=flat[at])

  one = Reducer('inputs', lambda site: dict(some=jnp.zeros(1)), peek)
  empty = {p: over_stack(lambda _, s=s: one.init(s), s.stack)(
      jnp.zeros(s.stack)) for p, s in chosen.items()}
  seen = jax.device_get(jax.jit(_over_inputs(model, task, one, chosen))(
      empty, params, batch, jax.random.key(0)))
  first, out = {}, {}
  for path, s in seen.items():
    mark = (s['some'].shape, s['some'].tobytes(),
            chosen[path].params['kernel'].shape[0])
    out[path] = first.setdefault(mark, path)
  return out


# ------------------------------------------------------------------ collect
def collect(model, params, sites, task, batches, reducer, method, at_once=0,
            key=None, folder='', every=16, marks=''):
  """Statistics at the sites of a method.

  Args:
    model: A Linen module.
    params: The base's params.
    sites: What `describe` returned.
    task: A `tasks.base.Task`: its inputs, and for gradients its loss.
    batches: Function without arguments that returns an iterator of batches; the
      same ones at every call.
    reducer: A `Reducer`.
    method: The `Method` whose sites are meant, or a predicate on sites.
    at_once: So many layers' states are held at a time, at a pass over the
      batches for each group of layers; 0: all in one pass.
    key: For what is random in training; None: a fixed one.
    folder: Where a collection that is broken off can go on from, and a whole
      one be read from; '': nowhere.
    every: Batches between two savings of what there is.
    marks: What the batches and the base are; another one is not gone on with.

  Returns:
    {path: stats}, with the axes of `site.stack` first.

  Raises:
    ValueError: sites that cannot be calibrated, no batches, a file of another
      collection, NaN in what was collected.
  """
  if reducer.of not in KINDS:
    raise ValueError(f'reducer of {reducer.of!r}{nearest(reducer.of, KINDS)}')
  if not isinstance(method, Method):
    method = Method('calibrate', method, None)
  chosen = sites_lib.matched(method, sites)
  _check(chosen)
  key = jax.random.key(0) if key is None else key
  owner = {p: p for p in chosen}
  if reducer.of == 'inputs':
    for batch in batches():
      owner = owners(model, params, sites, chosen, task, batch)
      break
    else:
      raise ValueError('calibration: there are no batches')
  mine = sorted(set(owner.values()))
  size = at_once or len(mine)
  groups = [mine[i:i + size] for i in range(0, len(mine), size)]
  saved = _Saved(folder, dict(
      reducer=reducer.name, of=reducer.of, sites=mine, at_once=at_once,
      marks=marks))
  over = _over_inputs if reducer.of == 'inputs' else _over_gradients
  found = {}
  for i, paths in enumerate(groups):
    part = {p: chosen[p] for p in paths}
    state = {p: over_stack(lambda _, s=s: reducer.init(s), s.stack)(
        jnp.zeros(s.stack)) for p, s in part.items()}
    state, done = saved.get(i, state)
    step = jax.jit(over(model, task, reducer, part), donate_argnums=0)
    count = done
    if done >= 0:
      for count, batch in enumerate(batches(), 1):
        if count <= done:
          continue
        state = step(state, params, batch, jax.random.fold_in(key, count))
        if reducer.done and all(
            np.all(over_stack(reducer.done, part[p].stack)(s))
            for p, s in state.items()):
          break
        if count % every == 0:
          saved.put(i, state, count)
      if not count:
        raise ValueError('calibration: there are no batches')
      saved.put(i, state, -1)
    for p, s in state.items():
      stats = over_stack(reducer.finish, part[p].stack)(s)
      bad = [n for n, v in stats.items() if not np.isfinite(v).all()]
      if bad:
        raise ValueError(f'calibration: {bad[0]!r} of {p!r} is not finite; look '
                         'for NaN in the data and the base')
      found[p] = stats
  return {p: found[o] for p, o in owner.items()}


def readable(site):
  """Kernels [d_in, d_out] that multiply what their layer reads; no head.

  The sites, by default, of methods that start from data.
  """
  return _multiplies(site) and site.role != 'head'


def _multiplies(site):
  kernel = site.params.get('kernel')
  return (kernel is not None and len(kernel.shape) == 2
          and site.kind not in ('Embed', 'Conv', 'ConvTranspose'))


def _check(chosen):
  for path, site in chosen.items():
    if not _multiplies(site):
      raise ValueError(
          f'{path!r} ({site.kind}) cannot be calibrated: expected a kernel '
          '[d_in, d_out] of a Dense, DenseGeneral or Einsum; leave it out of '
          "the sites, as by select(exclude='...')")


class _Saved:
  """States on disk, one file; each group of layers at its last batch."""

  def __init__(self, folder, about):
    self.path = os.path.join(folder, FILE) if folder else ''
    self.about, self.arrays, self.done = about, {}, {}
    if not self.path or not os.path.exists(self.path):
      return
    try:
      with safetensors.safe_open(self.path, 'numpy') as f:
        meta = json.loads(f.metadata()['about'])
        self.arrays = {n: f.get_tensor(n) for n in f.keys()}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as e:
      raise ValueError(f'{self.path} is damaged: {e}; delete it, and it is '
                       'collected anew') from e
    self.done = {int(k): v for k, v in meta.pop('done').items()}
    for k, v in json.loads(json.dumps(about)).items():
      if meta.get(k) != v:
        raise ValueError(
            f'{self.path} was collected with {k}={meta.get(k)!r}, expected '
            f'{v!r}; delete it, or choose another folder')

  def get(self, group, like):
    """(state, batches that are in it; -1: all) of a group of layers."""
    if group not in self.done:
      return like, 0
    return {p: {n: jnp.asarray(self.arrays[f'{group}:{p}:{n}'])
                for n in s} for p, s in like.items()}, self.done[group]

  def put(self, group, state, done):
    if not self.path:
      return
    self.arrays |= {f'{group}:{p}:{n}': np.asarray(v)
                    for p, s in state.items() for n, v in s.items()}
    self.done[group] = done
    os.makedirs(os.path.dirname(self.path), exist_ok=True)
    safetensors.numpy.save_file(
        self.arrays, f'{self.path}.part',
        dict(about=json.dumps({**self.about, 'done': self.done})))
    os.replace(f'{self.path}.part', self.path)


# ---------------------------------------------------------- methods of a run
def of_run(methods, config, case, params, sites, marks, folder='', key=None):
  """Methods as the data of a run make them, and the statistics they start from.

  Args:
    methods: Tuple of methods.
    config: The run's config; `calibrate`, and what batches are made from.
    case: Its `case.Case`.
    params: The base's params, on the devices.
    sites: What `describe` returned.
    marks: Fingerprint of the base.
    folder: Of the run; what was collected is kept there.
    key: As of `collect`.

  Returns:
    (methods, {method name: {path: stats}}).
  """
  named = as_methods(methods)
  if not any(m.calibration for m in named.values()):
    return methods, {}
  if jax.process_count() > 1:
    raise ValueError(
        f'{", ".join(n for n, m in named.items() if m.calibration)}: several '
        'processes cannot calibrate; train for 0 steps in one process first, '
        'and give the others its adapter by config.start')
  said, own = config.calibrate, config.copy_and_resolve_references()
  own.batch = said.batch or config.batch
  arrays = case.arrays['train']
  if said.name:
    own.data.update(name=said.name, path=said.path, train=0)
    own.data.splits.train = said.split
    arrays = case_lib.load(own, ('train',), case.classes,
                           read=lambda *a, **k: case.base).arrays['train']

  def batches():
    found, _ = case_lib.batches(own, arrays)
    return itertools.islice(found, said.batches)

  stats = {}
  for name, m in named.items():
    if m.calibration:
      stats[name] = collect(
          case.base.model, params, sites, case.task, batches, m.calibration, m,
          said.at_once, key,
          os.path.join(folder, 'calibration', name) if folder else '',
          marks=[marks, said.to_dict(), config.data.to_dict(), config.seed])
  return fitted(methods, stats, sites)


def fitted(methods, stats, sites):
  """Methods whose shapes follow from statistics, and the statistics for them.

  Args:
    methods: As given to `init`, those with a `fit` made by `load`.
    stats: {method name: {path: stats}}.
    sites: What `describe` returned.

  Returns:
    (tuple of methods, stats).
  """
  out, stats = [], dict(stats)
  for name, m in as_methods(methods).items():
    if m.fit:
      words, stats[name] = m.fit(stats[name], sites_lib.matched(m, sites))
      m = method_lib.load(**{**m.spec, **words})
    out.append(m)
  return tuple(out), stats


def stand_in(methods, sites):
  """Statistics of random inputs and gradients: the shapes, not the data.

  For plans and checks, which need theta but no calibration. The numbers depend
  on the shapes of a kernel alone. Returns {method name: {path: stats}}.
  """
  def one(reducer, site):
    d_in, d_out = site.params['kernel'].shape
    key = jax.random.key(d_in)
    if reducer.of == 'inputs':
      n = 2 * d_in
      value, keep = jax.random.normal(key, (n, d_in)), jnp.ones(n, bool)
      value *= jnp.linspace(0.5, 2, d_in)
    else:
      value, keep = jax.random.normal(key, (d_in, d_out)), None
    stats = reducer.finish(reducer.update(reducer.init(site), value, keep))
    return jax.tree.map(
        lambda v: jnp.broadcast_to(v, (*site.stack, *v.shape)), stats)

  return {name: {path: one(m.calibration, site) for path, site in
                 sites_lib.matched(m, sites).items()}
          for name, m in as_methods(methods).items() if m.calibration}
