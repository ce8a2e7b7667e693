"""DoRA against its closed forms, brute force and Hugging Face PEFT."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax.methods.lowrank import dora as dora_lib
from peftjax.methods.lowrank.lora import dropped
import pytest

RNG = np.random.default_rng(5)


def load(case, **kwargs):
  return peftjax.load('lowrank.dora', **{'sites': case.chosen, **kwargs})


# ----------------------------------------------------------------- closed forms
def test_columns_point_along_the_sum_and_are_as_long_as_m(case, moved):
  c = case('mlp')
  method = load(c, rank=3, alpha=5.0)
  theta = moved(method, c)
  folded = peftjax.fold(method, c.params, theta, c.sites)
  for name, t in theta['dora'].items():
    k = np.float64(c.params[name]['kernel'])
    assert t['m'].shape == (k.shape[1],)
    for j in range(k.shape[1]):
      v = k[:, j] + 5 / 3 * np.float64(t['a']) @ np.float64(t['b'][:, j])
      want = t['m'][j] * v / np.sqrt((v ** 2).sum())
      np.testing.assert_allclose(
          folded[name]['kernel'][:, j], want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(folded[name]['bias'], c.params[name]['bias'])


def test_the_norm_is_over_the_inputs():
  """A square kernel, on which the other axis gives no error but its number."""
  model, x = nn.Dense(2), np.float32([[1, 10]])
  params = dict(kernel=np.float32([[3, 0], [4, 1]]), bias=np.float32([0, 7]))
  sites = peftjax.describe(model, x)
  method = peftjax.load(
      'lowrank.dora', rank=1, sites=peftjax.select(kind='Dense'))
  theta = peftjax.init(method, jax.random.key(0), sites, params)
  np.testing.assert_allclose(theta['dora']['']['m'], [5, 1])  # rows: 3, 4.12
  theta['dora']['']['m'] = np.float32([10, 3])
  y, _ = peftjax.apply(model, method, params, theta, x)
  np.testing.assert_allclose(y, [[2 * 43, 3 * 10 + 7]], rtol=1e-6)


@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_starts_as_the_base_and_learns_by_two_steps(case, name):
  c = case(name)
  method = load(c, rank=2)
  theta = peftjax.init(method, jax.random.key(0), c.sites, c.params)

  @jax.jit
  def run(theta):
    def loss(theta):
      y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
      return jnp.sin(y).sum(), y
    grads, y = jax.grad(loss, has_aux=True)(theta)
    return grads, y, jax.tree.map(lambda v, g: v - 0.1 * g, theta, grads)

  first, y, theta = run(theta)
  np.testing.assert_allclose(
      y, c.model.apply({'params': c.params}, c.x), rtol=0, atol=1e-6)
  second, *_ = run(theta)
  for site, g in second['dora'].items():
    assert np.abs(first['dora'][site]['m']).max() > 1e-2
    assert min(np.abs(v).max() for v in g.values()) > 1e-3


@pytest.mark.parametrize('size', [0, 0.1, 1, 30])
def test_factored_norms_are_those_of_the_sum(size):
  k, a, b = (RNG.normal(size=s) / 20 for s in ((400, 50), (400, 8), (8, 50)))
  b *= size
  got = dora_lib.norms(jnp.float32(k), dict(
      a=jnp.float32(a), b=jnp.float32(b), scale=jnp.float32(2)))
  np.testing.assert_allclose(
      got, np.linalg.norm(k + 2 * a @ b, axis=0), rtol=1e-6)


@pytest.mark.parametrize('share, error', [(0.1, 3e-4), (0.01, 3e-2)])
def test_factored_norms_where_the_delta_cancels_the_kernel(share, error):
  a, b = RNG.normal(size=(400, 8)), RNG.normal(size=(8, 50))
  rest = RNG.normal(size=(400, 50))
  rest *= share * np.linalg.norm(a @ b, axis=0) / np.linalg.norm(rest, axis=0)
  k, a, b = np.float32(a @ b + rest), np.float32(a), np.float32(-b)
  got = dora_lib.norms(k, dict(a=a, b=b, scale=jnp.float32(1)))
  want = np.linalg.norm(np.float64(k) + np.float64(a) @ np.float64(b), axis=0)
  np.testing.assert_allclose(got, want, rtol=error)
  whole = dora_lib.norms(k - k % 1, dict(  # nothing is left of any column
      a=np.eye(400, dtype=np.float32), b=-(k - k % 1), scale=jnp.float32(1)))
  assert np.isfinite(whole).all() and (whole > 0).all()


def test_a_column_of_zeros_is_alive(case):
  c = case('mlp')
  method = load(c, rank=2)
  c.params['two']['kernel'][:, 3] = 0
  theta = peftjax.init(method, jax.random.key(0), c.sites, c.params)
  base = c.model.apply({'params': c.params}, c.x)
  for _ in range(3):
    def loss(theta):
      y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
      return jnp.square(y - 1).sum(), y
    grads, y = jax.grad(loss, has_aux=True)(theta)
    if base is not None:
      np.testing.assert_allclose(y, base, rtol=0, atol=1e-6)
      base = None
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    theta = jax.tree.map(lambda v, g: v - 0.01 * g, theta, grads)
  folded = peftjax.fold(method, c.params, theta, c.sites)
  assert np.abs(folded['two']['kernel'][:, 3]).max() > 1e-4


def test_around_another_method_the_norm_is_of_what_that_one_made(case, moved):
  c = case('mlp')
  two = (peftjax.load('lowrank.lora', rank=2, sites=c.chosen), load(c, rank=2))
  theta = {m.name: moved(m, c)[m.name] for m in two}
  run = jax.jit(lambda t: peftjax.apply(c.model, two, c.params, t, c.x)[0])
  folded = peftjax.fold(two, c.params, theta, c.sites)
  np.testing.assert_allclose(
      np.linalg.norm(folded['two']['kernel'], axis=0),
      np.abs(theta['dora']['two']['m']), rtol=1e-5)
  np.testing.assert_allclose(
      run(theta), c.model.apply({'params': folded}, c.x), rtol=0, atol=1e-5)


def test_no_gradient_of_the_kernels_shape():
  """No product of the step is as large as the kernel, either way round."""
  model, x = nn.Dense(37), np.ones((11, 53), np.float32)
  params = jax.tree.map(np.asarray, model.init(jax.random.key(0), x)['params'])
  method = peftjax.load(
      'lowrank.dora', rank=2, sites=peftjax.select(kind='Dense'))
  theta = peftjax.init(method, jax.random.key(0),
                       peftjax.describe(model, x), params)

  def products(method):
    step = jax.grad(lambda t: jnp.square(
        peftjax.apply(model, method, params, t, x)[0]).sum())
    text = str(jax.make_jaxpr(step)(theta))
    lines = [l for l in text.splitlines() if 'dot_general' in l]
    assert lines
    return [l for l in lines if 'f32[53,37] = dot' in l
            or 'f32[37,53] = dot' in l]

  assert products(method) == []
  assert products(method._replace(layer=None))  # folding forms both


def test_small_changes_of_m_survive_bfloat16(case):
  c = case('mlp')
  method = load(c, rank=2)
  theta = peftjax.init(method, jax.random.key(0), c.sites, c.params)
  model = nn.Dense(10, dtype=jnp.bfloat16, name='one')
  run = lambda m: np.float32(peftjax.apply(
      model, load(c, rank=2, sites=peftjax.select(kind='Dense')),
      c.params['one'], {'dora': {'': {**theta['dora']['one'], 'm': m}}},
      c.x)[0])
  m = theta['dora']['one']['m']
  change = run(1.003 * m) - run(m)  # above 1, bfloat16 has steps of 0.0078
  assert np.abs(change).max() > 0


def test_options(case):
  c = case('mlp')
  method = load(c, rank=3, rank_pattern={'two': 1}, scaling='rslora')
  theta = peftjax.init(method, jax.random.key(0), c.sites, c.params)['dora']
  assert theta['one']['a'].shape == (12, 3)
  assert theta['two']['b'].shape == (1, 6)
  assert {n: method.count(c.sites[n]) for n in theta} == dict(
      one=3 * 22 + 10, two=16 + 6)
  assert method.labels == dict(m='no_decay')


@pytest.mark.parametrize('kwargs, message', [
    (dict(rank=7), "rank 7 at 'two': expected .* from 1 to 6 .*nearest is 6"),
    (dict(alpha=-1.0), 'alpha=-1.0: expected a positive number'),
    (dict(dropout=1.5), r'dropout=1.5: expected a rate in \[0, 1\)'),
    (dict(scaling='rs'), "unknown scaling 'rs'.*'rslora'"),
    (dict(rank_pattern={'onne': 1}), "'onne' matches none .*'one'")])
def test_bad_arguments(case, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    peftjax.init(load(c, **{'rank': 2, **kwargs}), jax.random.key(0), c.sites,
                 c.params)


# ------------------------------------------------------------- another library
@pytest.mark.parametrize('name, rslora', [
    ('mlp', False), ('mlp', True), ('image', False), ('words', False)])
def test_equals_peft(case, moved, twin, name, rslora):
  c = case(name)
  method = load(
      c, rank=2, alpha=3.0, scaling='rslora' if rslora else 'lora')
  other = twin(c, r=2, lora_alpha=3, use_rslora=rslora, use_dora=True)
  start = peftjax.init(method, jax.random.key(0), c.sites, c.params)
  for site, parts in other.parts.items():  # the convolution's norm axis, too
    np.testing.assert_allclose(
        start['dora'][site]['m'], other.matrix(parts['m']), rtol=1e-5)
  other.check(method, moved(method, c))


def test_dropout_is_pefts(case, moved, twin):
  """The same mask in both: PEFT's dropout is replaced by what ours gave."""
  torch = pytest.importorskip('torch')
  c = case('mlp')
  method = load(c, rank=2, alpha=3.0, dropout=0.4)
  other = twin(c, r=2, lora_alpha=3, use_dora=True, lora_dropout=0.4)
  t = moved(method, c)['dora']
  other.put(t)
  p = c.params['one']
  f = lambda x: x @ p['kernel'] + p['bias']
  ctx = peftjax.Context(
      'one', c.sites['one'], p, train=True, rng=jax.random.key(3),
      dot=jnp.matmul, kernel=lambda: p['kernel'])
  h = dropped(c.x, 0.4, ctx)
  assert (h == 0).any() and (h != 0).any()

  class Given(torch.nn.Module):

    def forward(self, x):
      del x
      return other.tensor(h)

  layer = other.layers['one'].train()
  layer.lora_dropout['default'] = Given()
  got = method.layer(f, c.x, method.prepare(t['one'], ctx), ctx)
  want = layer(other.tensor(c.x)).detach()
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  still = method.layer(f, c.x, method.prepare(t['one'], ctx),
                       ctx._replace(train=False))
  assert np.abs(got - still).max() > 0.1
  layer.lora_dropout['default'] = torch.nn.Identity()
  np.testing.assert_allclose(
      still, layer(other.tensor(c.x)).detach(), rtol=0, atol=1e-5)


