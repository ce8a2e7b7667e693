"""PiSSA against the singular value decomposition and Hugging Face PEFT."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax
import pytest


def load(case, **kwargs):
  return peftjax.load('lowrank.pissa', **{'sites': case.chosen, **kwargs})


def start(method, case):
  return peftjax.init(method, jax.random.key(0), case.sites, case.params)


def matrix(p):
  """A layer's kernel [d_in, d_out] in float64, as a method sees it."""
  k = np.float64(p['embedding'] if 'embedding' in p else p['kernel'])
  return k.transpose(2, 0, 1, 3).reshape(-1, k.shape[-1]) if k.ndim == 4 else k


# ----------------------------------------------------------------- closed forms
@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_starts_at_the_principal_part_of_the_kernel(case, name):
  c = case(name)
  method = load(c, rank=3, alpha=5.0)
  theta = start(method, c)
  for site, t in theta['pissa'].items():
    u, s, vt = np.linalg.svd(matrix(c.params[site]), full_matrices=False)
    np.testing.assert_allclose(
        5 / 3 * t['a'] @ t['b'], u[:, :3] * s[:3] @ vt[:3], atol=2e-6)
    for gram in (t['a'].T @ t['a'], t['b'] @ t['b'].T):
      np.testing.assert_allclose(gram, np.diag(s[:3] * 3 / 5), atol=2e-6)
    np.testing.assert_array_equal(t['a'], t['a0'])
    np.testing.assert_array_equal(t['b'], t['b0'])
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_array_equal(y, c.model.apply({'params': c.params}, c.x))
  jax.tree.map(np.testing.assert_array_equal, c.params,
               peftjax.fold(method, c.params, theta, c.sites))


@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_adds_the_difference_of_two_products(case, moved, name):
  c = case(name)
  method = load(c, rank=2, alpha=3.0)
  theta = moved(method, c)
  folded = peftjax.fold(method, c.params, theta, c.sites)
  for site, t in theta['pissa'].items():
    t = {n: np.float64(v) for n, v in t.items()}
    delta = 1.5 * (t['a'] @ t['b'] - t['a0'] @ t['b0'])
    np.testing.assert_allclose(
        matrix(folded[site]), matrix(c.params[site]) + delta, atol=2e-6)
  run = jax.jit(
      lambda t: peftjax.apply(c.model, method, c.params, t, c.x)[0])
  np.testing.assert_allclose(
      run(theta), c.model.apply({'params': folded}, c.x), atol=1e-5)


def test_is_a_lora_of_twice_the_rank_on_the_untouched_base(case, moved):
  c = case('mlp')
  method = load(c, rank=2, alpha=3.0)
  theta = moved(method, c)
  wide = {}
  for site, t in theta['pissa'].items():
    wide[site] = dict(a=np.concatenate([t['a'], t['a0']], 1),
                      b=np.concatenate([t['b'], -t['b0']], 0))
  lora = peftjax.load('lowrank.lora', rank=4, alpha=6.0, sites=c.chosen)
  got, want = (peftjax.fold(m, c.params, t, c.sites) for m, t in (
      (method, theta), (lora, {'lora': wide})))
  for site in wide:
    np.testing.assert_allclose(
        got[site]['kernel'], want[site]['kernel'], atol=2e-6)


def test_small_updates_survive_bfloat16(case):
  """A - A0 is small, and rounded as such; A and A0 rounded would drown it."""
  c = case('mlp')
  model, p, x = nn.Dense(10), c.params['one'], c.x
  method = load(c, rank=2, sites=peftjax.select(kind='Dense'))
  sites = peftjax.describe(model, x)
  t = peftjax.init(method, jax.random.key(0), sites, p)['pissa']['']
  near = {**t, 'a': t['a'] * 1.0003}  # bfloat16 itself is off by up to 0.004
  ctx = peftjax.Context('', dot=jnp.matmul)
  used = {n: v.astype(jnp.bfloat16)
          for n, v in method.prepare(near, ctx).items()}
  got = method.layer(lambda x: 0, jnp.asarray(x, jnp.bfloat16), used, ctx)
  want = 0.0003 * 4 * x @ t['a'] @ t['b']  # s = 8 / 2
  np.testing.assert_allclose(
      np.float32(got), want, atol=0.05 * np.abs(want).max())


def test_trains_a_and_b_from_the_first_step(case):
  c = case('mlp')
  method = load(c, rank=2)
  trained, frozen = peftjax.partition(method, start(method, c))
  assert {n: set(v) for n, v in frozen['pissa'].items()} == dict(
      one={'a0', 'b0'}, two={'a0', 'b0'})
  assert {n: method.count(c.sites[n]) for n in trained['pissa']} == dict(
      one=2 * 22, two=2 * 16)

  @jax.jit
  @jax.grad
  def grads(trained):
    theta = peftjax.combine(trained, frozen)
    y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
    return jnp.sin(y).sum()

  for g in jax.tree.leaves(grads(trained)):
    assert np.abs(g).max() > 1e-2


def test_patterns_choose_rank_and_scale(case):
  c = case('mlp')
  t = start(load(c, rank=3, rank_pattern={'two': 1}, alpha_pattern={
      'one': 12.0}), c)['pissa']
  for site, r, s in (('one', 3, 4.0), ('two', 1, 8.0)):
    values = np.linalg.svd(matrix(c.params[site]), compute_uv=False)
    np.testing.assert_allclose(
        t[site]['a'].T @ t[site]['a'], np.diag(values[:r] / s), atol=2e-6)


@pytest.mark.parametrize('kwargs, message', [
    (dict(rank=7), "rank 7 at 'two': expected .* from 1 to 6 .*nearest is 6"),
    (dict(alpha=0), 'alpha=0: expected a positive number'),
    (dict(dropout=-0.1), r'dropout=-0.1: expected a rate .* nearest is 0.0'),
    (dict(scaling='rs'), "unknown scaling 'rs'.*'rslora'"),
    (dict(rank_pattern={'onne': 1}), "'onne' matches none .*'one'")])
def test_bad_arguments(case, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    start(load(c, **{'rank': 2, **kwargs}), c)


# ------------------------------------------------------------- another library
@pytest.mark.parametrize('scaling', ['lora', 'rslora'])
def test_equals_peft(case, moved, twin, scaling):
  c = case('mlp')
  method = load(c, rank=3, alpha=5.0, scaling=scaling)
  other = twin(c, r=3, lora_alpha=5, init_lora_weights='pissa',
               use_rslora=scaling == 'rslora')
  for site, t in start(method, c)['pissa'].items():  # signs differ, not this
    a, b = (other.matrix(other.parts[site][n]) for n in 'ab')
    np.testing.assert_allclose(t['a'] @ t['b'], a @ b, atol=2e-6)
    for mine, theirs in ((t['a'], a), (t['b'], b)):
      np.testing.assert_allclose(np.abs(mine), np.abs(theirs), atol=5e-6)
  other.check(method, moved(method, c))
