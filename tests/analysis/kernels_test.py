"""Kernels as methods see them: layers of a stack, slices, convolutions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax import trees
from peftjax.analysis import kernels
import pytest


class Block(nn.Module):

  @nn.compact
  def __call__(self, x, _):
    q, _, v = jnp.split(nn.Dense(24, name='qkv')(x), 3, -1)
    return x + nn.DenseGeneral(8, (-2, -1), name='out')(
        (q * v).reshape(*x.shape[:-1], 2, 4)), None


class Net(nn.Module):

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 2), name='conv')(x).reshape(x.shape[0], -1, 8)
    x, _ = nn.scan(
        Block, variable_axes=dict(params=0), split_rngs=dict(params=True),
        length=3)(name='blocks')(x, None)
    return nn.Dense(5, name='head')(x)


@pytest.fixture(scope='module')
def net():
  model, x = Net(), np.ones((2, 4, 4, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda v: rng.normal(size=v.shape).astype(np.float32), shapes)
  return model, x, params, peftjax.describe(model, x)


def test_every_kernel_by_itself(net):
  _, _, params, sites = net
  found = dict(kernels.each(sites, params))
  assert list(found) == ['conv'] + [
      f'blocks/{name} (layer {i})' for name in (
          'qkv[0:8]', 'qkv[8:16]', 'qkv[16:24]', 'out') for i in range(3)]
  flat = trees.flatten(params)
  np.testing.assert_array_equal(
      found['blocks/qkv[8:16] (layer 2)'],
      flat['blocks/qkv/kernel'][2][:, 8:16])
  np.testing.assert_array_equal(found['blocks/out (layer 1)'],
                                flat['blocks/out/kernel'][1].reshape(8, 8))
  np.testing.assert_array_equal(
      found['conv'], flat['conv/kernel'].transpose(2, 0, 1, 3).reshape(18, 8))


def test_replaced_kernels_go_where_they_came_from(net):
  _, _, params, sites = net
  other = jax.tree.map(lambda v: v + 1, params)
  same = kernels.replace(lambda k, _: k, sites, params, other)
  jax.tree.map(np.testing.assert_array_equal, same, params)
  flat, got = trees.flatten(params), trees.flatten(
      kernels.replace(lambda k, o: k + 2 * o, sites, params, other))
  for path, value in flat.items():
    adapted = path.endswith('kernel') and not path.startswith('head')
    np.testing.assert_allclose(
        got[path], 3 * value + 2 if adapted else value, atol=2e-6)
  only = kernels.replace(lambda k: 0 * k, sites, params,
                         chosen=peftjax.select(path=r'8:16'))
  for i in range(3):
    k = only['blocks']['qkv']['kernel'][i]
    assert not k[:, 8:16].any() and k[:, :8].all() and k[:, 16:].all()


def test_low_precision_is_widened_before_anything_is_subtracted(net):
  """In bfloat16 the fold of a small change is its rounding."""
  _, _, params, sites = net
  low = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), params)
  lora = peftjax.load('lowrank.lora', rank=1)
  theta = peftjax.init(lora, jax.random.key(0), sites, low)
  theta = jax.tree.map(lambda v: v + 0.01, theta)
  base, new = kernels.tuned(lora, low, theta, sites)
  for (name, k0, k1), (_, k) in zip(kernels.each(sites, base, new),
                                    kernels.each(sites, low), strict=True):
    assert k0.dtype == k1.dtype == jnp.float32, name
    np.testing.assert_array_equal(k0, k)
    s = np.linalg.svd(k1 - k0, compute_uv=False)
    assert s[0] > 1e-3 and s[1] < 1e-4 * s[0], name
  kept = kernels.replace(lambda k: k, sites, low)
  assert kept['conv']['kernel'].dtype == jnp.bfloat16


@pytest.mark.parametrize('chosen, match', [
    (peftjax.select(path=['out', 'blcks']), "path='blcks' matches no site"),
    (peftjax.select(path='^blocks$'), "'blocks' .* has no kernel"),
    (lambda s: False, 'matches no site')])
def test_what_is_refused(net, chosen, match):
  _, _, params, sites = net
  with pytest.raises(ValueError, match=match):
    list(kernels.each(sites, params, chosen=chosen))