class Fused(nn.Module):

  @nn.compact
  def __call__(self, x):
    q, k, v = jnp.split(nn.Dense(24, name='qkv')(x), 3, -1)
    return jnp.tanh(q * k + v)


def test_slices_of_a_fused_kernel_have_columns_of_their_own():
  model, x = Fused(), np.float32(RNG.normal(size=(5, 7)))
  params = dict(qkv=dict(kernel=np.float32(RNG.normal(size=(7, 24))),
                         bias=np.float32(RNG.normal(size=24))))
  sites = peftjax.describe(model, x)
  method = peftjax.load('lowrank.dora', rank=2, sites=dict(
      path=(r'qkv\[0:8\]', r'qkv\[16:24\]')))
  theta = peftjax.init(method, jax.random.key(0), sites, params)
  assert sorted(theta['dora']) == ['qkv[0:8]', 'qkv[16:24]']
  theta = jax.tree.map(
      lambda v: v + np.float32(0.3 * RNG.normal(size=v.shape)), theta)
  folded = peftjax.fold(method, params, theta, sites)
  moved = np.abs(folded['qkv']['kernel'] - params['qkv']['kernel']).max(0) > 0
  np.testing.assert_array_equal(moved, [True] * 8 + [False] * 8 + [True] * 8)
  np.testing.assert_array_equal(folded['qkv']['bias'], params['qkv']['bias'])
  y, _ = peftjax.apply(model, method, params, theta, x)
  np.testing.assert_allclose(
      y, model.apply({'params': folded}, x), rtol=0, atol=2e-6)
