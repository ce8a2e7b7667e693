"""Selective LoRA: its gates, their gradient, its penalty and what is kept."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax
from peftjax import optim
from peftjax import phases
from peftjax import trees
import pytest

NAME = 'lowrank.selective_lora'


def load(case, **kwargs):
  return peftjax.load(NAME, **{'sites': case.chosen, 'rank': 2, **kwargs})


def with_gates(theta, **u):
  """Theta with u at the named sites."""
  t = theta['selective_lora']
  return {'selective_lora': {
      p: {**v, 'u': jnp.float32(u.get(p, v['u']))} for p, v in t.items()}}


def test_starts_open_and_as_the_base(case):
  c = case('mlp')
  method = load(c)
  theta = peftjax.init(method, jax.random.key(0), c.sites, c.params)
  for site, t in theta['selective_lora'].items():
    assert t['u'] == np.float32(0.15) and not t['b'].any()
    assert trees.count(t) == method.count(c.sites[site])
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_array_equal(y, c.model.apply({'params': c.params}, c.x))
  groups = optim.labels(method, theta)['selective_lora']['one']
  assert groups == dict(a='', b='', u='no_decay')


@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_open_gates_leave_a_lora(case, moved, name):
  """Without a penalty and with u above tau: the same to the bit."""
  c = case(name)
  method = load(c, lam=0.0)
  lora = peftjax.load('lowrank.lora', rank=2, sites=c.chosen)
  theta = moved(lora, c)
  gated = {'selective_lora': {
      p: {**t, 'u': jnp.float32(0.1)} for p, t in theta['lora'].items()}}

  def run(method, theta):
    def loss(theta):
      y, aux = peftjax.apply(c.model, method, c.params, theta, c.x)
      return jnp.sin(y).sum() + peftjax.penalty(method, theta, aux, 10**6), y
    (_, y), grads = jax.value_and_grad(loss, has_aux=True)(theta)
    return y, *grads.values(), peftjax.fold(method, c.params, theta, c.sites)

  y, grads, folded = run(method, gated)
  want, grads_want, folded_want = run(lora, theta)
  for t in grads.values():
    assert t.pop('u')
  jax.tree.map(np.testing.assert_array_equal, (y, grads, folded),
               (want, grads_want, folded_want))


@pytest.mark.parametrize('one, two', [(0.5, 0.5), (0.0, 0.5), (0.0, -0.3)])
def test_gradient_of_u_is_that_of_the_gate(case, moved, one, two):
  """<dL/d(gated), s x A B>, which a gate of any value has, open or closed."""
  c = case('mlp')
  method = load(c, alpha=3.0)
  theta = with_gates(moved(method, c), one=one, two=two)
  t = theta['selective_lora']

  def by_hand(t, gate):
    x = jnp.asarray(c.x)
    for name in ('one', 'two'):
      p = c.params[name]
      z = 1.5 * x @ t[name]['a'] @ t[name]['b']
      x = x @ p['kernel'] + p['bias'] + gate[name] * z
      x = jnp.tanh(x) if name == 'one' else x
    return jnp.sin(x).sum()

  gate = dict(one=float(one >= 0.1), two=float(two >= 0.1))
  want, slope = jax.jit(jax.grad(by_hand, (0, 1)))(t, gate)

  @jax.jit
  @jax.grad
  def grads(theta):
    y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
    return jnp.sin(y).sum()

  got = grads(theta)['selective_lora']
  for name in ('one', 'two'):
    assert abs(slope[name]) > 1e-2
    np.testing.assert_allclose(got[name]['u'], slope[name], rtol=1e-4)
    for leaf in 'ab':
      np.testing.assert_allclose(
          got[name][leaf], want[name][leaf], rtol=0, atol=1e-5)
      assert got[name][leaf].any() == bool(gate[name])


@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_closed_gates_fold_to_the_base(case, moved, name):
  c = case(name)
  method = load(c, tau=0.15)
  theta = moved(method, c)
  theta = with_gates(theta, **dict.fromkeys(
      theta['selective_lora'], 0.1499))
  jax.tree.map(np.testing.assert_array_equal, c.params,
               peftjax.fold(method, c.params, theta, c.sites))
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_array_equal(y, c.model.apply({'params': c.params}, c.x))


# --------------------------------------------------------- penalty and warm-up
def test_penalty_is_the_mean_over_gates_after_the_warm_up(case, moved):
  c = case('mlp')
  method = load(c, lam=0.6, warmup=3)
  theta = with_gates(moved(method, c), one=-0.5, two=0.2)
  cost = jax.jit(lambda theta, step: peftjax.penalty(method, theta, {}, step))
  for step, want in ((0, 0), (2, 0), (3, 0.21), (100, 0.21)):
    np.testing.assert_allclose(cost(theta, step), want, rtol=1e-6)
  slopes = jax.grad(cost)(theta, 3)['selective_lora']
  np.testing.assert_allclose(slopes['one']['u'], -0.3)
  np.testing.assert_allclose(slopes['two']['u'], 0.3)
  assert not slopes['one']['a'].any()


def test_a_dead_block_closes_when_the_penalty_alone_says(case):
  """Without data u falls by lr lam / N a step, from the step `warmup` on."""
  c = case('mlp')
  method = load(c, lam=0.2, warmup=4)
  theta = peftjax.init(method, jax.random.key(0), c.sites, c.params)
  slope = jax.jit(jax.grad(
      lambda theta, step: peftjax.penalty(method, theta, {}, step)))
  for step in range(12):
    grads = slope(theta, step)
    theta = jax.tree.map(lambda v, g: v - 0.1 * g, theta, grads)
    u = theta['selective_lora']['one']['u']
    np.testing.assert_allclose(u, 0.15 - 0.01 * max(0, step - 3), atol=1e-6)
  assert u < 0.1


class Deep(nn.Module):
  """Three blocks, scanned or not, and a last layer."""

  scan: bool = False

  @nn.compact
  def __call__(self, x):
    if self.scan:
      x, _ = nn.scan(Part, variable_axes={'params': 0}, length=3,
                     split_rngs={'params': True})(name='blocks')(x, None)
    else:
      for i in range(3):
        x, _ = Part(name=f'block_{i}')(x, None)
    return nn.Dense(8, name='last')(x)


class Part(nn.Module):

  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(8, name='up')(x), None


@pytest.fixture(scope='module')
def deep():
  """(x, sites, params) of `Deep`."""
  x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  params = jax.jit(Deep().init)(jax.random.key(1), x)['params']
  return x, peftjax.describe(Deep(), x), params


KERNELS = peftjax.select(kind='Dense')


def test_a_larger_weight_closes_more_blocks(deep):
  x, sites, params = deep
  teacher = peftjax.load('lowrank.lora', rank=2, alpha=2.0, sites=KERNELS)
  rng = np.random.default_rng(3)
  goal = jax.tree.map(lambda v: jnp.asarray(
      rng.normal(size=v.shape), jnp.float32), peftjax.init(
          teacher, jax.random.key(0), sites, params))
  for size, t in zip((0.3, 0.1, 0.03, 0.01), goal['lora'].values()):
    t['b'] = size * t['b']
  y, _ = peftjax.apply(Deep(), teacher, params, goal, x)

  def active(lam):
    method = peftjax.load(
        NAME, rank=2, alpha=2.0, lam=lam, warmup=20, sites=KERNELS)
    theta = peftjax.init(method, jax.random.key(0), sites, params)
    tx = optax.adam(1e-2)

    def loss(theta, step):
      out, aux = peftjax.apply(Deep(), method, params, theta, x)
      return jnp.square(out - y).mean() + peftjax.penalty(
          method, theta, aux, step)

    def one(carry, step):
      theta, state = carry
      updates, state = tx.update(jax.grad(loss)(theta, step), state)
      return (optax.apply_updates(theta, updates), state), None

    (theta, _), _ = jax.jit(lambda c: jax.lax.scan(one, c, jnp.arange(150)))(
        (theta, tx.init(theta)))
    return sum(bool(t['u'] >= 0.1) for t in theta['selective_lora'].values())

  found = [active(lam) for lam in (0.0, 0.1, 1.0, 30.0)]
  assert found == sorted(set(found), reverse=True)
  assert found[0] == 4 and found[-1] == 0


# ------------------------------------------------------------- what is kept
def finished(method, theta, sites):
  """(last method, theta) after the run."""
  stage = phases.schedule(method, 10)[-1]
  assert stage.start == stage.end == 10
  return stage.methods, stage.convert(theta, jax.random.key(0), sites)


@pytest.fixture(scope='module')
def trained(deep):
  """Method and theta of `Deep` with block_1 and the last layer closed."""
  _, sites, params = deep
  method = peftjax.load(NAME, rank=2, sites=KERNELS)
  theta = peftjax.init(method, jax.random.key(0), sites, params)
  rng = np.random.default_rng(4)
  theta = jax.tree.map(lambda v: jnp.asarray(
      rng.normal(size=v.shape), jnp.float32), theta)
  for path, t in theta['selective_lora'].items():
    t['u'] = jnp.float32(0.05 if path in ('block_1/up', 'last') else 0.3)
  return method, theta


def test_the_last_phase_keeps_open_blocks_alone(deep, trained, tmp_path):
  x, sites, params = deep
  method, theta = trained
  last, kept = finished(method, theta, sites)
  assert {p: set(t) for p, t in kept['selective_lora'].items()} == {
      'block_0/up': {'a', 'b'}, 'block_2/up': {'a', 'b'}}
  run = lambda m, t: peftjax.apply(Deep(), m, params, t, x)[0]
  np.testing.assert_allclose(run(last, kept), run(method, theta), atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal,
               peftjax.fold(last, params, kept, sites),
               peftjax.fold(method, params, theta, sites))
  peftjax.save_adapter(tmp_path / 'adapter', last, kept, sites, params)
  back = peftjax.load_adapter(tmp_path / 'adapter', sites, params)
  assert back.meta['stored'] == 2 * 2 * (8 + 8)
  jax.tree.map(np.testing.assert_array_equal, back.theta, kept)
  np.testing.assert_array_equal(
      run(back.methods, back.theta), run(last, kept))


def test_closed_layers_of_a_stack_are_zeros(deep, trained):
  x, sites, params = deep
  method, theta = trained
  at = lambda tree: {p: tree[p] for p in sorted(tree) if 'block' in p}
  blocks = at(theta['selective_lora'])
  stacked = {'selective_lora': {
      'blocks/up': jax.tree.map(lambda *v: jnp.stack(v), *blocks.values()),
      'last': theta['selective_lora']['last']}}
  params = trees.stack(params)
  found = peftjax.describe(Deep(scan=True), x)
  for step in (0, 100):
    np.testing.assert_allclose(
        peftjax.penalty(method, stacked, {}, step),
        peftjax.penalty(method, theta, {}, step), rtol=1e-6)
  last, kept = finished(method, stacked, found)
  assert set(kept['selective_lora']) == {'blocks/up'}
  for n, v in kept['selective_lora']['blocks/up'].items():
    np.testing.assert_array_equal(v[1], 0)
    np.testing.assert_array_equal(v[0], blocks['block_0/up'][n])
    np.testing.assert_array_equal(v[2], blocks['block_2/up'][n])
  run = lambda m, t: peftjax.apply(Deep(scan=True), m, params, t, x)[0]
  np.testing.assert_allclose(run(last, kept), run(method, stacked), atol=1e-5)
  stacked['selective_lora']['blocks/up']['u'] *= 0
  last, kept = finished(method, stacked, found)
  assert kept == {'selective_lora': {}}
  np.testing.assert_array_equal(
      run(last, kept), Deep(scan=True).apply({'params': params}, x))


@pytest.mark.parametrize('kwargs, message', [
    (dict(lam=-1), 'selective_lora: lam=-1: expected a finite number, at lea'),
    (dict(lam=float('nan')), 'lam=nan: expected a finite number'),
    (dict(warmup=-1), 'warmup=-1: expected a number of steps, at least 0'),
    (dict(tau=0.0), 'tau=0.0: expected a finite number above 0, or the pen'),
    (dict(start=0.05), 'start=0.05: expected .* at least tau=0.1, or no block'),
    (dict(rank=7), "rank 7 at 'two': expected .* nearest is 6"),
    (dict(dropout=1.0), r'dropout=1.0: expected a rate .* nearest is 0.9')])
def test_bad_arguments(case, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    peftjax.init(load(c, **kwargs), jax.random.key(0), c.sites, c.params)
