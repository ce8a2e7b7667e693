"""OFT: invariants of a rotation, brute force, and Hugging Face PEFT."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from peftjax.methods.orthogonal.oft import oft
from peftjax.ops.energy import hyperspherical_energy


def rotation(q, b):
  """[d, d] block diagonal, by numpy in float64, from triangles q [n, ...]."""
  q = np.asarray(q, np.float64)
  out = np.zeros((len(q) * b,) * 2)
  for i, triangle in enumerate(q):
    s = np.zeros((b, b))
    s[np.triu_indices(b, 1)] = triangle
    s = s - s.T
    block = (np.eye(b) + s) @ np.linalg.inv(np.eye(b) - s)
    out[i * b:(i + 1) * b, i * b:(i + 1) * b] = block
  return out


def test_starts_as_base_bit_for_bit(mlp, adapted):
  method = oft(block_size=4)
  theta = peftjax.init(method, jax.random.key(0), mlp.sites, mlp.params)
  base = jax.jit(mlp.model.apply)({'params': mlp.params}, mlp.x)
  np.testing.assert_array_equal(adapted(method, mlp, theta), base)


def test_fold_keeps_angles_norms_and_energy(mlp, randomised, folded):
  method = oft(block_size=8)
  plain, _ = folded(method, mlp, randomised(method, mlp, scale=1.0))
  np.testing.assert_array_equal(plain['up']['bias'], mlp.params['up']['bias'])
  old, new = (np.asarray(p['up']['kernel']) for p in (mlp.params, plain))
  assert np.abs(new - old).max() > 0.1
  np.testing.assert_allclose(new.T @ new, old.T @ old, rtol=0, atol=1e-5)
  np.testing.assert_allclose(
      np.linalg.norm(new, axis=0), np.linalg.norm(old, axis=0), rtol=1e-5)
  energy = jax.jit(hyperspherical_energy)
  np.testing.assert_allclose(energy(new), energy(old), rtol=1e-5)


@pytest.mark.parametrize('kwargs', [
    dict(block_size=4), dict(blocks=2, shared=True),
    dict(block_size=4, cayley='neumann', terms=3)], ids=str)
def test_layer_equals_fold(kwargs, mlp, randomised, adapted, folded):
  method = oft(**kwargs)
  theta = randomised(method, mlp)
  np.testing.assert_allclose(
      adapted(method, mlp, theta), folded(method, mlp, theta)[1], rtol=0,
      atol=1e-5)


def test_conv_and_dense_general(mixed, randomised, adapted, folded):
  method = oft(block_size=4)
  theta = randomised(method, mixed)
  plain, y = folded(method, mixed, theta)
  np.testing.assert_allclose(
      adapted(method, mixed, theta), y, rtol=0, atol=1e-5)
  # By hand: patches are flattened as (c_in, kh, kw).
  flat = lambda k: np.asarray(k, np.float64).transpose(2, 0, 1, 3).reshape(
      16, 8)
  np.testing.assert_allclose(
      flat(plain['conv']['kernel']),
      rotation(theta['oft']['conv']['q'], 4) @ flat(
          mixed.params['conv']['kernel']), rtol=0, atol=1e-5)


def test_one_block_is_dense_cayley(mlp, randomised, folded):
  method = oft(blocks=1, sites=peftjax.select(path='up'))
  theta = randomised(method, mlp)
  assert theta['oft']['up']['q'].shape == (1, 16 * 15 // 2)
  want = rotation(theta['oft']['up']['q'], 16) @ np.asarray(
      mlp.params['up']['kernel'], np.float64)
  np.testing.assert_allclose(
      folded(method, mlp, theta)[0]['up']['kernel'], want, rtol=0, atol=1e-5)


def test_gradient_against_differences(mlp, randomised, loss_and_gradient):
  method = oft(block_size=4)
  theta = randomised(method, mlp)
  _, gradient = loss_and_gradient(method, mlp, theta)
  p = jax.tree.map(lambda v: np.asarray(v, np.float64), mlp.params)
  q = {n: np.asarray(theta['oft'][n]['q'], np.float64) for n in ('up', 'down')}

  def loss(q):
    h = np.asarray(mlp.x, np.float64)
    h = np.tanh(h @ rotation(q['up'], 4) @ p['up']['kernel'] + p['up']['bias'])
    h = h @ rotation(q['down'], 4) @ p['down']['kernel'] + p['down']['bias']
    return (h**2).sum()

  for name in q:
    want = np.zeros_like(q[name])
    for at in np.ndindex(want.shape):
      step = {n: np.zeros_like(v) for n, v in q.items()}
      step[name][at] = 1e-5
      plus, minus = (loss({n: v + s * step[n] for n, v in q.items()})
                     for s in (1, -1))
      want[at] = (plus - minus) / 2e-5
    np.testing.assert_allclose(gradient['oft'][name]['q'], want, rtol=1e-4,
                               atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize('kwargs,config,sign', [
    (dict(), dict(use_cayley_neumann=False), -1),
    (dict(shared=True), dict(use_cayley_neumann=False, block_share=True), -1),
    *((dict(cayley='neumann', terms=t),
       dict(use_cayley_neumann=True, num_cayley_neumann_terms=t), 1)
      for t in (2, 5))], ids=str)
def test_equals_peft(kwargs, config, sign, mlp, randomised, loss_and_gradient,
                     peft_mlp):
  import peft
  import torch
  method = oft(block_size=4, **kwargs)
  theta = randomised(method, mlp)
  (_, y), gradient = loss_and_gradient(method, mlp, theta)

  model, layers = peft_mlp(peft.OFTConfig(
      oft_block_size=4, target_modules=['0', '2'], **config))
  for name, layer in layers.items():
    layer.oft_R['default'].weight.data = torch.tensor(
        sign * theta['oft'][name]['q'])
  out = model(torch.tensor(np.asarray(mlp.x)))
  (out**2).sum().backward()
  np.testing.assert_allclose(y, out.detach().numpy(), rtol=0, atol=1e-5)
  for name, layer in layers.items():
    want = sign * layer.oft_R['default'].weight.grad.numpy()
    np.testing.assert_allclose(gradient['oft'][name]['q'], want, rtol=1e-4,
                               atol=1e-5 * np.abs(want).max())


def test_block_dropout(mlp, randomised, adapted):
  method = oft(block_size=4, block_dropout=0.6)
  theta = randomised(method, mlp)

  @jax.jit  # 6 blocks, of which floor(3.6) go
  def dropped(key):
    ctx = peftjax.Context('down', train=True, rng=key)
    r = method.prepare(theta['oft']['down'], ctx)['r']
    return (r == jnp.eye(4)).all((-2, -1))

  draws = np.stack([dropped(jax.random.key(seed)) for seed in range(4)])
  np.testing.assert_array_equal(draws.sum(1), [3] * 4)
  assert len(np.unique(draws, axis=0)) > 1

  plain = adapted(oft(block_size=4), mlp, theta)
  np.testing.assert_array_equal(adapted(method, mlp, theta), plain)
  noisy = adapted(method, mlp, theta, train=True, rng=jax.random.key(0))
  assert np.abs(noisy - plain).max() > 0.01
  with pytest.raises(ValueError, match="'up' needs a key .* rng"):
    adapted(method, mlp, theta, train=True)


def test_no_dropout_of_shared_blocks(mlp, randomised):
  method = oft(block_size=4, shared=True, block_dropout=0.6)
  t = randomised(method, mlp)['oft']['up']
  prepare = lambda train: jax.jit(lambda t: method.prepare(t, peftjax.Context(
      'up', train=train, rng=jax.random.key(0))))(t)['r']
  np.testing.assert_array_equal(prepare(True), prepare(False))


def test_forms_no_gradient_of_the_kernel(mlp, randomised):
  method = oft(block_size=4)
  theta = randomised(method, mlp)

  def by_fold(theta):
    plain = peftjax.fold(method, mlp.params, theta, mlp.sites)
    return mlp.model.apply({'params': plain}, mlp.x).sum()

  def by_layer(theta):
    return peftjax.apply(mlp.model, method, mlp.params, theta, mlp.x)[0].sum()

  shapes = r'f32\[(16,24|24,16|16,16|24,24)\] = dot_general'
  products = lambda f: re.findall(
      shapes, str(jax.make_jaxpr(jax.grad(f))(theta)))
  assert products(by_fold)  # the pattern finds such products
  assert not products(by_layer)


def test_count_and_default_size(mlp):
  for kwargs, up in ((dict(block_size=4), 16 * 3 // 2),
                     (dict(blocks=2), 16 * 7 // 2),
                     (dict(block_size=4, shared=True), 6),
                     (dict(), 16 * 15 // 2)):
    method = oft(**kwargs)
    theta = jax.eval_shape(lambda params: peftjax.init(
        method, jax.random.key(0), mlp.sites, params), mlp.params)
    assert peftjax.count(theta['oft']['up']) == up
    assert method.count(mlp.sites['up']) == up
  wide = mlp.sites['up']._replace(params=dict(
      kernel=jax.ShapeDtypeStruct((720, 5), jnp.float32)))
  assert oft().count(wide) == 720 * (30 - 1) // 2  # 32 does not divide 720


@pytest.mark.parametrize('kwargs,message', [
    (dict(block_size=6), "block_size=6 at 'up': .* 16 inputs .* 4 or 8"),
    (dict(block_size=1), "block_size=1 at 'up': .* nearest: 2"),
    (dict(block_size=0), "block_size=0 at 'up': .* nearest: 2"),
    (dict(blocks=3), "blocks=3 at 'up': .* nearest: 2 or 4"),
    (dict(blocks=16), "blocks=16 at 'up': .* nearest: 8"),
    (dict(block_size=4, blocks=4), 'expected one of them'),
    (dict(cayley='exakt'), "unknown cayley 'exakt'.*'exact'"),
    (dict(cayley='neumann', terms=0), 'terms=0: .* nearest is 1'),
    (dict(cayley='neumann', terms=65), 'terms=65: .* nearest is 64'),
    (dict(block_dropout=1.0), 'block_dropout=1.0: .* nearest is 0.99'),
], ids=str)
def test_refuses(kwargs, message, mlp):
  with pytest.raises(ValueError, match=message):
    peftjax.init(oft(**kwargs), jax.random.key(0), mlp.sites, mlp.params)
