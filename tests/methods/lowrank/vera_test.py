"""VeRA against Hugging Face PEFT and its closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peftjax
import pytest
import torch

NAME = 'lowrank.vera'


def load(case, **kwargs):
  return peftjax.load(NAME, **{'sites': case.chosen, 'rank': 5, **kwargs})


def matrix(p):
  """A layer's kernel [d_in, d_out] in float64, as a method sees it."""
  k = np.float64(p['embedding'] if 'embedding' in p else p['kernel'])
  return k.transpose(2, 0, 1, 3).reshape(-1, k.shape[-1]) if k.ndim == 4 else k


def test_starts_as_the_base_with_one_pair_for_all(case):
  c = case('mlp')
  method = load(c)
  theta = peftjax.init(method, jax.random.key(0), c.sites, c.params)
  trained, frozen = peftjax.partition(method, theta)
  assert {p: {n: v.shape for n, v in t.items()}
          for p, t in trained['vera'].items()} == dict(
              [('*', {})], one=dict(d=(5,), b=(10,)), two=dict(d=(5,), b=(6,)))
  assert {n: v.shape for n, v in frozen['vera']['*'].items()} == dict(
      A=(12, 5), B=(5, 10))
  for layer in ('one', 'two'):
    t = trained['vera'][layer]
    assert (t['d'] == np.float32(0.1)).all() and not t['b'].any()
    assert method.count(c.sites[layer]) == t['d'].size + t['b'].size
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_array_equal(y, c.model.apply({'params': c.params}, c.x))


@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_equals_the_product_written_out(case, moved, name):
  c = case(name)
  method = load(c)
  theta = moved(method, c)
  t = jax.tree.map(np.float64, theta['vera'])
  common = t.pop('*')
  folded = peftjax.fold(method, c.params, theta, c.sites)
  for layer, own in t.items():
    d_in, d_out = c.sites[layer].params['kernel'].shape
    delta = (common['A'][:d_in] * own['d']) @ common['B'][:, :d_out] * own['b']
    np.testing.assert_allclose(
        matrix(folded[layer]), matrix(c.params[layer]) + delta, atol=2e-6)
  run = jax.jit(lambda t: peftjax.apply(c.model, method, c.params, t, c.x)[0])
  np.testing.assert_allclose(
      run(theta), c.model.apply({'params': folded}, c.x), atol=1e-5)


@pytest.mark.parametrize('kwargs, message', [
    (dict(rank=0), 'vera: rank=0: expected a whole number from 1 to 65536'),
    (dict(d_initial=0.0), 'd_initial=0.0: expected a finite number but 0'),
    (dict(dropout=1.0), 'dropout=1.0: expected a rate .* nearest is 0.9'),
    (dict(sites=peftjax.select(path='^$')), "vera: '' .Mlp. has no kernel")])
def test_bad_arguments(case, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    peftjax.init(load(c, **kwargs), jax.random.key(0), c.sites, c.params)


# ------------------------------------------------------------- another library
def twin(case, rank):
  """(the perceptron in PEFT with VeRA, {layer: its module})."""
  net = torch.nn.Sequential()
  for name, d_in, d_out in (('one', 12, 10), ('two', 10, 6)):
    layer = torch.nn.Linear(d_in, d_out)
    put(layer.weight, case.params[name]['kernel'].T)
    put(layer.bias, case.params[name]['bias'])
    net.add_module(name, layer)
    if name == 'one':
      net.add_module('tanh', torch.nn.Tanh())
  model = peft.get_peft_model(net, peft.VeraConfig(
      r=rank, target_modules=['one', 'two']))
  base = model.base_model.model
  return model, {n: base.get_submodule(n) for n in ('one', 'two')}


def put(parameter, value):
  with torch.no_grad():
    assert parameter.shape == value.shape
    parameter.copy_(torch.from_numpy(np.array(value)))


def test_equals_peft(case, moved):
  c = case('mlp')
  method = load(c)
  theta = moved(method, c)
  t = theta['vera']
  model, layers = twin(c, 5)
  for name, layer in layers.items():
    put(layer.vera_A['default'], t['*']['A'].T)
    put(layer.vera_B['default'], t['*']['B'].T)
    put(layer.vera_lambda_d['default'], t[name]['d'])
    put(layer.vera_lambda_b['default'], t[name]['b'])

  @jax.jit
  def ours(theta):
    def loss(theta):
      y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
      return jnp.sin(y).sum(), y
    return jax.grad(loss, has_aux=True)(theta)

  grads, y = ours(theta)
  want = model(torch.from_numpy(c.x))
  np.testing.assert_allclose(y, want.detach(), rtol=0, atol=1e-5)
  torch.sin(want).sum().backward()
  for name, layer in layers.items():
    for leaf in 'db':
      np.testing.assert_allclose(
          grads['vera'][name][leaf],
          getattr(layer, f'vera_lambda_{leaf}')['default'].grad, rtol=0,
          atol=1e-5)
  folded = peftjax.fold(method, c.params, theta, c.sites)
  merged = model.merge_and_unload()
  for name in layers:
    np.testing.assert_allclose(
        folded[name]['kernel'], merged.get_submodule(name).weight.detach().T,
        rtol=0, atol=1e-5)


def test_is_drawn_as_in_peft(case):
  """The same shapes, the same uniform distributions."""
  c = case('mlp')
  rank = 400
  method = load(c, rank=rank)
  t = peftjax.init(method, jax.random.key(0), c.sites, c.params)['vera']
  _, layers = twin(c, rank)
  for name, bound in (('A', math.sqrt(6 / 12)), ('B', math.sqrt(6 / rank))):
    theirs = getattr(layers['one'], f'vera_{name}')['default'].numpy().T
    mine = t['*'][name]
    assert mine.shape == theirs.shape
    for v in (mine, theirs):
      assert 0.99 * bound < np.abs(v).max() <= bound
      np.testing.assert_allclose(
          v.std(), bound / math.sqrt(3), rtol=5 / math.sqrt(v.size))
  for name, layer in layers.items():
    for leaf in 'db':
      np.testing.assert_allclose(t[name][leaf], getattr(
          layer, f'vera_lambda_{leaf}')['default'].detach())
