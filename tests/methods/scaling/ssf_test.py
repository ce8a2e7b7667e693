"""SSF: fold, the paper's count and attach points, gradients."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from peftjax.methods.scaling.ssf import ssf
from peftjax.models.vit import ViT


class Mixed(nn.Module):
  """One of each: convolution, norms, DenseGeneral, perceptron, head."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (2, 2), name='conv')(x).reshape(x.shape[0], -1, 8)
    h = nn.LayerNorm(name='norm')(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, name='attn')(h, h)
    x = nn.gelu(nn.Dense(12, name='up')(x))
    return nn.Dense(3, name='head')(x.mean(1))


@pytest.fixture(scope='module')
def case():
  rng = np.random.default_rng(0)
  model, x = Mixed(), rng.normal(size=(2, 3, 3, 4)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  params = jax.tree.map(
      lambda v: 0.3 * rng.normal(size=v.shape).astype(np.float32), shapes)
  params['norm']['scale'] += 1
  return types.SimpleNamespace(
      model=model, x=x, params=params, sites=peftjax.describe(model, x))


@pytest.fixture(scope='module')
def spread(case):
  """Theta far from the identity."""
  shapes = jax.eval_shape(lambda params: peftjax.init(
      ssf(), jax.random.key(0), case.sites, params), case.params)
  rng = np.random.default_rng(1)
  return {'ssf': {path: dict(
      g=rng.normal(1, 0.5, t['g'].shape).astype(np.float32),
      t=rng.normal(0, 0.5, t['t'].shape).astype(np.float32))
                  for path, t in shapes['ssf'].items()}}


def test_default_sites(case, spread):
  assert sorted(spread['ssf']) == sorted([
      'conv', 'norm', 'attn/query', 'attn/key', 'attn/value', 'attn/out', 'up'])


def test_equals_fold_and_gradients(case, spread):
  method = ssf()

  @jax.jit
  def run(params, theta):
    plain = peftjax.fold(method, params, theta, case.sites)
    adapted = lambda theta: peftjax.apply(
        case.model, method, params, theta, case.x)[0]
    folded = lambda plain: case.model.apply({'params': plain}, case.x)
    return (adapted(theta), folded(plain), folded(params),
            jax.grad(lambda t: (adapted(t)**2).sum())(theta),
            jax.grad(lambda p: (folded(p)**2).sum())(plain))

  y, folded, base, by_theta, by_plain = run(case.params, spread)
  np.testing.assert_allclose(y, folded, rtol=0, atol=1e-5)
  assert np.abs(y - base).max() > 0.1
  for path, t in by_theta['ssf'].items():  # t is one more bias
    layer = by_plain
    for part in path.split('/'):
      layer = layer[part]
    np.testing.assert_allclose(t['t'], layer['bias'].ravel(), rtol=1e-4,
                               atol=1e-5)
  assert np.abs(by_theta['ssf']['conv']['t']).max() > 0.1


def test_by_hand(case, spread):
  t = spread['ssf']['up']
  x = np.random.default_rng(2).normal(size=(5, 8)).astype(np.float32)
  y, _ = peftjax.apply(nn.Dense(12), ssf(), case.params['up'],
                       {'ssf': {'': t}}, x)
  p = case.params['up']
  x, k, b, g, s = (np.asarray(v, np.float64) for v in (
      x, p['kernel'], p['bias'], t['g'], t['t']))
  np.testing.assert_allclose(y, g * (x @ k + b) + s, rtol=0, atol=1e-5)


def test_identity_is_the_base_bit_for_bit(case):
  method = ssf(init='identity')
  theta = peftjax.init(method, jax.random.key(0), case.sites, case.params)
  y, base = jax.jit(lambda params, theta: (
      peftjax.apply(case.model, method, params, theta, case.x)[0],
      case.model.apply({'params': params}, case.x)))(case.params, theta)
  np.testing.assert_array_equal(y, base)
  assert method.tolerance == 0 and ssf().tolerance == float('inf')


def test_normal_init():
  site = peftjax.Site('a', 'Dense', '', dict(
      kernel=jax.ShapeDtypeStruct((3, 20_000), jnp.float32)))
  t = jax.jit(lambda key: ssf().init(key, site, {}, None))(jax.random.key(0))
  t = {name: np.asarray(value) for name, value in t.items()}
  for value, mean in ((t['g'], 1), (t['t'], 0)):
    np.testing.assert_allclose(value.mean(), mean, atol=1e-3)
    np.testing.assert_allclose(value.std(), 0.02, rtol=0.03)
  assert abs(np.corrcoef(t['g'], t['t'])[0, 1]) < 0.03


def test_layers_without_a_bias():
  class NoBias(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(4, use_bias=False, name='up')(nn.RMSNorm(name='norm')(x))

  rng = np.random.default_rng(0)
  model, x = NoBias(), rng.normal(size=(5, 8)).astype(np.float32)
  params = dict(norm=dict(scale=np.ones(8, np.float32)),
                up=dict(kernel=rng.normal(size=(8, 4)).astype(np.float32)))
  sites = peftjax.describe(model, x)
  for name in ('up', 'norm'):
    method = ssf(sites=peftjax.select(path=name))
    theta = peftjax.init(method, jax.random.key(2), sites, params)
    t = theta['ssf'][name]
    y, _ = jax.jit(lambda theta: peftjax.apply(
        model, method, params, theta, x))(theta)
    h = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    h = h * t['g'] + t['t'] if name == 'norm' else h
    want = h @ params['up']['kernel']
    want = want * t['g'] + t['t'] if name == 'up' else want
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"'{name}'.* needs a leaf 'bias'.*"
                       'build the layer with one'):
      peftjax.fold(method, params, theta, sites)


def test_counts():
  """2 (11 * 12 + 2) 768 in ViT-B/16, as the paper's points add up to."""
  model = ViT(width=768, depth=12, heads=12, mlp_dim=3072, patch=16, scan=True)
  sites = peftjax.describe(
      model, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
  method = ssf()
  total = sum(method.count(s) * int(np.prod(s.stack))
              for s in sites.values() if method.sites(s))
  assert total == 205_824


def test_trained_numbers_equal_the_count(case, spread):
  assert peftjax.count(spread) == sum(
      ssf().count(case.sites[p]) for p in spread['ssf'])
  assert ssf().labels == dict(g='no_decay', t='no_decay')


def test_refuses():
  with pytest.raises(ValueError, match="unknown init 'ones'"):
    ssf(init='ones')
