"""Runs: one method on one small model, and everything that checks read of it.

A `Subject` is a method, or one phase of it; a `Run` is a subject in one of four
forms of the same small model, plain, scanned, rematerialised, both. Parameters
and theta are the same numbers in all forms. Compiling is what takes time, so
every value is computed once, when a check first asks for it.
"""

import functools
import importlib
import math
from typing import Any, NamedTuple
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax import calibrate
from peftjax import folding
from peftjax import method as method_lib
from peftjax import sites as sites_lib
from peftjax import theta as theta_lib
from peftjax import trees
from peftjax.apply import apply
from peftjax.models import decoder
from peftjax.models import vit

FORMS = ('plain', 'scan', 'remat', 'scan_remat')
DEPTH, BATCH, STEPS = 2, 8, 3


# ------------------------------------------------------------------ models
def _attend(query, key, value, **unused):
  """Attention with a sigmoid for scores, [..., T, H, hd] each.

  Under softmax the gradient of a key's bias is zero in exact arithmetic, and
  no test could tell it from a dead parameter.
  """
  del unused
  scores = nn.sigmoid(jnp.einsum('...qhd,...khd->...hqk', query, key))
  return jnp.einsum('...hqk,...khd->...qhd', scores, value) / key.shape[-3]


class Block(nn.Module):
  """Pre-norm transformer block of Flax's own layers."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, _=None):
    h = nn.LayerNorm(dtype=self.dtype, name='norm1')(x)
    x += nn.MultiHeadDotProductAttention(
        2, dtype=self.dtype, attention_fn=_attend, name='attn')(h, h)
    h = nn.LayerNorm(dtype=self.dtype, name='norm2')(x)
    h = nn.gelu(nn.Dense(16, dtype=self.dtype, name='up')(h))
    return x + nn.Dense(8, dtype=self.dtype, name='down')(h), None


class Tiny(nn.Module):
  """Convolution, table, blocks, norm, head: [B, 4, 4, 2] -> [B, 3]."""

  scan: bool = False
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images):
    x = nn.Conv(8, (2, 2), (2, 2), dtype=self.dtype, name='stem')(images)
    x = x.reshape(x.shape[0], -1, 8)
    ids = jnp.arange(x.shape[1])  # images have no other
    x += nn.Embed(8, 8, dtype=self.dtype, name='embed')(ids)
    block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
    if self.scan:
      x, _ = nn.scan(
          block, variable_axes={'params': 0, 'aux': 0},
          split_rngs={'params': True, 'dropout': True},
          length=DEPTH)(self.dtype, name='blocks')(x, None)
    else:
      for i in range(DEPTH):
        x, _ = block(self.dtype, name=f'block_{i}')(x)
    x = nn.LayerNorm(dtype=self.dtype, name='norm')(x)
    return nn.Dense(3, dtype=self.dtype, name='head')(x.mean(1))


def model_for(kind, scan, remat):
  """(model, inputs, labels).

  kind: 'layers', a model that knows nothing of this library; or a backbone with
    hook methods, of 'text' or 'images'.
  """
  rng = np.random.default_rng(0)
  images = rng.normal(size=(BATCH, 4, 4, 3)).astype(np.float32)
  labels = rng.normal(size=(BATCH, 3)).astype(np.float32)
  if kind == 'layers':
    return Tiny(scan, remat), images[..., :2], labels
  if kind == 'text':
    model = decoder.Decoder(
        vocab=11, width=8, depth=DEPTH, heads=2, kv_heads=1, mlp_dim=16,
        gated=False, position='learned', max_positions=16, head='classify',
        classes=3, scan=scan, remat=remat)
    return model, rng.integers(0, 11, (BATCH, 5)).astype(np.int32), labels
  model = vit.ViT(classes=3, width=8, depth=DEPTH, heads=2, mlp_dim=16, patch=2,
                  scan=scan, remat=remat)
  return model, images, labels


@functools.cache
def base_of(kind, scan):
  """(sites, params) of a model; the same numbers, stacked where scanned."""
  unrolled, x, _ = model_for(kind, False, False)
  shapes = jax.eval_shape(unrolled.init, jax.random.key(0), x)['params']
  params = _random(shapes)
  if scan:
    params = trees.stack(params)
  return sites_lib.describe(model_for(kind, scan, False)[0], x), params


@functools.cache
def int8_of(kind, scan):
  """(method, theta) of an int8 base."""
  method = method_lib.load('quantised.int8')
  sites, params = base_of(kind, scan)
  return method, jit(lambda p: theta_lib.init(
      method, jax.random.key(0), sites, p))(params)


@functools.cache
def gradient_of(model):
  """(params, x, y) -> ((error, out), gradients of params and x), unadapted."""
  def loss(params, x, y):
    out = model.apply({'params': params}, x)
    return error(out, y), out

  return jit(differentiated(loss))


def differentiated(loss):
  """`loss(first, x, ...)` with gradients of both; of token ids: {}."""
  def fn(first, x, *args):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jax.value_and_grad(loss, (0, 1), has_aux=True)(first, x, *args)
    value, grad = jax.value_and_grad(loss, has_aux=True)(first, x, *args)
    return value, (grad, {})

  return fn


def error(out, y):
  return jnp.square(out.astype(jnp.float32) - y).sum(-1).mean()


# ----------------------------------------------------------------- helpers
@functools.cache
def _options():
  """Compiler options that halve the time to compile tiny models on a CPU."""
  options = dict(xla_backend_optimization_level=0,
                 xla_llvm_disable_expensive_passes=True,
                 xla_cpu_use_fusion_emitters=False,
                 xla_cpu_parallel_codegen_split_count=1)
  if jax.default_backend() != 'cpu':
    return {}
  try:
    jax.jit(lambda: 0, compiler_options=options)()
  except jax.errors.JaxRuntimeError:  # not an option of this version
    return {}
  return options


def jit(fn, **kwargs):
  """jax.jit, for functions that are compiled once and hardly run."""
  return jax.jit(fn, compiler_options=_options(), **kwargs)


def _noise(path, shape):
  return np.random.default_rng(zlib.crc32(path.encode())).normal(
      size=shape).astype(np.float32)


def _random(shapes):
  """Parameters without zeros: kernels of unit gain, scales around 1."""
  def one(path, s):
    v = _noise(path, s.shape)
    if path.endswith('scale'):
      return 1 + 0.1 * v
    return v / math.sqrt(max(math.prod(s.shape[:-1]), 1))

  flat = trees.flatten(shapes)
  return trees.unflatten({p: jnp.asarray(one(p, s)) for p, s in flat.items()})


def noisy(methods, theta, seed=''):
  """Theta with noise on every trained leaf, so that none is trivially zero."""
  trained, frozen = theta_lib.partition(methods, theta)
  shift = lambda path, v: v + 0.1 * _noise(
      seed + jax.tree_util.keystr(path), v.shape)
  return theta_lib.combine(
      jax.tree_util.tree_map_with_path(shift, trained), frozen)


def unstack(theta):
  """Theta of a scanned model as that of the unrolled one."""
  out = {}
  for name, by_path in theta.items():
    flat = {f'{p}/{n}': v for p, t in by_path.items() for n, v in t.items()}
    out[name] = {}
    for key, v in trees.flatten(trees.unstack(trees.unflatten(flat))).items():
      path, _, leaf = key.rpartition('/')
      out[name].setdefault(path, {})[leaf] = v
  return out


# ------------------------------------------------------- subjects and runs
def named(name):
  """(factory, EXAMPLE) of a method under peftjax/methods."""
  module = importlib.import_module(f'peftjax.methods.{name}')
  return functools.partial(method_lib.load, name), module.EXAMPLE


def kind_for(method):
  """Which model a method is run on: a hook needs a backbone that calls it."""
  if method.on == '__call__':
    return 'layers'
  try:
    sites_lib.matched(method, base_of('text', False)[0])
  except ValueError:
    return 'images'
  return 'text'


class Subject:
  """One method, or one phase of it, and its runs.

  Attributes:
    make: The factory, or `load` of its name.
    factory: The factory itself, to read its signature and docstring.
    example: Its small hyper-parameters.
    method: What is tested.
    phase: 0, or which of the method's phases it is.
    kind: Of the model that it is run on, as in `model_for`.
  """

  def __init__(self, make, example, phase=0):
    self.make, self.example, self.phase = make, dict(example), phase
    self.factory = make
    if isinstance(make, functools.partial):  # load, with a name
      self.factory = method_lib.factory(*make.args)
    first = make(**self.example)
    self.method = (first, *(p.method for p in first.phases))[phase]
    self.kind = kind_for(self.method)
    self.first, self.starts = first, [p.start for p in first.phases[:phase]]
    self.run = functools.cache(functools.partial(Run, self))

  @functools.cache
  def setting(self, scan):
    """(sites, params, theta) of the scanned or the unrolled model."""
    key = jax.random.key(0)
    sites, params = base_of(self.kind, scan)
    theta = jit(lambda p: theta_lib.init(
        self.first, key, sites, p,
        calibrate.stand_in(self.first, sites)))(params)
    for start in self.starts:  # a phase starts from what the last one trained
      t = start(noisy(self.first, theta)[self.first.name], key, sites)
      theta = {self.method.name: t}
    return sites, params, theta

  @functools.cache
  def theta(self, scan, seed=''):
    """A theta that was moved; the same in all forms."""
    if not scan:
      return unstack(self.theta(True, seed))
    return noisy(self.method, self.setting(True)[2], seed)


class Value(NamedTuple):
  """What one function of (theta, x) gave."""

  out: Any  # [B, classes]
  grad: Any  # of the trained part of theta
  grad_x: Any


class Trained(NamedTuple):
  """What a few steps of training gave."""

  theta: Any
  grads: list  # of each step
  moved: Any  # gradient at the moved theta, in training mode
  traces: int
  frozen: Any  # before the first step
  traced: Any  # the step, to be lowered


class Run:
  """One subject in one form; everything is computed once, when asked for."""

  def __init__(self, subject, form):
    self.subject, self.form = subject, form
    self.method, self.scan = subject.method, 'scan' in form
    self.model, self.x, self.y = model_for(
        subject.kind, self.scan, 'remat' in form)
    self.sites, self.params, self.start = subject.setting(self.scan)
    self.theta = subject.theta(self.scan)

  def loss(self, methods, trained, x, frozen, params, y, **kwargs):
    theta = theta_lib.combine(trained, frozen)
    out, aux = apply(self.model, methods, params, theta, x, **kwargs)
    return error(out, y) + theta_lib.penalty(methods, theta, aux, 0), out

  def applied(self, methods):
    """theta -> Value of the adapted model."""
    fn = jit(differentiated(functools.partial(self.loss, methods)))

    def call(theta):
      trained, frozen = theta_lib.partition(methods, theta)
      (_, out), grads = fn(trained, self.x, frozen, self.params, self.y)
      return Value(*jax.device_get((out, *grads)))

    return call

  def folded(self, methods):
    """theta -> (Value of the base on folded params, the params).

    The base is compiled once for all methods; here only fold is, and the
    gradient passes through it by the chain rule.
    """
    @jit
    def fold(trained, frozen, params, cotangent):
      def fn(trained):
        theta = theta_lib.combine(trained, frozen)
        plain = folding.fold(methods, params, theta, self.sites)
        dot = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, plain, cotangent)))
        return dot + theta_lib.penalty(methods, theta, {}, 0), plain

      return jax.grad(fn, has_aux=True)(trained)

    def call(theta):
      trained, frozen = theta_lib.partition(methods, theta)
      _, plain = fold(trained, frozen, self.params, self.params)
      base = gradient_of(self.model)
      (_, out), (cotangent, grad_x) = base(plain, self.x, self.y)
      grad, _ = fold(trained, frozen, self.params, cotangent)
      return Value(*jax.device_get((out, grad, grad_x))), plain

    return call

  @functools.cached_property
  def fold(self):
    return self.folded(self.method)

  @functools.cached_property
  def base(self):
    """Output of the base alone."""
    (_, out), _ = gradient_of(self.model)(self.params, self.x, self.y)
    return np.asarray(out)

  @functools.cached_property
  def value(self):
    """Seed of a moved theta, or None for theta at init -> Value."""
    fn = self.applied(self.method)
    return functools.cache(lambda seed: fn(
        self.start if seed is None else self.subject.theta(self.scan, seed)))

  def step(self, traces, sharding=None):
    """A jitted training step with clipping and weight decay, and its start.

    Returns:
      (step, `theta -> state of the optimiser`).
    """
    tx = optax.chain(optax.clip_by_global_norm(0.5),
                     optax.adamw(1e-2, weight_decay=0.1))

    def step(params, theta, state, x, y, key):
      traces.append(1)
      trained, frozen = theta_lib.partition(self.method, theta)
      grads, _ = jax.grad(
          functools.partial(self.loss, self.method, train=True, rng=key),
          has_aux=True)(
                                trained, x, frozen, params, y)
      updates, state = tx.update(grads, state, trained)
      theta = theta_lib.combine(optax.apply_updates(trained, updates), frozen)
      return theta_lib.after_step(self.method, theta), state, grads

    start = lambda theta: tx.init(theta_lib.partition(self.method, theta)[0])
    return jit(step, out_shardings=sharding), start

  def train(self, devices):
    """STEPS steps on this many devices, the batch split over them."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ('data',))
    whole, split = (jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ('data',)))
    traces, grads = [], []
    step, start = self.step(traces, whole)
    params, theta, state = jax.device_put(
        (self.params, self.start, start(self.start)), whole)
    x, y = jax.device_put((self.x, self.y), split)
    _, frozen = jax.device_get(theta_lib.partition(self.method, theta))
    keys = jax.device_put(
        [jax.random.key(i) for i in range(STEPS)], whole)
    traced = step.trace(params, theta, state, x, y, keys[0])
    for key in keys:
      theta, state, g = step(params, theta, state, x, y, key)
      grads.append(jax.device_get(g))
    count = len(traces)
    # Its own state: a sparse support of another theta has other shapes.
    _, _, moved = step(
        params, *jax.device_put((self.theta, start(self.theta)), whole), x, y,
        keys[0])
    return Trained(jax.device_get(theta), grads, jax.device_get(moved), count,
                   frozen, traced)

  @property
  def int8(self):
    """(method, theta) of an int8 base."""
    return int8_of(self.subject.kind, self.scan)

  @property
  def devices(self):
    return max(n for n in (1, 2, 4, 8) if n <= jax.device_count())

  @functools.cached_property
  def trained(self):
    return self.train(self.devices)
