"""Checks: what must hold for every method.

A check is a function of a `Run`. It raises AssertionError with figures where a
method fails, and Skip with the reason where it does not apply.
"""

import functools
import math
import os
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftjax import artifact
from peftjax import calibrate
from peftjax import folding
from peftjax import method as method_lib
from peftjax import sites as sites_lib
from peftjax import theta as theta_lib
from peftjax import trees
from peftjax.apply import apply
from peftjax.conformance import factories
from peftjax.conformance import models
from peftjax.conformance import runs

EXACT = 2e-6  # of the largest output: rounding, where exactness is claimed
CLOSE = 1e-5  # of a leaf's largest entry: two routes to the same numbers
DEAD = 1e-7  # of the largest gradient: rounding, where a gradient is zero
BFLOAT16 = 0.05  # of the outputs' norm


# ----------------------------------------------------------------- helpers
def _leaves(*trees_):
  """The trees as {path: array}; raises unless they have the same paths."""
  flat = [{jax.tree_util.keystr(p): np.asarray(v)
           for p, v in jax.tree_util.tree_flatten_with_path(tree)[0]}
          for tree in trees_]
  for other in flat[1:]:
    assert set(other) == set(flat[0]), (
        f'{sorted(set(other) ^ set(flat[0]))} on one side only')
  return flat


def _close(got, want, what, tolerance=CLOSE):
  """Raises unless two trees agree, each leaf relative to its largest entry."""
  got, want = _leaves(got, want)
  for path, w in want.items():
    far = np.abs(got[path].astype(float) - w).max(initial=0)
    top = np.abs(w).max(initial=0)
    assert far <= tolerance * top, (
        f'{what}{path}: {far:.2g} apart, {tolerance:g} of {top:.2g} is allowed')


def _same(got, want, what):
  """Raises unless two trees are the same to the bit."""
  got, want = _leaves(got, want)
  for path, w in want.items():
    g = got[path]
    assert (g.dtype, g.shape) == (w.dtype, w.shape), (
        f'{what}{path}: {g.dtype}{g.shape}, expected {w.dtype}{w.shape}')
    assert g.tobytes() == w.tobytes(), (
        f'{what}{path}: {np.count_nonzero(g != w)} of {w.size} entries differ')


def _alive(grads, what, like=None):
  """Raises unless every leaf has a gradient in one of the trees.

  With `like`, only leaves that have one in that tree: a sparse support that was
  padded to its stack's size may leave a layer with nothing else.
  """
  flat = _leaves(*grads)
  known = _leaves(like)[0] if like is not None else flat[0]
  top = max((np.abs(v).max(initial=0) for f in flat for v in f.values()),
            default=0)
  for path in flat[0]:
    if like is not None and not known[path].any():
      continue
    size = np.max([np.abs(f[path]) for f in flat], axis=0)
    assert size.max(initial=0) > DEAD * top, (
        f'{what}{path}: no gradient ({size.max(initial=0):.2g}, where the '
        f'largest of all is {top:.2g})')


def _trains(run):
  trained, _ = theta_lib.partition(run.method, run.start)
  if not jax.tree.leaves(trained):
    raise factories.Skip('trains nothing')


def _folds(run):
  """Skips methods without a fold, which must say so."""
  if run.method.fold or run.method.replaces:
    return
  try:
    folding.fold(run.method, run.params, run.theta, run.sites)
  except ValueError:
    raise factories.Skip('changes activations: refuses to fold') from None
  raise AssertionError('has no fold, yet fold() does not refuse')


# ------------------------------------------------- values, in all four forms
def identity_at_init(run):
  """The adapted model starts as the base, or within what the card declares."""
  base = np.asarray(run.base)
  far = np.abs(run.value(None).out - base).max()
  rounding, tolerance = EXACT * np.abs(base).max(), run.method.tolerance
  assert np.isfinite(far), 'the output is not finite'
  if math.isinf(tolerance):
    assert far > rounding, (
        'declares that it does not start as the base, but does: tolerance=0')
  else:
    assert far <= tolerance + rounding, (
        f'{far:.3g} from the base, declared are {tolerance:g}')


