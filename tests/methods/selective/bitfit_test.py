"""selective.bitfit: its leaves, its count, and what its gradients must be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax import trees
from peftjax.models import vit

D = 8
MODEL = vit.ViT(classes=3, width=D, depth=2, heads=2, mlp_dim=4 * D, patch=4)
IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
SITES = pj.describe(MODEL, IMAGES)
BLOCK = {f'block_{i}' for i in range(2)}


def noisy(tree, seed=2):
  """Nothing at zero or one: a wrong leaf must change the output."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda v: jnp.asarray(
      v + rng.normal(0, 0.3, v.shape).astype(v.dtype)), tree)


PARAMS = noisy(jax.tree.map(
    lambda v: np.zeros(v.shape, v.dtype),
    jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES)['params']))


def loss(method, theta):
  y = pj.apply(MODEL, method, PARAMS, theta, IMAGES)[0]
  return optax.softmax_cross_entropy_with_integer_labels(
      y, jnp.array([0, 1, 2, 1])).mean()


@pytest.mark.parametrize('subset', ['all', 'query_mlp'])
def test_trains_exactly_the_listed_leaves(subset):
  method = pj.load('selective.bitfit', subset=subset)
  theta = pj.init(method, jax.random.key(3), SITES, PARAMS)['bitfit']
  inside = ('attn/query', 'mlp/up')
  if subset == 'all':
    inside += ('attn/key', 'attn/value', 'attn/out', 'mlp/down', 'norm1',
               'norm2')
  listed = {f'{b}/{p}' for b in BLOCK for p in inside}
  if subset == 'all':
    listed |= {'patch', 'norm'}
  assert set(theta) == listed
  for path, t in theta.items():
    assert set(t) == {'bias'}
    np.testing.assert_array_equal(
        t['bias'], trees.flatten(PARAMS)[f'{path}/bias'])
  per_block = 11 * D if subset == 'all' else 5 * D
  outside = 2 * D if subset == 'all' else 0
  assert pj.count(theta) == 2 * per_block + outside
  assert sum(method.count(SITES[p]) for p in theta) == pj.count(theta)


def test_everything_else_stays_bit_identical():
  method = pj.load('selective.bitfit')
  theta = pj.init(method, jax.random.key(3), SITES, PARAMS)
  np.testing.assert_array_equal(
      pj.apply(MODEL, method, PARAMS, theta, IMAGES)[0],
      MODEL.apply({'params': PARAMS}, IMAGES))
  tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(
      1e-2, weight_decay=0.1))

  @jax.jit
  def step(theta, state):
    value, grads = jax.value_and_grad(lambda t: loss(method, t))(theta)
    updates, state = tx.update(grads, state, theta)
    return optax.apply_updates(theta, updates), state, value

  state, losses = tx.init(theta), []
  for _ in range(5):
    theta, state, value = step(theta, state)
    losses.append(float(value))
  assert losses[-1] < losses[0]
  folded = trees.flatten(pj.fold(method, PARAMS, theta, SITES))
  for path, v in trees.flatten(PARAMS).items():
    moved = path.endswith('/bias') and path != 'head/bias'
    assert np.array_equal(folded[path], v) != moved, path


def test_equals_ssf_with_its_scale_at_one():
  """Shifts after the linear layers, written by hand, and their gradients."""
  linear = [p for p, s in SITES.items() if s.kind in ('Dense', 'Conv')
            and s.role != 'head']
  method = pj.load('selective.bitfit', sites=dict(path=[
      f'^{p}$' for p in linear]))
  shift = noisy({p: np.zeros(SITES[p].y.shape[-1], np.float32) for p in linear})
  base = trees.flatten(PARAMS)
  theta = {'bitfit': {p: dict(bias=base[f'{p}/bias'] + t)
                      for p, t in shift.items()}}

  def ssf(shift):
    def add(f, args, kwargs, context):
      y = f(*args, **kwargs)
      path = '/'.join(context.module.path)
      here = context.method_name == '__call__' and path in shift
      return y + shift[path] if here else y

    with nn.intercept_methods(add):
      y = MODEL.apply({'params': PARAMS}, IMAGES)
    return jnp.square(y).sum(), y

  def bitfit(theta):
    y = pj.apply(MODEL, method, PARAMS, theta, IMAGES)[0]
    return jnp.square(y).sum(), y

  want, y_want = jax.jit(jax.grad(ssf, has_aux=True))(shift)
  have, y_have = jax.jit(jax.grad(bitfit, has_aux=True))(theta)
  np.testing.assert_allclose(y_have, y_want, atol=1e-5)
  for path, g in want.items():
    np.testing.assert_allclose(have['bitfit'][path]['bias'], g, atol=2e-4,
                               rtol=1e-4, err_msg=path)


def test_key_biases_have_no_gradient():
  """Softmax ignores what is the same for every key."""
  method = pj.load('selective.bitfit')
  theta = noisy(pj.init(method, jax.random.key(3), SITES, PARAMS))
  grads = jax.jit(jax.grad(lambda t: loss(method, t)))(theta)['bitfit']
  size = lambda path: float(jnp.abs(grads[path]['bias']).max())
  for block in BLOCK:
    assert size(f'{block}/attn/query') > 1e-4
    assert size(f'{block}/attn/value') > 1e-4
    assert size(f'{block}/attn/key') < 1e-7


class Foreign(nn.Module):
  names: tuple
  use_bias: bool = True

  @nn.compact
  def __call__(self, x):
    for name in self.names:
      x = nn.Dense(4, use_bias=self.use_bias, name=name)(x)
    return x


def start(model, **kwargs):
  x = jnp.ones((1, 4))
  params = model.init(jax.random.key(0), x)['params']
  method = pj.load('selective.bitfit', **kwargs)
  return pj.init(method, jax.random.key(1), pj.describe(model, x), params)


def test_errors():
  with pytest.raises(ValueError, match="'al'; did you mean 'all'"):
    pj.load('selective.bitfit', subset='al')
  with pytest.raises(ValueError, match=r'bias_but_not_head matches no site'
                     r'(.|\n)*first .* kernel\[4, 4\]'):
    start(Foreign(('first', 'second', 'last'), use_bias=False))
  with pytest.raises(ValueError, match='query_and_up_bias matches no site'):
    start(Foreign(('first', 'second', 'last')), subset='query_mlp')
  with pytest.raises(ValueError, match="none has role 'q'"):
    start(Foreign(('first', 'up', 'last')), subset='query_mlp')
  with pytest.raises(ValueError, match="'first' .Dense. has no bias"):
    start(Foreign(('first', 'last'), use_bias=False), sites=dict(path='first'))
  theta = start(Foreign(('wq', 'up', 'last')), subset='query_mlp')
  assert set(theta['bitfit']) == {'wq', 'up'}
