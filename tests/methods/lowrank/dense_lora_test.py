"""DenseLoRA: its forward written out, what layers share, LoRA as control."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax import theta as theta_lib
from peftjax import trees
from peftjax.models import decoder
import pytest

NAME = 'lowrank.dense_lora'
ERF = np.vectorize(math.erf)


class Two(nn.Module):
  """Blocks side by side on one input: what each layer gives can be told."""

  depth: int = 2

  @nn.compact
  def __call__(self, x):
    return [Layers(name=f'block_{i}')(x) for i in range(self.depth)]


class Layers(nn.Module):

  @nn.compact
  def __call__(self, x):
    return {n: nn.Dense(d, name=n)(x)
            for n, d in (('query', 6), ('value', 6), ('up', 9))}


@pytest.fixture(scope='module')
def two():
  """(x, params, sites) of `Two`."""
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(size=shape).astype(np.float32)
  x = draw((5, 6))
  shapes = jax.eval_shape(Two().init, jax.random.key(0), x)['params']
  return x, jax.tree.map(lambda v: 0.4 * draw(v.shape), shapes), (
      peftjax.describe(Two(), x))


def moved(method, sites, params, seed=1):
  """A theta without zeros."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda v: jnp.asarray(0.5 * rng.normal(size=v.shape), jnp.float32),
      peftjax.init(method, jax.random.key(0), sites, params))


def run(method, params, theta, x, **kwargs):
  return jax.jit(lambda t: peftjax.apply(
      Two(), method, params, t, x, **kwargs)[0])(theta)


def test_layers_of_a_type_share_factors(two):
  x, params, sites = two
  method = peftjax.load(NAME, rank=2)
  theta = peftjax.init(method, jax.random.key(0), sites, params)['dense_lora']
  assert {n: v.shape for n, v in theta.pop('*').items()} == {
      'e.q.6x6': (6, 2), 'd.q.6x6': (2, 6), 'e.v.6x6': (6, 2),
      'd.v.6x6': (2, 6), 'e.up.6x9': (6, 2), 'd.up.6x9': (2, 9)}
  assert {p: {n: v.shape for n, v in t.items()} for p, t in theta.items()} == {
      f'block_{i}/{layer}': {f'm.{kind}': (2, 2)} for i in range(2)
      for layer, kind in (('query', 'q.6x6'), ('value', 'v.6x6'),
                          ('up', 'up.6x9'))}


def test_starts_as_the_base_and_moves_the_decoders_first(two):
  x, params, sites = two
  method = peftjax.load(NAME, rank=3)
  theta = peftjax.init(method, jax.random.key(0), sites, params)
  for name, v in theta['dense_lora']['*'].items():
    if name.startswith('e.'):
      assert 0.2 < np.abs(v).max() <= 1 / math.sqrt(6)
    else:
      assert not v.any()
  m = np.stack([v for p, t in theta['dense_lora'].items() if p != '*'
                for v in t.values()])
  assert 0.4 < np.abs(m).max() <= 1 / math.sqrt(3)
  assert len(np.unique(m)) == m.size
  jax.tree.map(np.testing.assert_array_equal,
               peftjax.apply(Two(), method, params, theta, x)[0],
               Two().apply({'params': params}, x))

  @jax.grad
  def grads(theta):
    out, _ = peftjax.apply(Two(), method, params, theta, x)
    return sum(jnp.sin(y).sum() for y in jax.tree.leaves(out))

  for path, t in grads(theta)['dense_lora'].items():
    for name, g in t.items():
      assert g.any() == (path == '*' and name.startswith('d.'))


