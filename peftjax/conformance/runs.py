"""Runs: one method on one small model, and everything that checks read of it.

A `Subject` is a method, or one phase of it; a `Run` is a subject in one of four
forms of the same small model, plain, scanned, rematerialised, both. Parameters
and theta are the same numbers in all forms. Compiling is what takes time, so
every value is computed once, when a check first asks for it.
"""

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax import calibrate
from peftjax import folding
from peftjax import method as method_lib
from peftjax import theta as theta_lib
from peftjax import trees
from peftjax.apply import apply
from peftjax.conformance import models

FORMS = ('plain', 'scan', 'remat', 'scan_remat')
STEPS = 3


@functools.cache
def gradient_of(model):
  """(params, x, y) -> ((error, out), gradients of params and x), unadapted."""
  def loss(params, x, y):
    out = model.apply({'params': params}, x)
    return error(out, y), out

  return models.jit(differentiated(loss))


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
def noisy(methods, theta, seed=''):
  """Theta with noise on every trained leaf, so that none is trivially zero."""
  trained, frozen = theta_lib.partition(methods, theta)
  shift = lambda path, v: v + 0.1 * models.noise(
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


class Subject:
  """One method, or one phase of it, and its runs.

  Attributes:
    make: The factory, or `load` of its name.
    factory: The factory itself, to read its signature and docstring.
    example: Its small hyper-parameters.
    method: What is tested.
    phase: 0, or which of the method's phases it is.
    kind: Of the model that it is run on, as in `models.model_for`.
  """

  def __init__(self, make, example, phase=0):
    self.make, self.example, self.phase = make, dict(example), phase
    self.factory = make
    if isinstance(make, functools.partial):  # load, with a name
      self.factory = method_lib.factory(*make.args)
    first = make(**self.example)
    self.method = (first, *(p.method for p in first.phases))[phase]
    self.kind = models.kind_for(self.method)
    self.first, self.starts = first, [p.start for p in first.phases[:phase]]
    self.run = functools.cache(functools.partial(Run, self))

  @functools.cache
  def setting(self, scan):
    """(sites, params, theta) of the scanned or the unrolled model."""
    key = jax.random.key(0)
    sites, params = models.base_of(self.kind, scan)
    theta = models.jit(lambda p: theta_lib.init(
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
    self.model, self.x, self.y = models.model_for(
        subject.kind, self.scan, 'remat' in form)
    self.sites, self.params, self.start = subject.setting(self.scan)
    self.theta = subject.theta(self.scan)

  def loss(self, methods, trained, x, frozen, params, y, **kwargs):
    theta = theta_lib.combine(trained, frozen)
    out, aux = apply(self.model, methods, params, theta, x, **kwargs)
    return error(out, y) + theta_lib.penalty(methods, theta, aux, 0), out

  def applied(self, methods):
    """theta -> Value of the adapted model."""
    fn = models.jit(differentiated(functools.partial(self.loss, methods)))

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
    @models.jit
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
    return models.jit(step, out_shardings=sharding), start

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
    return models.int8_of(self.subject.kind, self.scan)

  @property
  def devices(self):
    return max(n for n in (1, 2, 4, 8) if n <= jax.device_count())

  @functools.cached_property
  def trained(self):
    return self.train(self.devices)
