"""Random mask: as many entries as it says, the others bit for bit the base's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax


@pytest.fixture(scope='module', name='made')
def _made():
  model = nn.Sequential([nn.Dense(20), nn.relu, nn.Dense(5)])
  x = jax.random.normal(jax.random.key(0), (4, 10))
  params = model.init(jax.random.key(1), x)['params']
  sites = peftjax.describe(model, x)
  method = peftjax.load('sparse.random_mask', density=0.06)
  theta = peftjax.init(method, jax.random.key(2), sites, params)
  return model, x, params, sites, method, theta


def test_support_has_the_size_it_says(made):
  _, _, _, sites, method, theta = made
  trained, frozen = peftjax.partition(method, theta)
  # 6 % of 10 x 20 is 12; of 20 biases it is 1.
  shapes = {n: v.shape for n, v in trained['random_mask']['layers_0'].items()}
  assert shapes == {'value.kernel': (12,), 'value.bias': (1,)}
  assert peftjax.count(trained) == sum(
      method.count(s) for s in sites.values() if method.sites(s))
  index = frozen['random_mask']['layers_0']['index.kernel']
  assert len(set(index.tolist())) == 12 and 0 <= index.min()
  assert index.max() < 200


def test_only_the_support_moves(made):
  model, x, params, sites, method, theta = made
  trained, frozen = peftjax.partition(method, theta)
  tx = optax.adamw(0.1, weight_decay=0.1)
  grads = jax.grad(lambda t: jnp.sum(peftjax.apply(
      model, method, params, peftjax.combine(t, frozen), x)[0] ** 2))(trained)
  updates, _ = tx.update(grads, tx.init(trained), trained)
  trained = optax.apply_updates(trained, updates)
  plain = peftjax.fold(method, params, peftjax.combine(trained, frozen), sites)
  index = np.asarray(frozen['random_mask']['layers_0']['index.kernel'])
  before = np.asarray(params['layers_0']['kernel']).reshape(-1)
  after = np.asarray(plain['layers_0']['kernel']).reshape(-1)
  moved = np.flatnonzero(before != after)
  assert set(moved) <= set(index) and len(moved) > 6


@pytest.mark.parametrize('density', [0, -0.1, 1.5])
def test_density_is_checked(density):
  with pytest.raises(ValueError, match=str(density)):
    peftjax.load('sparse.random_mask', density=density)
