"""A small model of every kind of kernel, without its kernels, and noise."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
from peftjax import trees
import pytest


class Net(nn.Module):
  """A convolution, a DenseGeneral and Dense layers, one without a bias."""
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (2, 2), (2, 2), dtype=self.dtype, name='patch')(x)
    x = x.reshape(x.shape[0], -1, 6)
    x = nn.DenseGeneral((2, 4), dtype=self.dtype, name='split')(x)
    x = nn.DenseGeneral(8, (-2, -1), use_bias=False, dtype=self.dtype,
                        name='out')(x)
    return nn.Dense(3, dtype=self.dtype, name='head')(jnp.tanh(x).mean(1))


LINEAR = ('patch', 'split', 'out')


def noisy(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda v: jnp.asarray(
      v + rng.normal(0, 0.3, v.shape).astype(v.dtype)), tree)


def random_params(model, x):
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  return noisy(jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), shapes), 2)


@pytest.fixture(scope='session')
def net():
  """model, x, params, sites; bare: params without the kernels of `linear`."""
  model = Net()
  x = jnp.asarray(
      np.random.default_rng(1).normal(size=(2, 4, 4, 3)), jnp.float32)
  params, sites = random_params(model, x), pj.describe(model, x)
  bare = trees.unflatten({
      p: v for p, v in trees.flatten(params).items()
      if p not in {f'{n}/kernel' for n in LINEAR}})
  kernels = {n: np.asarray(
      sites[n].leaves['kernel'].get(params[n]['kernel'])) for n in LINEAR}

  def start(methods, params=params):
    return pj.init(methods, jax.random.key(0), sites, params)

  return types.SimpleNamespace(
      model=model, half=Net('bfloat16'), x=x, params=params, sites=sites,
      bare=bare, kernels=kernels, linear=LINEAR, noisy=noisy,
      random_params=random_params, start=start)