def test_equals_the_forward_written_out(two):
  x, params, sites = two
  method = peftjax.load(NAME, rank=2, alpha=3.0)
  theta = moved(method, sites, params)
  got = run(method, params, theta, x)
  phi = lambda v: 0.5 * v * (1 + ERF(v / math.sqrt(2)))
  t = jax.tree.map(np.float64, theta['dense_lora'])
  for i, layers in enumerate(got):
    for name, kind in (('query', 'q.6x6'), ('value', 'v.6x6'),
                       ('up', 'up.6x9')):
      p = params[f'block_{i}'][name]
      e, d, m = (t['*'][f'e.{kind}'], t['*'][f'd.{kind}'],
                 t[f'block_{i}/{name}'][f'm.{kind}'])
      want = x @ p['kernel'] + p['bias'] + 1.5 * phi(phi(x @ e) @ m @ d)
      np.testing.assert_allclose(layers[name], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize('activation', ['gelu', 'identity'])
def test_a_core_acts_on_its_own_layer_alone(two, activation):
  x, params, sites = two
  method = peftjax.load(NAME, rank=2, activation=activation)
  theta = moved(method, sites, params)
  before = run(method, params, theta, x)
  theta['dense_lora']['block_1/query']['m.q.6x6'] += 1
  after = run(method, params, theta, x)
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
  assert changed == [dict(query=False, value=False, up=False),
                     dict(query=True, value=False, up=False)]


def test_without_activations_it_is_a_lora(two):
  """A = E, B = M D: output, fold, and gradients by the chain rule."""
  x, params, sites = two
  method = peftjax.load(NAME, rank=2, alpha=3.0, activation='identity')
  lora = peftjax.load('lowrank.lora', rank=2, alpha=3.0)
  theta = moved(method, sites, params)

  def as_lora(theta):
    t = dict(theta['dense_lora'])
    common, out = t.pop('*'), {}
    for path, core in t.items():
      (name, m), = core.items()
      kind = name[2:]
      out[path] = dict(a=common[f'e.{kind}'], b=m @ common[f'd.{kind}'])
    return {'lora': out}

  def loss(method, theta):
    out, _ = peftjax.apply(Two(), method, params, theta, x)
    return sum(jnp.sin(y).sum() for y in jax.tree.leaves(out)), out

  got, y = jax.jit(jax.grad(
      lambda t: loss(method, t), has_aux=True))(theta)
  want, y_want = jax.jit(jax.grad(
      lambda t: loss(lora, as_lora(t)), has_aux=True))(theta)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5), (got, y), (want, y_want))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
               peftjax.fold(method, params, theta, sites),
               peftjax.fold(lora, params, as_lora(theta), sites))


def test_dropout_acts_in_three_places():
  """On identities and ones what is left is 1 / (1 - p)^3 at (1 - p)^3."""
  class One(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(64, use_bias=False, name='query')(x)

  x = jnp.ones((64, 64))
  params = dict(query=dict(kernel=jnp.zeros((64, 64))))
  method = peftjax.load(NAME, rank=64, alpha=64.0, activation='identity',
                        dropout=0.25)
  theta = {'dense_lora': {
      '*': {'e.q.64x64': jnp.eye(64), 'd.q.64x64': jnp.eye(64)},
      'query': {'m.q.64x64': jnp.eye(64)}}}
  y, _ = peftjax.apply(One(), method, params, theta, x, train=True,
                       rng=jax.random.key(0))
  np.testing.assert_allclose(np.unique(y), [0, 0.75 ** -3], rtol=1e-6)
  share = 0.75 ** 3
  assert abs((y > 0).mean() - share) < 5 * math.sqrt(share * (1 - share)) / 64
  y, _ = peftjax.apply(One(), method, params, theta, x)
  np.testing.assert_array_equal(y, 1)


@pytest.mark.parametrize('scan', [True, False])
def test_count_on_llama_3_8b(scan):
  """884,736 shared and 40,960 in cores: 0.0115 % of the model."""
  model = decoder.Decoder(
      vocab=128256, width=4096, depth=32 if scan else 2, heads=32, kv_heads=8,
      mlp_dim=14336, norm='rms', position='rotary', head=None, scan=scan)
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), ids)['params']
  sites = peftjax.describe(model, ids)
  method = peftjax.load(NAME)
  theta = jax.eval_shape(
      lambda p: theta_lib.init(method, jax.random.key(0), sites, p), params)
  t = dict(theta['dense_lora'])
  assert trees.count(t.pop('*')) == 884_736
  assert trees.count(t) == sum(method.count(sites[p]) * math.prod(
      sites[p].stack) for p in t) == model.depth * 5 * 256
  if scan:
    assert trees.count(theta) == 925_696


@pytest.mark.parametrize('kwargs, message', [
    (dict(activation='gellu'), "unknown activation 'gellu'; .* 'gelu'"),
    (dict(rank=7), "rank 7 at 'block_0/query': expected .* nearest is 6"),
    (dict(alpha=0), 'alpha=0: expected a positive number'),
    (dict(dropout=-0.1), 'dropout=-0.1: expected a rate .* nearest is 0.0')])
def test_bad_arguments(two, kwargs, message):
  _, params, sites = two
  with pytest.raises(ValueError, match=message):
    peftjax.init(peftjax.load(NAME, **{'rank': 2, **kwargs}),
                 jax.random.key(0), sites, params)


def test_refuses_to_fold_what_is_not_linear(two):
  _, params, sites = two
  method = peftjax.load(NAME, rank=2)
  with pytest.raises(ValueError, match='dense_lora has no fold'):
    peftjax.fold(method, params, moved(method, sites, params), sites)
