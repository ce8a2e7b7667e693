"""BOFT: brute-force butterflies, its limits, and Hugging Face PEFT."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from peftjax.methods.orthogonal.boft import boft
from peftjax.methods.orthogonal.oft import oft
from peftjax.ops.energy import hyperspherical_energy

B, D = 4, 16
UP = peftjax.select(path='up')


def butterfly(q):
  """M [d, d] in float64 from q [m, n, ...] by permutation matrices."""
  q = np.asarray(q, np.float64)
  m, n, _ = q.shape
  d, h = n * B, B // 2
  out = np.eye(d)
  for i in range(m):
    blocks = np.zeros((d, d))
    for j in range(n):
      s = np.zeros((B, B))
      s[np.triu_indices(B, 1)] = q[i, j]
      s = s - s.T
      blocks[j * B:(j + 1) * B, j * B:(j + 1) * B] = (
          (np.eye(B) + s) @ np.linalg.inv(np.eye(B) - s))
    groups = range(0, 2 * n, 2**(i + 1))
    halves = [half for first in groups for k in range(2**i)
              for half in (first + k, first + k + 2**i)]
    order = np.concatenate([np.arange(a * h, a * h + h) for a in halves])
    permutation = np.eye(d)[:, order]
    out = permutation @ blocks @ permutation.T @ out
  return out


def rotation(method, q):
  """M as the method folds it into the identity."""
  @jax.jit
  def run(q):
    t = method.prepare(dict(q=q, s=jnp.ones(D)), peftjax.Context('up'))
    return method.fold(dict(kernel=jnp.eye(D)), t)['kernel']
  return np.asarray(run(q))


def test_starts_as_base_bit_for_bit(mlp, adapted):
  method = boft(B, 2)
  theta = peftjax.init(method, jax.random.key(0), mlp.sites, mlp.params)
  base = jax.jit(mlp.model.apply)({'params': mlp.params}, mlp.x)
  np.testing.assert_array_equal(adapted(method, mlp, theta), base)


@pytest.mark.parametrize('m', [1, 2, 3])
def test_equals_permutation_matrices(m, mlp, randomised, adapted):
  method = boft(B, m, sites=UP)
  theta = randomised(method, mlp)
  q, s = (np.asarray(theta['boft']['up'][n], np.float64) for n in 'qs')
  rotated = butterfly(q)
  np.testing.assert_allclose(
      rotation(method, theta['boft']['up']['q']), rotated, rtol=0, atol=1e-5)
  np.testing.assert_allclose(rotated @ rotated.T, np.eye(D), atol=1e-12)

  p = jax.tree.map(lambda v: np.asarray(v, np.float64), mlp.params)
  h = np.asarray(mlp.x, np.float64) @ rotated @ p['up']['kernel'] * s
  h = np.tanh(h + p['up']['bias'])  # the scale leaves the bias alone
  np.testing.assert_allclose(
      adapted(method, mlp, theta), h @ p['down']['kernel'] + p['down']['bias'],
      rtol=0, atol=1e-5)


def test_layer_equals_fold(mlp, randomised, adapted, folded):
  method = boft(B, 2)
  theta = randomised(method, mlp)
  np.testing.assert_allclose(
      adapted(method, mlp, theta), folded(method, mlp, theta)[1], rtol=0,
      atol=1e-5)


def test_conv_and_dense_general(mixed, randomised, adapted, folded):
  method = boft(B, 2)
  theta = randomised(method, mixed)
  plain, y = folded(method, mixed, theta)
  np.testing.assert_allclose(
      adapted(method, mixed, theta), y, rtol=0, atol=1e-5)
  flat = lambda k: np.asarray(k, np.float64).transpose(2, 0, 1, 3).reshape(D, 8)
  t = theta['boft']['conv']
  want = butterfly(t['q']) @ flat(mixed.params['conv']['kernel'])
  np.testing.assert_allclose(
      flat(plain['conv']['kernel']), want * np.asarray(t['s']), rtol=0,
      atol=1e-5)


def test_layer_without_bias():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x, kernel, q, s = normal(5, D), normal(D, 6), normal(2, 4, 6), normal(6)
  model = nn.Dense(6, use_bias=False)
  y, _ = jax.jit(lambda theta: peftjax.apply(
      model, boft(B, 2), dict(kernel=kernel), theta, x))(
          {'boft': {'': dict(q=q, s=s)}})
  want = x.astype(np.float64) @ butterfly(q) @ kernel.astype(np.float64) * s
  np.testing.assert_allclose(y, want, rtol=0, atol=1e-5)


def test_energy_is_kept_also_by_positive_scales(mlp, randomised, folded):
  method = boft(B, 2, sites=UP)
  theta = randomised(method, mlp)
  theta['boft']['up']['s'] = np.exp(theta['boft']['up']['s'])
  plain, _ = folded(method, mlp, theta)
  old, new = mlp.params['up']['kernel'], plain['up']['kernel']
  assert np.abs(new - old).max() > 0.1
  energy = jax.jit(hyperspherical_energy)
  np.testing.assert_allclose(energy(new), energy(old), rtol=1e-5)


def test_one_factor_is_oft(mlp, randomised, adapted):
  one = randomised(oft(B), mlp)
  theta = {path: dict(q=t['q'][None], s=np.ones_like(mlp.params[path]['bias']))
           for path, t in one['oft'].items()}
  np.testing.assert_allclose(
      adapted(boft(B, 1), mlp, {'boft': theta}), adapted(oft(B), mlp, one),
      rtol=0, atol=1e-6)


def test_identity_factors_give_the_shorter_product():
  q = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
  q[2] = 0
  np.testing.assert_allclose(
      rotation(boft(B, 3), q), rotation(boft(B, 2), q[:2]), rtol=0, atol=1e-6)


def test_reach():
  """log2(d / B) + 1 factors join all to all; with one less, half to half."""
  q = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
  assert (rotation(boft(B, 3), q) != 0).all()
  half = np.kron(np.eye(2), np.ones((8, 8)))
  np.testing.assert_array_equal(rotation(boft(B, 2), q[:2]) != 0, half)


@pytest.mark.filterwarnings('ignore:Failed to load the CUDA extension')
@pytest.mark.filterwarnings('ignore:Setting boft_n_butterfly_factor to 1')
def test_equals_peft(mlp, randomised, loss_and_gradient, peft_mlp):
  """With one factor, all that PEFT runs without its CUDA extension."""
  import peft
  import torch
  method = boft(B, 1)
  theta = randomised(method, mlp)
  (_, y), gradient = loss_and_gradient(method, mlp, theta)

  model, layers = peft_mlp(peft.BOFTConfig(
      boft_block_size=B, boft_n_butterfly_factor=1, target_modules=['0', '2']))
  rows, cols = np.triu_indices(B, 1)
  for name, layer in layers.items():
    q = np.asarray(theta['boft'][name]['q'])
    a = np.zeros((*q.shape[:2], B, B), np.float32)
    a[..., rows, cols], a[..., cols, rows] = -q, q  # PEFT's sign
    layer.boft_R['default'].data = torch.tensor(a)
    layer.boft_s['default'].data = torch.tensor(
        np.asarray(theta['boft'][name]['s'])[:, None])
  out = model(torch.tensor(np.asarray(mlp.x)))
  (out**2).sum().backward()
  np.testing.assert_allclose(y, out.detach().numpy(), rtol=0, atol=1e-5)
  for name, layer in layers.items():
    a = layer.boft_R['default'].grad.numpy()
    want = dict(q=a[..., cols, rows] - a[..., rows, cols],
                s=layer.boft_s['default'].grad.numpy()[:, 0])
    for leaf in 'qs':
      np.testing.assert_allclose(
          gradient['boft'][name][leaf], want[leaf], rtol=1e-4,
          atol=1e-5 * np.abs(want[leaf]).max())


def test_block_dropout(mlp, randomised, adapted):
  method = boft(B, 2, block_dropout=0.6)
  theta = randomised(method, mlp)

  @jax.jit  # 6 blocks a factor, of which floor(3.6) go
  def dropped(key):
    ctx = peftjax.Context('down', train=True, rng=key)
    r = method.prepare(theta['boft']['down'], ctx)['r']
    return (r == jnp.eye(B)).all((-2, -1))

  draws = np.stack([dropped(jax.random.key(seed)) for seed in range(8)])
  np.testing.assert_array_equal(np.sort(draws.sum(2), 1), [[0, 3]] * 8)
  assert draws.any((0, 2)).all()  # both factors have their turn

  plain = adapted(boft(B, 2), mlp, theta)
  np.testing.assert_array_equal(adapted(method, mlp, theta), plain)
  noisy = adapted(method, mlp, theta, train=True, rng=jax.random.key(0))
  assert np.abs(noisy - plain).max() > 0.01
  with pytest.raises(ValueError, match="'up' needs a key .* rng"):
    adapted(method, mlp, theta, train=True)


def test_forms_no_gradient_of_the_kernel(mlp, randomised):
  method = boft(B, 2)
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


def test_count_and_groups(mlp):
  method = boft(B, 2)
  theta = jax.eval_shape(lambda params: peftjax.init(
      method, jax.random.key(0), mlp.sites, params), mlp.params)
  assert peftjax.count(theta['boft']['up']) == 2 * 16 * 3 // 2 + 24
  assert method.count(mlp.sites['up']) == 2 * 16 * 3 // 2 + 24
  assert method.labels == dict(s='no_decay')


@pytest.mark.parametrize('args,message', [
    ((6, 1), "'up': block_size=6 .* width 16"),
    ((8, 3), "'up': block_size=8 .* factors=3"),
    ((1, 1), 'block_size=1: .* nearest is 2'),
    ((4, 0), 'factors=0: .* nearest is 1'),
    ((4, 2, -0.1), 'block_dropout=-0.1: .* nearest is 0.0'),
], ids=str)
def test_refuses(args, message, mlp):
  with pytest.raises(ValueError, match=message):
    peftjax.init(boft(*args), jax.random.key(0), mlp.sites, mlp.params)
