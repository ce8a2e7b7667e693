"""COFT: the ball holds after every update, and its limits are OFT and base."""

import math

import jax
import numpy as np
import optax
import pytest

import peftjax
from peftjax.methods.orthogonal.coft import coft
from peftjax.methods.orthogonal.oft import oft

EPS = 0.2


def norms(q):
  """||Q_i||_F of stored triangles [n, ...]: each number stands there twice."""
  return np.sqrt(2 * (np.asarray(q, np.float64)**2).sum(-1))


def steps(method, case, n=4):
  """Theta of 'up' after each of n Adam updates of a fixed loss."""
  tx = optax.adam(0.05)
  theta = peftjax.init(method, jax.random.key(0), case.sites, case.params)

  @jax.jit
  def update(theta, state):
    def loss(theta):
      y, _ = peftjax.apply(case.model, method, case.params, theta, case.x)
      return ((y - 1)**2).sum()
    updates, state = tx.update(jax.grad(loss)(theta), state)
    theta = optax.apply_updates(theta, updates)
    return peftjax.after_step(method, theta), state

  state, out = tx.init(theta), []
  for _ in range(n):
    theta, state = update(theta, state)
    out.append(theta[method.name]['up']['q'])
  return out


@pytest.fixture(scope='module')
def free(mlp):
  return steps(oft(block_size=4), mlp)


def test_ball_holds_after_every_update(mlp, free):
  radius = EPS / math.sqrt(4)  # 16 inputs in blocks of 4
  assert (norms(free[-1]) > radius).all()  # OFT leaves the ball
  for q in steps(coft(eps=EPS, block_size=4), mlp):
    assert (norms(q) <= radius * (1 + 1e-6)).all()
    assert norms(q).max() > 0.99 * radius


def test_infinite_radius_is_oft(mlp, free):
  for a, b in zip(steps(coft(eps=float('inf'), block_size=4), mlp), free):
    np.testing.assert_array_equal(a, b)


def test_zero_radius_keeps_the_base(mlp):
  for q in steps(coft(eps=0, block_size=4), mlp, n=2):
    np.testing.assert_array_equal(q, np.zeros_like(q))


def test_projection_by_brute_force():
  """Also on stacked layers [2, n, ...], whose blocks are counted per layer."""
  method, (layers, n) = coft(eps=EPS), (2, 5)
  rng = np.random.default_rng(0)
  q = rng.normal(size=(layers, n, 6)) * np.logspace(-4, 0, n)[:, None]
  q[0, 2] = 0
  q = q.astype(np.float32)
  got = np.asarray(jax.jit(method.after_step)({'a': dict(q=q)})['a']['q'])
  radius = EPS / math.sqrt(n)
  inside = norms(q) <= radius
  assert inside.any() and not inside.all()
  np.testing.assert_array_equal(got[inside], q[inside])
  far = q[~inside]
  np.testing.assert_allclose(
      got[~inside], radius * far / norms(far)[:, None], rtol=1e-6)


@pytest.mark.parametrize('shared', [False, True])
def test_equals_peft(shared, mlp, randomised, adapted, peft_mlp):
  import peft
  import torch
  method = coft(eps=EPS, block_size=4, shared=shared)
  start = randomised(method, mlp, scale=0.05)
  theta = jax.jit(lambda t: peftjax.after_step(method, t))(start)
  y = adapted(method, mlp, theta)

  model, layers = peft_mlp(peft.OFTConfig(
      oft_block_size=4, target_modules=['0', '2'], use_cayley_neumann=False,
      coft=True, eps=EPS, block_share=shared))
  for name, layer in layers.items():
    layer.oft_R['default'].weight.data = torch.tensor(
        -start['coft'][name]['q'])
  out = model(torch.tensor(np.asarray(mlp.x)))  # projects its weights
  for name, layer in layers.items():
    want = -layer.oft_R['default'].weight.detach().numpy()
    np.testing.assert_allclose(theta['coft'][name]['q'], want, rtol=1e-5,
                               atol=1e-8)
  np.testing.assert_allclose(y, out.detach().numpy(), rtol=0, atol=1e-5)


def test_keywords_are_those_of_oft(mlp, randomised):
  """Each reaches OFT at its own place."""
  kwargs = dict(blocks=2, shared=True, cayley='neumann', terms=3,
                block_dropout=0.1)
  mine, theirs = coft(eps=1.0, **kwargs), oft(**kwargs)
  t = randomised(mine, mlp)['coft']['up']
  ctx = peftjax.Context('up', train=True, rng=jax.random.key(0))
  a, b = jax.jit(lambda t: (mine.prepare(t, ctx), theirs.prepare(t, ctx)))(t)
  np.testing.assert_array_equal(a['r'], b['r'])
  assert mine.count(mlp.sites['up']) == theirs.count(mlp.sites['up']) == 28


@pytest.mark.parametrize('eps', [-1e-3, float('nan')])
def test_refuses_a_bad_radius(eps):
  with pytest.raises(ValueError, match='eps=.* nearest is 0.0'):
    coft(eps=eps)