def layer_equals_fold(run):
  """The layer view and the folded weights: same output, same gradients."""
  _folds(run)
  got = run.value('')
  want, _ = run.fold(run.theta)
  assert np.abs(want.out - run.base).max() > 0, 'the moved theta does nothing'
  _close(got.out, want.out, 'output')
  _close(got.grad, want.grad, 'gradient ')
  _close(got.grad_x, want.grad_x, 'gradient of the input')


def gradient_alive(run):
  """Every trained leaf has a gradient within two steps."""
  _trains(run)
  _alive(run.trained.grads[:2], '')


def rest_is_frozen(run):
  """Training with decay and clipping moves nothing that is not trained."""
  before = jax.tree.map(np.array, run.params)
  trained, frozen = theta_lib.partition(run.method, run.trained.theta)
  _same(frozen, run.trained.frozen, 'frozen theta ')
  _same(run.params, before, 'base ')
  for path, v in _leaves(trained)[0].items():
    assert np.isfinite(v).all(), f'{path} is not finite after training'
  if not (run.method.fold or run.method.replaces):
    return
  base = trees.flatten(before)
  changed = lambda theta: {
      p: np.asarray(v) != base[p]
      for p, v in trees.flatten(run.fold(theta)[1]).items()}
  may = changed(runs.noisy(run.method, run.start, 'support'))
  did = changed(run.trained.theta)
  mine = {f'{folding.views_lib.split_path(p)[0]}/{v.leaf}'
          for p, s in sites_lib.matched(run.method, run.sites).items()
          for v in s.leaves.values()}
  for path, where in did.items():
    assert path in mine or not where.any(), f'{path} is no site, but changed'
    outside = where & ~may[path]
    assert not outside.any(), (
        f'{path}: {outside.sum()} entries outside the support changed')


def count_as_declared(run):
  """Trained numbers are what the method's count says, layer by layer."""
  if run.method.count is None:
    if run.subject.phase:
      raise factories.Skip('a later phase: its size depends on the data')
    raise AssertionError('has no count: give Method(count=lambda site: ...)')
  trained, _ = theta_lib.partition(run.method, run.start)
  for path, t in trained[run.method.name].items():
    if path == method_lib.SHARED:
      continue
    site = run.sites[path]
    want = run.method.count(site) * math.prod(site.stack)
    assert trees.count(t) == want, (
        f'{path} trains {trees.count(t)} numbers, count says {want}')


def scanned_equals_unrolled(run):
  """Stacked layers give what the same layers give one by one."""
  one = run.subject.run(run.form.replace('scan_', '').replace('scan', 'plain'))
  got, want = run.value(''), one.value('')
  _close(got.out, want.out, 'output')
  _close(runs.unstack(got.grad), want.grad, 'gradient ')
  _close(got.grad_x, want.grad_x, 'gradient of the input')


def rematerialised_equals_stored(run):
  """Recomputing activations in the backward pass changes no number."""
  form = 'scan' if run.scan else 'plain'
  got, want = run.value(''), run.subject.run(form).value('')
  _close(got.out, want.out, 'output')
  _close(got.grad, want.grad, 'gradient ')
  _close(got.grad_x, want.grad_x, 'gradient of the input')


def traced_once(run):
  """A second step, on what the first one returned, is not traced again."""
  assert run.trained.traces == 1, (
      f'{run.trained.traces} traces: after_step changes a dtype or shape, or '
      'init makes weakly typed arrays (jnp.full(n, 1.0): give a dtype)')


def bfloat16(run):
  """Computed in bfloat16: finite, close to float32, each layer's own dtype.

  Scanned models also store their base in bfloat16; theta stays float32.
  """
  model = run.model.clone(dtype=jnp.bfloat16)
  params = jax.tree.map(
      lambda v: v.astype(jnp.bfloat16 if run.scan else v.dtype), run.params)
  want = _layer_dtypes(lambda p: model.apply({'params': p}, run.x), params)
  fn = lambda p, t: apply(model, run.method, p, t, run.x)[0]
  for path, dtype in _layer_dtypes(fn, params, run.theta).items():
    assert dtype == want[path], f'{path} gives {dtype}, the base {want[path]}'
  got = np.asarray(models.jit(fn)(params, run.theta), np.float32)
  want = run.value('').out
  assert np.isfinite(got).all(), 'the output is not finite'
  far = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert far <= BFLOAT16, f'{far:.3g} from float32, allowed are {BFLOAT16}'


