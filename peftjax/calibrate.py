"""Calibration: statistics of the base at the sites of methods, over batches.

A method that starts from data says what it wants to know of a site by a
`Reducer`. `collect` runs the base on batches and puts it together:

  of 'inputs'     what the layer reads: rows x [n, d_in] and keep [n], which
                  rows are no padding, and have a label if that is asked for
  of 'gradient'   the gradient of a batch's loss in the kernel, [d_in, d_out]
  of 'examples'   the same of every example of a batch, one after another

Inputs are met by an interceptor (taps.py), as methods meet them: scanned and
rematerialised models, fused kernels and DenseGeneral need nothing of their own.
The states of a scanned layer are stacked as its kernels are. All is float32,
whatever the model computes in.

A new head is all zeros and lets no gradient through to the layers below: in
training, gradients are those after a first step of AdamW on such a head.
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
from peftjax import config as config_lib
from peftjax import method as method_lib
from peftjax import sites as sites_lib
from peftjax import taps
from peftjax import trees
from peftjax.folding import over_stack
from peftjax.method import as_methods, Method, nearest
from peftjax.ops import statistics
from peftjax.ops.statistics import Reducer

KINDS = ('inputs', 'gradient', 'examples')
FILE = 'calibration.{}.safetensors'  # of a group of layers
HEAD_STEP = 1e-3  # learning rate that new heads take a first step with
WHOLE = -1  # in the place of the number of a last batch
NO_BATCHES = 'calibration: there are no batches'


def collect(model, params, sites, task, batches, reducer, method, at_once=0,
            key=None, folder='', every=16, marks=None):
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
    marks: What the batches and the base are, {name: JSON value}; what was
      collected on others is not gone on with.

  Returns:
    {path: stats} on the host, with the axes of `site.stack` first.

  Raises:
    ValueError: sites that cannot be calibrated, no batches, a file of another
      collection, NaN in what was collected, gradients that are all 0.
  """
  if reducer.of not in KINDS:
    raise ValueError(f'reducer of {reducer.of!r}{nearest(reducer.of, KINDS)}')
  if not isinstance(method, Method):
    method = Method('calibrate', method, None)
  chosen = sites_lib.matched(method, sites)
  _check(chosen, reducer.of)
  key = jax.random.key(0) if key is None else key
  owner = {p: p for p in chosen}
  if reducer.of == 'inputs':
    first = next(iter(batches()), None)
    if first is None:
      raise ValueError(NO_BATCHES)
    owner = taps.owners(model, params, chosen, task, first, reducer.train)
  mine = sorted(set(owner.values()))
  size = at_once or len(mine)
  groups = [mine[i:i + size] for i in range(0, len(mine), size)]
  about = dict(marks or {}, reducer=reducer.name, of=reducer.of, sites=mine,
               labelled=reducer.labelled, at_once=at_once)
  found = {}
  for i, paths in enumerate(groups):
    part = {p: chosen[p] for p in paths}
    state = _reduce(model, params, task, batches, reducer, part, key,
                    _Saved(folder, i, about), every)
    # On the host, one by one: together they may be as large as the base.
    stats = {p: jax.device_get(over_stack(reducer.finish, part[p].stack)(s))
             for p, s in state.items()}
    _refuse(stats, lambda v: ~np.isfinite(v))
    found |= stats
  sums = [v for s in found.values() for v in s.values() if v.ndim > 1]
  if reducer.of != 'inputs' and sums and not any(map(np.any, sums)):
    raise ValueError('calibration: all gradients are 0: something after the '
                     'layers is all zeros, such as a new head')
  return {p: found[owner[p]] for p in chosen}


def _reduce(model, params, task, batches, reducer, part, key, saved, every):
  """{path: state} of a group of layers after all batches."""
  state = taps.empty(reducer, part)
  for p, s in state.items():
    for n, v in s.items():
      if v.dtype != jnp.float32:
        raise ValueError(f'reducer {reducer.name!r}: the state {n!r} of {p!r} '
                         f'is {v.dtype}; expected float32')
  state, done = saved.get(state)
  if done == WHOLE:
    return state
  step = jax.jit(taps.adding(model, task, reducer, part), donate_argnums=0)
  count = done
  for count, batch in enumerate(batches(), 1):
    if count <= done:
      continue
    state = step(state, params, batch, jax.random.fold_in(key, count))
    if reducer.done and all(np.all(over_stack(reducer.done, part[p].stack)(s))
                            for p, s in state.items()):
      break
    saved.put(state, count, every)
  if not count:
    raise ValueError(NO_BATCHES)
  saved.put(state, WHOLE, every)
  return state


def _refuse(found, wrong=np.isnan):
  """Raises where a number of {path: {name: array}} is wrong."""
  for path, arrays in found.items():
    for n, v in arrays.items():
      if wrong(np.asarray(v)).any():
        raise ValueError(f'calibration: {n!r} of {path!r} is not finite; look '
                         'for NaN in the data and the base')


def readable(site):
  """Kernels [d_in, d_out] that multiply what their layer reads; no head.

  The sites, by default, of methods that start from data.
  """
  return _multiplies(site) and site.role != 'head'


def _multiplies(site):
  return _matrix(site) and site.kind not in ('Embed', 'Conv', 'ConvTranspose')


def _matrix(site):
  return 'kernel' in site.params and len(site.params['kernel'].shape) == 2


def _check(chosen, of):
  fits, kinds = _matrix, 'any layer that has one'
  if of == 'inputs':
    fits, kinds = _multiplies, 'a Dense, DenseGeneral or Einsum'
  for path, site in chosen.items():
    if not fits(site):
      raise ValueError(
          f'{path!r} ({site.kind}) cannot be calibrated: expected a kernel '
          f'[d_in, d_out] of {kinds}; leave it out of the sites, as by '
          "select(exclude='...')")


