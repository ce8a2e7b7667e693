"""selective.ln_tuning: norms and nothing else, by brute force and by PEFT."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax as pj
from peftjax import trees
from peftjax.models import vit
import pytest

RNG = np.random.default_rng(0)
MODEL = vit.ViT(classes=3, width=8, depth=2, heads=2, mlp_dim=16, patch=4)
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)
SITES = pj.describe(MODEL, IMAGES)
NORMS = {'norm', *(f'block_{i}/norm{j}' for i in range(2) for j in (1, 2))}


def draw(tree):
  return jax.tree.map(
      lambda v: RNG.normal(0, 0.3, v.shape).astype(np.float32), tree)


PARAMS = draw(jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES)['params'])


def is_norm(path):
  return path.rpartition('/')[0] in NORMS


def test_equals_training_the_norms_of_the_params_tree():
  method = pj.load('selective.ln_tuning')
  theta = pj.init(method, jax.random.key(3), SITES, PARAMS)
  assert set(theta['ln_tuning']) == NORMS
  assert pj.count(theta) == 5 * 2 * 8 == sum(
      method.count(SITES[p]) for p in NORMS)
  assert {method.labels[n] for n in ('scale', 'bias')} == {'no_decay'}
  y, base = jax.jit(lambda params, theta: (
      pj.apply(MODEL, method, params, theta, IMAGES)[0],
      MODEL.apply({'params': params}, IMAGES)))(PARAMS, theta)
  np.testing.assert_array_equal(y, base)
  tx = optax.chain(optax.clip_by_global_norm(1.), optax.sgd(0.1, 0.9))

  def train(loss, values):
    @jax.jit
    def step(values, state):
      updates, state = tx.update(jax.grad(loss)(values), state)
      return optax.apply_updates(values, updates), state

    state = tx.init(values)
    for _ in range(3):
      values, state = step(values, state)
    return values

  error = lambda y: jnp.square(y - jnp.eye(3)[jnp.array([0, 1, 2, 1])]).sum()
  theta = train(lambda t: error(
      pj.apply(MODEL, method, PARAMS, t, IMAGES)[0]), theta)
  flat = trees.flatten(PARAMS)
  chosen = {p: v for p, v in flat.items() if is_norm(p)}
  chosen = train(lambda c: error(
      MODEL.apply({'params': trees.unflatten({**flat, **c})}, IMAGES)), chosen)
  folded = trees.flatten(pj.fold(method, PARAMS, theta, SITES))
  for path, v in flat.items():
    if is_norm(path):
      np.testing.assert_allclose(folded[path], chosen[path], atol=1e-5)
      assert not np.array_equal(folded[path], v), path
    else:
      np.testing.assert_array_equal(folded[path], v)


class Kinds(nn.Module):
  """Norms with other leaves: no bias, and statistics among the parameters."""

  @nn.compact
  def __call__(self, x):
    x = nn.RMSNorm(name='rms')(x)
    x = KeptNorm(name='kept')(x)
    x = nn.LayerNorm(use_scale=False, use_bias=False, name='bare')(x)
    return nn.Dense(3, name='head')(x)


class KeptNorm(nn.Module):

  @nn.compact
  def __call__(self, x):
    leaf = lambda name: self.param(name, nn.initializers.ones, x.shape[-1:])
    return (x - leaf('mean')) / jnp.sqrt(leaf('var')) * leaf('gamma')


def test_kinds_of_norms():
  x = RNG.normal(size=(5, 4)).astype(np.float32)
  model, sites = Kinds(), pj.describe(Kinds(), x)
  params = jax.tree.map(lambda v: 1 + np.abs(v), draw(
      jax.eval_shape(model.init, jax.random.key(0), x)['params']))
  method = pj.load('selective.ln_tuning')
  theta = pj.init(method, jax.random.key(0), sites, params)
  names = {p: set(t) for p, t in theta['ln_tuning'].items()}
  assert names == dict(rms={'scale'}, kept={'gamma'})
  assert {p: method.count(sites[p]) for p in names} == dict(rms=4, kept=4)
  theta = draw(theta)
  folded = pj.fold(method, params, theta, sites)
  np.testing.assert_array_equal(folded['kept']['var'], params['kept']['var'])
  np.testing.assert_allclose(
      pj.apply(model, method, params, theta, x)[0],
      model.apply({'params': folded}, x), rtol=0, atol=1e-6)


class Stack(nn.Module):

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      x = nn.LayerNorm(epsilon=1e-5, name=f'norm{i}')(x)
      x = jnp.tanh(nn.Dense(6, name=f'linear{i}')(x))
    return x


def test_equals_peft():
  peft = pytest.importorskip('peft')
  torch = pytest.importorskip('torch')
  x = RNG.normal(size=(4, 6)).astype(np.float32)
  sites = pj.describe(Stack(), x)
  params = draw(jax.eval_shape(Stack().init, jax.random.key(0), x)['params'])
  method = pj.load('selective.ln_tuning')
  start = pj.init(method, jax.random.key(0), sites, params)
  theta = draw(start)
  net = torch.nn.Sequential()
  for i in range(2):
    net.add_module(f'norm{i}', torch.nn.LayerNorm(6))
    net.add_module(f'linear{i}', torch.nn.Linear(6, 6))
    net.add_module(f'tanh{i}', torch.nn.Tanh())

  def put(parameter, value):
    with torch.no_grad():
      assert parameter.shape == value.shape
      parameter.copy_(torch.from_numpy(np.array(value)))

  for name, p in params.items():
    layer = net.get_submodule(name)
    put(layer.weight, p['kernel'].T if 'kernel' in p else p['scale'])
    put(layer.bias, p['bias'])
  model = peft.get_peft_model(net, peft.LNTuningConfig(
      target_modules=['norm0', 'norm1']))
  tuned = {n: net.get_submodule(n).ln_tuning_layers['default']
           for n in ('norm0', 'norm1')}
  for name, layer in tuned.items():
    np.testing.assert_array_equal(  # the same start
        start['ln_tuning'][name]['scale'], layer.weight.detach())
    put(layer.weight, theta['ln_tuning'][name]['scale'])
    put(layer.bias, theta['ln_tuning'][name]['bias'])

  @jax.jit
  def run(theta):
    def loss(theta):
      y, _ = pj.apply(Stack(), method, params, theta, x)
      return jnp.sin(y).sum(), y
    return jax.grad(loss, has_aux=True)(theta)

  grads, y = run(theta)
  want = model(torch.from_numpy(x))
  np.testing.assert_allclose(y, want.detach(), rtol=0, atol=1e-5)
  torch.sin(want).sum().backward()
  for name, layer in tuned.items():
    for leaf, value in (('scale', layer.weight), ('bias', layer.bias)):
      g = value.grad.numpy()
      np.testing.assert_allclose(grads['ln_tuning'][name][leaf], g, rtol=0,
                                 atol=1e-4 * np.abs(g).max())
  trainable = {n for n, v in model.named_parameters() if v.requires_grad}
  assert len(trainable) == 4 and pj.count(theta) == 24
  merged = model.merge_and_unload()
  for name, p in pj.fold(method, params, theta, sites).items():
    layer = merged.get_submodule(name)
    np.testing.assert_array_equal(
        p['kernel'].T if 'kernel' in p else p['scale'], layer.weight.detach())
    np.testing.assert_array_equal(p['bias'], layer.bias.detach())


def test_refuses():
  x = np.ones((1, 6), np.float32)
  sites = pj.describe(Stack(), x)
  params = draw(jax.eval_shape(Stack().init, jax.random.key(0), x)['params'])

  def start(**where):
    method = pj.load('selective.ln_tuning', sites=where)
    return pj.init(method, jax.random.key(0), sites, params)

  with pytest.raises(ValueError, match=(
      r"'linear0' \(Dense, role ''\) is no norm.*roles='norm'")):
    start(path='0$')
  assert set(start(path='norm1')['ln_tuning']) == {'norm1'}