def _layer_dtypes(fn, *args):
  """{path: dtype} of what every layer with parameters puts out."""
  found = {}

  def record(f, args, kwargs, context):
    y = f(*args, **kwargs)
    if context.method_name == '__call__' and hasattr(y, 'dtype'):
      found['/'.join(context.module.path) or 'the model'] = y.dtype
    return y

  with nn.intercept_methods(record):
    jax.eval_shape(fn, *args)
  return found


def restored_to_the_bit(run):
  """What is saved and loaded again is the same method and the same theta."""
  with tempfile.TemporaryDirectory() as folder:
    save = functools.partial(
        artifact.save_adapter, os.path.join(folder, 'adapter'), run.method,
        run.theta, run.sites, run.params)
    if run.method.spec is None:
      factories.raises(save, ['load'], 'saving a method that load did not make')
      raise factories.Skip('not under peftjax/methods: save_adapter refuses it')
    save()
    back = artifact.load_adapter(
        os.path.join(folder, 'adapter'), run.sites, run.params)
  _same(back.theta, run.theta, 'theta ')
  made, = back.methods
  for name in ('name', 'frozen', 'drops', 'replaces', 'on', 'tolerance'):
    assert getattr(made, name) == getattr(run.method, name), name


def vmap_equals_loop(run):
  """Many thetas at once give what they give one by one."""
  many = jax.tree.map(
      lambda *v: jnp.stack(v), run.theta, run.subject.theta(run.scan, 'second'))
  out = models.jit(jax.vmap(
      lambda p, t: apply(run.model, run.method, p, t, run.x)[0], (None, 0)))(
          run.params, many)
  _close(out[0], run.value('').out, 'first')
  _close(out[1], run.value('second').out, 'second')


def lowers_for_tpu(run):
  """A training step lowers for TPU; no TPU is needed."""
  text = run.trained.traced.lower(lowering_platforms=('tpu',)).as_text()
  assert 'module' in text


def devices_agree(run):
  """The batch split over all devices gives the gradients of one device."""
  if run.devices == 1:
    raise factories.Skip('one device; on a CPU, set XLA_FLAGS='
               '--xla_force_host_platform_device_count=8')
  got, want = run.trained.moved, run.value('').grad
  try:
    _close(got, want, '')
  except AssertionError:  # random while training: ask one device itself
    _close(got, run.train(1).moved, '')


def quantised_base(run):
  """Works on an int8 base as well, or refuses clearly."""
  refusal = on_int8(run)
  if refusal:
    raise factories.Skip(f'refuses: {refusal}')


def on_int8(run):
  """'' where the method composes with an int8 base, else why it refuses."""
  _trains(run)
  int8, q = run.int8
  for methods in ((int8, run.method), (run.method, int8)):
    try:
      jax.eval_shape(lambda p, m=methods: theta_lib.init(
          m, jax.random.key(0), run.sites, p,
          calibrate.stand_in(m, run.sites)), run.params)
      break
    except ValueError as e:
      refusal = str(e)
  else:
    return refusal
  theta = {**q, **run.theta}
  theta = {m.name: theta[m.name] for m in methods}
  got = run.applied(methods)(theta)
  _alive([got.grad], 'on int8: ', like=run.value('').grad)
  assert np.abs(got.out - run.value('').out).max() > 0, 'int8 does nothing'
  if run.method.fold or run.method.replaces:
    want, _ = run.folded(methods)(theta)
    _close(got.out, want.out, 'on int8, layer and fold: output')
    _close(got.grad, want.grad, 'on int8, layer and fold: gradient ')
  return ''


CHECKS = (
    count_as_declared, identity_at_init, layer_equals_fold, gradient_alive,
    rest_is_frozen, scanned_equals_unrolled, rematerialised_equals_stored,
    traced_once, bfloat16, restored_to_the_bit, vmap_equals_loop,
    lowers_for_tpu, devices_agree, quantised_base)
