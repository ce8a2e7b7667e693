"""selective.full: whole leaves of chosen layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax import trees
from peftjax.models import vit

MODEL = vit.ViT(classes=3, width=8, depth=2, heads=2, mlp_dim=16, patch=4)
IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
LABELS = jnp.array([0, 1, 2, 1])
SITES = pj.describe(MODEL, IMAGES)
# eps: the key biases have no gradient but rounding errors, which Adam's usual
# 1e-8 would blow up to full steps.
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
    1e-2, eps=1e-4, weight_decay=0.1))


def noisy(tree, seed=2):
  """Nothing at zero or one: a wrong leaf must change the output."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda v: jnp.asarray(
      v + rng.normal(0, 0.3, v.shape).astype(v.dtype)), tree)


PARAMS = noisy(jax.tree.map(
    lambda v: np.zeros(v.shape, v.dtype),
    jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES)['params']))
HEAD = pj.select(roles='head')


def loss_of(logits):
  return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def train(loss, values, steps=3):
  @jax.jit
  def step(values, state):
    value, grads = jax.value_and_grad(loss)(values)
    updates, state = TX.update(grads, state, values)
    return optax.apply_updates(values, updates), state, value

  state, losses = TX.init(values), []
  for _ in range(steps):
    values, state, value = step(values, state)
    losses.append(float(value))
  return values, losses


def flat_theta(theta):
  """Theta by the paths of the params tree."""
  return {'/'.join(filter(None, (path, n))): v
          for path, t in theta['full'].items() for n, v in t.items()}


def test_everything_is_full_fine_tuning():
  method = pj.load('selective.full')
  theta = pj.init(method, jax.random.key(3), SITES, PARAMS)
  flat = flat_theta(theta)
  assert set(flat) == set(trees.flatten(PARAMS))
  theta, losses = train(
      lambda t: loss_of(pj.apply(MODEL, method, PARAMS, t, IMAGES)[0]), theta)
  plain, expected = train(
      lambda p: loss_of(MODEL.apply({'params': p}, IMAGES)), PARAMS)
  assert expected[-1] < expected[0]
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  folded = trees.flatten(pj.fold(method, PARAMS, theta, SITES))
  for path, v in trees.flatten(plain).items():
    np.testing.assert_allclose(folded[path], v, atol=2e-5, err_msg=path)
  assert not np.array_equal(folded['pos'], PARAMS['pos'])  # the root's leaf


def test_head_alone_is_the_linear_probe():
  method = pj.load('selective.full', sites=dict(roles='head'))
  theta = pj.init(method, jax.random.key(3), SITES, PARAMS)
  assert set(flat_theta(theta)) == {'head/kernel', 'head/bias'}
  features = MODEL.apply({'params': PARAMS}, IMAGES, method='features')
  probe, expected = train(
      lambda p: loss_of(features @ p['kernel'] + p['bias']), PARAMS['head'])
  theta, losses = train(
      lambda t: loss_of(pj.apply(MODEL, method, PARAMS, t, IMAGES)[0]), theta)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  folded = pj.fold(method, PARAMS, theta, SITES)
  np.testing.assert_allclose(folded['head']['kernel'], probe['kernel'],
                             atol=2e-5)
  for path, v in trees.flatten(PARAMS).items():
    same = np.array_equal(trees.flatten(folded)[path], v)
    assert same != path.startswith('head/'), path


def test_count_and_group():
  method = pj.load('selective.full', group='head')
  theta = pj.init(method, jax.random.key(3), SITES, PARAMS)
  chosen = [s for s in SITES.values() if method.sites(s)]
  assert sum(map(method.count, chosen)) == pj.count(theta) == pj.count(PARAMS)
  assert {method.labels.get(n, '') for n in ('kernel', 'pos')} == {'head'}
  assert pj.load('selective.full').labels.get('kernel', '') == ''


def test_scanned_layers_hold_their_stack():
  model = MODEL.clone(scan=True)
  params = trees.stack(PARAMS)
  sites = pj.describe(model, IMAGES)
  method = pj.load('selective.full', sites=dict(roles='norm'))
  theta = pj.init(method, jax.random.key(3), sites, params)
  assert theta['full']['blocks/norm1']['scale'].shape == (2, 8)
  theta = noisy(theta)
  changed = pj.fold(method, params, theta, sites)
  expected = MODEL.apply({'params': trees.unstack(changed)}, IMAGES)
  np.testing.assert_allclose(
      pj.apply(model, method, params, theta, IMAGES)[0], expected, atol=1e-5)


def test_a_bfloat16_base_stays_bfloat16():
  model = MODEL.clone(dtype=jnp.bfloat16)
  params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), PARAMS)
  method = pj.load('selective.full')
  theta = pj.init(method, jax.random.key(3), SITES, params)
  assert {v.dtype for v in jax.tree.leaves(theta)} == {jnp.dtype('float32')}
  y = pj.apply(model, method, params, theta, IMAGES)[0]
  np.testing.assert_array_equal(y, model.apply({'params': params}, IMAGES))
  theta = noisy(theta)
  folded = pj.fold(method, params, theta, SITES)
  assert {v.dtype for v in jax.tree.leaves(folded)} == {jnp.dtype('bfloat16')}
  y = pj.apply(model, method, params, theta, IMAGES)[0]
  np.testing.assert_array_equal(y, model.apply({'params': folded}, IMAGES))


class Fused(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.Dense(12, name='qkv')(x))


def test_a_slice_of_a_fused_kernel_changes_its_columns_only():
  model, x = Fused(), jnp.ones((2, 4))
  params = noisy(jax.jit(model.init)(jax.random.key(0), x)['params'])
  sites = pj.describe(model, x)
  method = pj.load('selective.full', sites=dict(roles='k'))
  theta = noisy(pj.init(method, jax.random.key(1), sites, params))
  folded = pj.fold(method, params, theta, sites)
  np.testing.assert_array_equal(
      folded['qkv']['kernel'][:, 4:8], theta['full']['qkv[4:8]']['kernel'])
  for columns in (slice(0, 4), slice(8, 12)):
    np.testing.assert_array_equal(folded['qkv']['kernel'][:, columns],
                                  params['qkv']['kernel'][:, columns])
  np.testing.assert_allclose(pj.apply(model, method, params, theta, x)[0],
                             model.apply({'params': folded}, x), rtol=1e-5)


def test_errors():
  method = pj.load('selective.full', sites=dict(path='block_0/attn'))
  with pytest.raises(ValueError, match="block_0/attn.*Attention.*no parameters"
                     r" of its own.*leaf=\['bias', 'kernel'\]"):
    pj.init(method, jax.random.key(0), SITES, PARAMS)
  with pytest.raises(ValueError, match="'groop'; did you mean 'group'"):
    pj.load('selective.full', groop='head')
