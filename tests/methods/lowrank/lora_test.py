"""LoRA against Hugging Face PEFT, its closed forms, and its card."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import peftjax
import pytest
import torch

RNG = np.random.RandomState(0)
X = RNG.normal(size=(4, 12)).astype(np.float32)


class Mlp(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(6, name='two')(jnp.tanh(nn.Dense(10, name='one')(x)))


def draw(tree):
  """Random numbers in the shapes of a tree."""
  return jax.tree.map(
      lambda v: jnp.asarray(RNG.normal(0, 0.3, v.shape), jnp.float32), tree)


def made(model, x, **kwargs):
  """Params, sites, method and a theta away from its start."""
  params = draw(jax.eval_shape(model.init, jax.random.key(0), x)['params'])
  sites = peftjax.describe(model, x)
  method = peftjax.load('lowrank.lora', **kwargs)
  theta = draw(jax.eval_shape(
      lambda p: peftjax.init(method, jax.random.key(0), sites, p), params))
  return params, sites, method, theta


@pytest.fixture(scope='module')
def mlp():
  return made(Mlp(), X, rank=3, sites=peftjax.select(leaf='kernel'))


def to_torch(a):
  return torch.from_numpy(np.array(a))


def put(parameter, value):
  with torch.no_grad():
    assert parameter.shape == value.shape
    parameter.copy_(to_torch(value))


# ------------------------------------------------------------- another library
@pytest.mark.parametrize('scaling', ['lora', 'rslora'])
def test_equals_peft_on_a_two_layer_perceptron(scaling):
  params, sites, method, theta = made(
      Mlp(), X, rank=3, alpha=5.0, scaling=scaling,
      sites=peftjax.select(leaf='kernel'))
  net = torch.nn.Sequential()
  net.add_module('one', torch.nn.Linear(12, 10))
  net.add_module('act', torch.nn.Tanh())
  net.add_module('two', torch.nn.Linear(10, 6))
  for name in ('one', 'two'):
    put(net.get_submodule(name).weight, params[name]['kernel'].T)
    put(net.get_submodule(name).bias, params[name]['bias'])
  model = peft.get_peft_model(net, peft.LoraConfig(
      r=3, lora_alpha=5, target_modules=['one', 'two'],
      use_rslora=scaling == 'rslora'))
  layers = {n: model.base_model.model.get_submodule(n) for n in ('one', 'two')}
  for name, layer in layers.items():
    put(layer.lora_A['default'].weight, theta['lora'][name]['a'].T)
    put(layer.lora_B['default'].weight, theta['lora'][name]['b'].T)

  @jax.jit
  def run(theta):
    def loss(theta):
      y, _ = peftjax.apply(Mlp(), method, params, theta, X)
      return jnp.sin(y).sum(), y
    return jax.grad(loss, has_aux=True)(theta)

  grads, y = run(theta)
  want = model(to_torch(X))
  np.testing.assert_allclose(y, want.detach(), rtol=0, atol=1e-5)
  torch.sin(want).sum().backward()
  for name, layer in layers.items():
    for leaf, part in (('a', layer.lora_A), ('b', layer.lora_B)):
      np.testing.assert_allclose(
          grads['lora'][name][leaf], part['default'].weight.grad.T, rtol=0,
          atol=1e-5)
  merged = model.merge_and_unload()
  folded = peftjax.fold(method, params, theta, sites)
  for name in layers:
    np.testing.assert_allclose(
        folded[name]['kernel'], merged.get_submodule(name).weight.detach().T,
        rtol=0, atol=1e-5)
    np.testing.assert_array_equal(folded[name]['bias'], params[name]['bias'])


class Image(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Conv(6, (3, 2), (2, 1), padding=((1, 1), (0, 0)), name='conv')(x)


def test_equals_peft_on_a_convolution():
  x = RNG.normal(size=(2, 7, 5, 4)).astype(np.float32)
  params, sites, method, theta = made(
      Image(), x, rank=2, alpha=3.0, sites=peftjax.select(leaf='kernel'))
  net = torch.nn.Sequential()
  net.add_module('conv', torch.nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0)))
  put(net.conv.weight, params['conv']['kernel'].transpose(3, 2, 0, 1))
  put(net.conv.bias, params['conv']['bias'])
  model = peft.get_peft_model(net, peft.LoraConfig(
      r=2, lora_alpha=3, target_modules=['conv']))
  layer = model.base_model.model.conv
  t = theta['lora']['conv']
  assert t['a'].shape == (24, 2)  # c_in, kh, kw in this order, then r
  put(layer.lora_A['default'].weight, t['a'].T.reshape(2, 4, 3, 2))
  put(layer.lora_B['default'].weight, t['b'].T[..., None, None])
  y, _ = jax.jit(lambda t: peftjax.apply(Image(), method, params, t, x))(theta)
  want = model(to_torch(x.transpose(0, 3, 1, 2))).detach()
  np.testing.assert_allclose(
      y.transpose(0, 3, 1, 2), want, rtol=0, atol=1e-5)
  folded = peftjax.fold(method, params, theta, sites)['conv']['kernel']
  np.testing.assert_allclose(
      folded.transpose(3, 2, 0, 1),
      model.merge_and_unload().conv.weight.detach(), rtol=0, atol=1e-5)


class Words(nn.Module):

  @nn.compact
  def __call__(self, ids):
    return nn.Embed(9, 8, name='table')(ids)


def test_equals_peft_on_an_embedding():
  ids = np.array([[0, 3, 8], [3, 3, 1]])
  params, sites, method, theta = made(
      Words(), ids, rank=2, alpha=3.0, sites=peftjax.select(kind='Embed'))
  net = torch.nn.Sequential()
  net.add_module('table', torch.nn.Embedding(9, 8))
  put(net.table.weight, params['table']['embedding'])
  model = peft.get_peft_model(net, peft.LoraConfig(
      r=2, lora_alpha=3, target_modules=['table']))
  layer = model.base_model.model.table
  # The same start as PEFT's: no change, and the other factor standard normal.
  start = peftjax.init(method, jax.random.key(0), sites, params)
  assert not layer.lora_embedding_A['default'].any()
  assert not start['lora']['table']['a'].any()
  assert start['lora']['table']['b'].any()
  t = theta['lora']['table']
  put(layer.lora_embedding_A['default'], t['a'].T)
  put(layer.lora_embedding_B['default'], t['b'].T)
  y, _ = peftjax.apply(Words(), method, params, theta, ids)
  np.testing.assert_allclose(
      y, model(torch.from_numpy(ids)).detach(), rtol=0, atol=1e-5)
  folded = peftjax.fold(method, params, theta, sites)['table']['embedding']
  np.testing.assert_allclose(
      folded, model.merge_and_unload().table.weight.detach(), rtol=0,
      atol=1e-5)


# ----------------------------------------------------------------- closed forms
def test_the_delta_has_rank_r(mlp):
  params, sites, method, theta = mlp
  zero = jax.tree.map(jnp.zeros_like, params)
  delta = peftjax.fold(method, zero, theta, sites)
  for name in ('one', 'two'):
    s = np.linalg.svd(delta[name]['kernel'], compute_uv=False)
    assert s[2] > 1e-2 and s[3:].max() < 1e-5 * s[0]


def test_start_gradients_and_first_step(mlp):
  params, sites, method, _ = mlp
  theta = peftjax.init(method, jax.random.key(3), sites, params)
  for name, d_in in (('one', 12), ('two', 10)):
    a = theta['lora'][name]['a']
    assert np.abs(a).max() <= 1 / np.sqrt(d_in)
    assert np.abs(a).max() > 0.7 / np.sqrt(d_in)
    assert not theta['lora'][name]['b'].any()

  @jax.jit
  def run(theta):
    def loss(theta):
      return jnp.sin(peftjax.apply(Mlp(), method, params, theta, X)[0]).sum()
    grads = jax.grad(loss)(theta)
    return grads, jax.tree.map(lambda v, g: v - 0.1 * g, theta, grads)

  np.testing.assert_array_equal(
      peftjax.apply(Mlp(), method, params, theta, X)[0],
      Mlp().apply({'params': params}, X))
  grads, moved = run(theta)
  later = run(moved)[0]
  for name in ('one', 'two'):
    np.testing.assert_array_equal(grads['lora'][name]['a'], 0)
    assert np.abs(grads['lora'][name]['b']).max() > 1e-3
    assert np.abs(later['lora'][name]['a']).max() > 1e-4


def test_patterns_choose_rank_and_scale_by_path():
  params, sites, method, theta = made(
      Mlp(), X, rank=3, alpha=6.0, rank_pattern={'tw': 1, 'o': 2},
      alpha_pattern=[('^one$', 10.0)], sites=peftjax.select(leaf='kernel'))
  t = theta['lora']
  assert t['one']['a'].shape == (12, 2) and t['two']['a'].shape == (10, 1)
  assert {n: method.count(sites[n]) for n in t} == dict(one=2 * 22, two=16)
  folded = peftjax.fold(method, params, theta, sites)
  for name, scale in (('one', 5.0), ('two', 6.0)):
    np.testing.assert_allclose(
        folded[name]['kernel'],
        params[name]['kernel'] + scale * t[name]['a'] @ t[name]['b'], rtol=0,
        atol=1e-5)
  for key in ('rank_pattern', 'alpha_pattern'):
    with pytest.raises(ValueError, match="pattern 'onne' matches none.*'one'"):
      made(Mlp(), X, **{key: (('onne', 1),)})
  with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
    made(Mlp(), X, rank_pattern=(('(', 1),))


def test_scale_of_rslora_shrinks_with_the_root_of_the_rank():
  for scaling, scale in (('lora', 2.0), ('rslora', 4.0)):
    params, sites, method, theta = made(
        Mlp(), X, rank=4, alpha=8.0, scaling=scaling,
        sites=peftjax.select(path='one'))
    t = theta['lora']['one']
    folded = peftjax.fold(method, params, theta, sites)
    np.testing.assert_allclose(
        folded['one']['kernel'] - params['one']['kernel'],
        scale * t['a'] @ t['b'], rtol=0, atol=1e-5)


def test_dropout_acts_in_training_alone_and_is_right_on_average():
  model = nn.Dense(6)
  params, _, method, theta = made(
      model, X, rank=2, dropout=0.4, sites=peftjax.select(kind='Dense'))
  plain = peftjax.load(
      'lowrank.lora', rank=2, sites=peftjax.select(kind='Dense'))
  run = lambda m, **kwargs: peftjax.apply(
      model, m, params, theta, X, **kwargs)[0]
  want = run(plain)
  np.testing.assert_array_equal(run(method, rng=jax.random.key(0)), want)
  draws = jax.jit(jax.vmap(lambda k: run(method, train=True, rng=k)))(
      jax.random.split(jax.random.key(0), 4096))
  # The base's own path sees no dropout: with b = 0 nothing is random.
  still = {'lora': {'': {**theta['lora'][''], 'b': jnp.zeros((2, 6))}}}
  np.testing.assert_array_equal(
      peftjax.apply(model, method, params, still, X, train=True,
                    rng=jax.random.key(1))[0],
      X @ params['kernel'] + params['bias'])
  error = draws.std(0) / np.sqrt(len(draws))
  assert error.min() > 0
  assert (np.abs(draws.mean(0) - want) / error).max() < 5
  # Inverted dropout of x has variance x^2 p / (1 - p) in each input.
  t = theta['lora']['']
  effect = 8.0 * (t['a'] @ t['b'])
  sigma = np.sqrt((X ** 2) @ (effect ** 2) * 0.4 / 0.6)
  np.testing.assert_allclose(draws.std(0), sigma, rtol=0.1)
  with pytest.raises(ValueError, match='dropout=0.4 at .* needs a key'):
    run(method, train=True)


def test_dropout_on_ids_is_refused():
  ids = np.array([[0, 3, 8]])
  params, _, method, theta = made(
      Words(), ids, rank=2, dropout=0.1, sites=peftjax.select(kind='Embed'))
  with pytest.raises(ValueError, match="input of 'table', which takes ids"):
    peftjax.apply(Words(), method, params, theta, ids, train=True,
                  rng=jax.random.key(0))


# -------------------------------------------------------------- bad arguments
@pytest.mark.parametrize('kwargs, message', [
    (dict(scaling='rs_lora'), "unknown scaling 'rs_lora'.*'rslora'"),
    (dict(dropout=1.0), r'dropout=1.0: expected a rate in \[0, 1\)'),
    (dict(alpha=0), 'alpha=0: expected a positive number'),
    (dict(alpha_pattern=(('one', -1.0),)), 'alpha=-1.0: expected a positive'),
])
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    peftjax.load('lowrank.lora', **kwargs)


@pytest.mark.parametrize('rank, near', [(0, 1), (-3, 1), (7, 6), (2.5, 2)])
def test_bad_ranks(rank, near):
  with pytest.raises(ValueError, match=(
      f"rank {rank} at 'two': expected a whole number from 1 to 6 for a "
      rf"kernel of \[10, 6\]; the nearest is {near}")):
    made(Mlp(), X, rank=rank, sites=peftjax.select(path='two'))


def test_a_site_without_a_kernel_is_refused():
  with pytest.raises(ValueError, match="'' .Mlp. has no kernel"):
    made(Mlp(), X, sites=peftjax.select(kind='Mlp'))
