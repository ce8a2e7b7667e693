"""Two small models that the tests of the rotations share."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax


class Mlp(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(6, name='down')(jnp.tanh(nn.Dense(24, name='up')(x)))


class Mixed(nn.Module):
  """A convolution and DenseGeneral layers, whose kernels are not matrices."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (2, 2), name='conv')(x).reshape(x.shape[0], -1, 8)
    return nn.MultiHeadDotProductAttention(num_heads=2, name='attn')(x, x)


def case(model, shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  params = noise(jax.tree.map(lambda v: np.zeros(v.shape), shapes), 0.3)
  return types.SimpleNamespace(
      model=model, x=x, params=params, sites=peftjax.describe(model, x))


def noise(tree, scale, seed=2):
  """The tree with normal noise added to every leaf."""
  leaves, treedef = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  return treedef.unflatten(
      [(v + scale * rng.normal(size=v.shape)).astype(np.float32)
       for v in leaves])


@pytest.fixture(scope='session')
def mlp():
  return case(Mlp(), (5, 16))


@pytest.fixture(scope='session')
def mixed():
  return case(Mixed(), (2, 3, 3, 4))


@pytest.fixture(scope='session')
def randomised():
  """(method, case) -> theta away from its initial value."""
  def make(method, case, scale=0.3, seed=3):
    shapes = jax.eval_shape(lambda params: peftjax.init(
        method, jax.random.key(0), case.sites, params), case.params)
    neutral = lambda leaf, v: np.full(v.shape, float(leaf == 's'))
    return noise({name: {path: {n: neutral(n, v) for n, v in t.items()}
                         for path, t in by_path.items()}
                  for name, by_path in shapes.items()}, scale, seed)
  return make


@pytest.fixture(scope='session')
def adapted():
  """(method, case, theta, train, rng) -> output of the adapted model."""
  def run(method, case, theta, train=False, rng=None):
    return jax.jit(lambda params, theta: peftjax.apply(
        case.model, method, params, theta, case.x, train=train, rng=rng)[0])(
            case.params, theta)
  return run


@pytest.fixture(scope='session')
def folded():
  """(method, case, theta) -> plain params, output of the plain model."""
  def run(method, case, theta):
    @jax.jit
    def both(params, theta):
      plain = peftjax.fold(method, params, theta, case.sites)
      return plain, case.model.apply({'params': plain}, case.x)
    return both(case.params, theta)
  return run


@pytest.fixture(scope='session')
def loss_and_gradient():
  """(method, case, theta) -> (sum of squares, output), its gradient."""
  def run(method, case, theta):
    @jax.jit
    def both(theta, params):
      def loss(theta):
        y, _ = peftjax.apply(case.model, method, params, theta, case.x)
        return (y**2).sum(), y
      return jax.value_and_grad(loss, has_aux=True)(theta)
    return both(theta, case.params)
  return run


@pytest.fixture(scope='session')
def peft_mlp(mlp):
  """config -> the same perceptron under Hugging Face PEFT, {site: layer}."""
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')

  def make(config):
    layers = []
    for name in ('up', 'down'):
      kernel, bias = (np.asarray(mlp.params[name][n])
                      for n in ('kernel', 'bias'))
      layer = torch.nn.Linear(*kernel.shape)
      layer.weight.data = torch.tensor(kernel.T)
      layer.bias.data = torch.tensor(bias)
      layers.append(layer)
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
    model = peft.get_peft_model(model, config)
    return model, dict(up=model.base_model.model[0],
                       down=model.base_model.model[2])

  return make