class _Saved:
  """States of one group of layers on disk; nothing with NaN is written."""

  def __init__(self, folder, group, about):
    self.path = os.path.join(folder, FILE.format(group)) if folder else ''
    self.about = json.loads(json.dumps(about))

  def get(self, like):
    """(state, number of its last batch); WHOLE: there are no more."""
    if not self.path or not os.path.exists(self.path):
      return like, 0
    try:
      with safetensors.safe_open(self.path, 'numpy') as f:
        meta = json.loads(f.metadata()['about'])
        done = int(meta.pop('done'))
        arrays = {n: f.get_tensor(n) for n in f.keys()}
    except (safetensors.SafetensorError, AttributeError, KeyError, TypeError,
            ValueError) as e:
      raise ValueError(f'{self.path} is damaged: {e}; delete it, and it is '
                       'collected anew') from e
    for k, v in self.about.items():
      if meta.get(k) != v:
        raise ValueError(
            f'{self.path} was collected with {k}={meta.get(k)!r}, expected '
            f'{v!r}; delete it, or choose another folder')
    out = {p: {n: jnp.asarray(arrays.get(f'{p}:{n}', ())) for n in s}
           for p, s in like.items()}
    for p, s in like.items():
      for n, v in s.items():
        if out[p][n].shape != v.shape:
          raise ValueError(
              f'{self.path} has {n!r} of {p!r} in the shape '
              f'{out[p][n].shape}, expected {v.shape}; delete it')
    return out, done

  def put(self, state, done, every):
    """Writes what there is, every so many batches and at the end."""
    if not self.path or done != WHOLE and done % every:
      return
    state = jax.device_get(state)
    _refuse(state)
    os.makedirs(os.path.dirname(self.path), exist_ok=True)
    safetensors.numpy.save_file(
        {f'{p}:{n}': v for p, s in state.items() for n, v in s.items()},
        f'{self.path}.part',
        dict(about=json.dumps({**self.about, 'done': done})))
    os.replace(f'{self.path}.part', self.path)


# ---------------------------------------------------------- methods of a run
def of_run(methods, config, case, params, sites, fingerprint, folder='',
           key=None):
  """Methods as the data of a run make them, and the statistics they start from.

  Args:
    methods: Tuple of methods.
    config: The run's config; `calibrate`, and what batches are made from.
    case: Its `case.Case`.
    params: The base's params, on the devices.
    sites: What `describe` returned.
    fingerprint: Of the base.
    folder: Of the run; what was collected is kept there.
    key: As of `collect`.

  Returns:
    (methods, {method name: {path: stats}}).
  """
  named = as_methods(methods)
  starting = [n for n, m in named.items() if m.calibration]
  if not starting:
    return methods, {}
  if config.start:  # what it started from is in its theta: shapes will do
    shapes = jax.eval_shape(lambda: stand_in(methods, sites))
    return methods, jax.tree.map(
        lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), shapes)
  if jax.process_count() > 1:
    raise ValueError(
        f'{", ".join(starting)}: several processes cannot calibrate; train for '
        '0 steps in one process first, and give them its adapter by '
        'config.start')
  said, own = config.calibrate, config.copy_and_resolve_references()
  own.batch = said.batch or config.batch
  arrays = case.arrays['train']
  if said.name or said.path or said.options or said.split != 'train':
    if said.name:
      own.data.name, own.data.path, own.data.options = said.name, '', {}
    own.data.update(train=0, path=said.path or own.data.path)
    own.data.options.update(said.options)
    own.data.splits.train, own.task.metric = said.split, ''
    arrays = case_lib.load(own, ('train',), case.classes,
                           read=lambda *a, **k: case.base).arrays['train']
  full = config_lib.to_json(config)
  marks = {k: full[k] for k in (
      'calibrate', 'data', 'task', 'loss', 'batch', 'seed', 'dtype')}
  smoothing = config.loss.label_smoothing or None  # as in a step of training
  task = case.task._replace(
      loss=lambda out, batch, _: case.task.loss(out, batch, smoothing))

  def batches():
    found, _ = case_lib.batches(own, arrays)
    return itertools.islice(found, said.batches)

  def found(params, reducer, method, name):
    return collect(
        case.base.model, params, sites, task, batches, reducer, method,
        said.at_once, key,
        os.path.join(folder, 'calibration', name) if folder else '',
        marks=dict(marks, base=fingerprint))

  if any(named[n].calibration.of != 'inputs' for n in starting):
    params = _after_first_step_of_head(found, params, sites)
  stats = {n: found(params, named[n].calibration, named[n], n)
           for n in starting}
  return fitted(methods, stats, sites)


def _after_first_step_of_head(found, params, sites):
  """Params whose heads of zeros are as a first step of AdamW leaves them.

  A new head is all zeros, and lets no gradient through to the layers below.
  """
  flat = dict(trees.flatten(params))
  leaves = {p: f'{p}/{s.leaves["kernel"].leaf}'.lstrip('/')
            for p, s in sites.items() if s.role == 'head' and _matrix(s)}
  leaves = {p: leaf for p, leaf in leaves.items() if not np.any(flat[leaf])}
  if not leaves:
    return params
  stats = found(params, statistics.mean_gradient(),
                lambda site: site.path in leaves, 'head')
  for p, leaf in leaves.items():
    new = -HEAD_STEP * jnp.sign(stats[p]['gradient'])
    flat[leaf] = sites[p].leaves['kernel'].put(flat[leaf], new).astype(
        flat[leaf].dtype)
  return trees.refill(params, flat)


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
