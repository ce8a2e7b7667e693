"""Small models, the same in Hugging Face PEFT, and a comparison of the two."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax import calibrate
from peftjax.tasks.base import Task
import pytest


class Mlp(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(6, name='two')(jnp.tanh(nn.Dense(10, name='one')(x)))


class Image(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Conv(6, (3, 2), (2, 1), padding=((1, 1), (0, 0)), name='conv')(x)


class Words(nn.Module):

  @nn.compact
  def __call__(self, ids):
    return nn.Embed(9, 8, name='table')(ids)


def noise(tree, scale, seed):
  """The tree with normal noise added to every leaf."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda v: (v + scale * rng.normal(size=v.shape)).astype(np.float32), tree)


@pytest.fixture(scope='session')
def case():
  """Name -> model, x, params, sites and which of these are adapted."""
  draw = np.random.default_rng(0).normal
  known = dict(mlp=(Mlp(), draw(size=(4, 12)).astype(np.float32)),
               image=(Image(), draw(size=(2, 7, 5, 4)).astype(np.float32)),
               words=(Words(), np.array([[0, 3, 8], [3, 3, 1]])))

  def get(name):
    model, x = known[name]
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
    params = noise(jax.tree.map(lambda v: np.zeros(v.shape), shapes), 0.3, 1)
    return types.SimpleNamespace(
        model=model, x=x, params=params, sites=peftjax.describe(model, x),
        chosen=peftjax.select(path=r'one|two|conv|table'))

  return get


@pytest.fixture(scope='session')
def moved():
  """(method, case) -> theta away from its start; what is frozen stays."""
  def make(method, case, scale=0.3, start=None):
    if start is None:
      start = peftjax.init(method, jax.random.key(0), case.sites, case.params)
    trained, frozen = peftjax.partition(method, start)
    return peftjax.combine(noise(trained, scale, 2), frozen)
  return make


@pytest.fixture(scope='session')
def collected():
  """(method, case, inputs of batches) -> what the method starts from.

  The loss of a batch is the mean over its rows of sum(sin(y)).
  """
  def make(method, case, batches):
    def loss(out, batch, smoothing):
      del batch, smoothing
      return jnp.sin(out).reshape(len(out), -1).sum(-1), None

    task = Task('test', 'loss', lambda b: ((b['x'],), {}), loss, None, None)
    return {method.name: calibrate.collect(
        case.model, case.params, case.sites, task,
        lambda: iter([dict(x=x) for x in batches]), method.calibration, method)}
  return make


@pytest.fixture(scope='session')
def calibrated(collected):
  """(method, case, inputs of batches) -> method, theta and stats, as training
  makes them from these batches."""
  def make(method, case, batches):
    (method,), stats = calibrate.fitted(
        method, collected(method, case, batches), case.sites)
    theta = peftjax.init(
        method, jax.random.key(0), case.sites, case.params, stats)
    return types.SimpleNamespace(
        method=method, theta=theta, stats=stats[method.name])

  return make


def _weight(p):
  """A layer's kernel as torch keeps it."""
  if 'embedding' in p:
    return p['embedding']
  return np.transpose(p['kernel'], (3, 2, 0, 1) if p['kernel'].ndim == 4
                      else (1, 0))


@pytest.fixture(scope='session')
def twin():
  """(case, options of LoraConfig) -> the same model in PEFT.

  `parts` is {layer: {leaf: parameter}}; `put(theta of the method)` copies;
  `check(method, theta)` compares output, gradients and merged weights.
  """
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  tensor = lambda v: torch.from_numpy(np.array(v))

  def copy(parameter, value):
    with torch.no_grad():
      parameter.copy_(tensor(value).reshape(parameter.shape))

  def make(case, **options):
    net = torch.nn.Sequential()
    plain = dict(one=lambda: torch.nn.Linear(12, 10),
                 two=lambda: torch.nn.Linear(10, 6),
                 conv=lambda: torch.nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0)),
                 table=lambda: torch.nn.Embedding(9, 8))
    for name in case.params:
      net.add_module(name, plain[name]())
      copy(net.get_submodule(name).weight, _weight(case.params[name]))
      if 'bias' in case.params[name]:
        copy(net.get_submodule(name).bias, case.params[name]['bias'])
      if name == 'one':
        net.add_module('tanh', torch.nn.Tanh())
    model = peft.get_peft_model(
        net, peft.LoraConfig(target_modules=list(case.params), **options))
    layers = {n: model.base_model.model.get_submodule(n) for n in case.params}
    parts = {}
    for name, layer in layers.items():
      if name == 'table':
        found = dict(a=layer.lora_embedding_A, b=layer.lora_embedding_B)
      else:
        found = dict(a=layer.lora_A, b=layer.lora_B)
      found = {n: d['default'] for n, d in found.items()}
      if layer.lora_magnitude_vector:
        found['m'] = layer.lora_magnitude_vector['default']
      parts[name] = {n: getattr(d, 'weight', d) for n, d in found.items()}

    def matrix(parameter):  # [out, ...] -> [in, out], vectors flat
      v = parameter.detach().numpy()
      return v.ravel() if v.shape[0] == 1 or v.ndim == 1 else (
          v.reshape(v.shape[0], -1).T)

    def run(x):
      image = x.ndim == 4
      y = model(tensor(x.transpose(0, 3, 1, 2) if image else x))
      return y.permute(0, 2, 3, 1) if image else y

    def put(theta):
      for name, leaves in parts.items():
        for leaf, parameter in leaves.items():
          copy(parameter, theta[name][leaf].T)

    def check(method, theta):
      put(theta[method.name])

      @jax.jit
      def ours(theta):
        def loss(theta):
          y, _ = peftjax.apply(case.model, method, case.params, theta, case.x)
          return jnp.sin(y).sum(), y
        return jax.grad(loss, has_aux=True)(theta)

      grads, y = ours(theta)
      want = run(case.x)
      np.testing.assert_allclose(y, want.detach(), rtol=0, atol=1e-5)
      torch.sin(want).sum().backward()
      for name, leaves in parts.items():
        for leaf, parameter in leaves.items():
          g = matrix(parameter.grad)
          np.testing.assert_allclose(
              grads[method.name][name][leaf], g, rtol=0,
              atol=1e-4 * np.abs(g).max(), err_msg=f'{name}/{leaf}')
      folded = peftjax.fold(method, case.params, theta, case.sites)
      merged = model.merge_and_unload()
      for name in parts:
        np.testing.assert_allclose(
            _weight(folded[name]),
            merged.get_submodule(name).weight.detach(), rtol=0, atol=1e-5)

    return types.SimpleNamespace(
        model=model, layers=layers, parts=parts, matrix=matrix, put=put,
        check=check, run=run, tensor=tensor)

  return make
