"""LoRA-SB against the step that it stands for, and Hugging Face's LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
import pytest


def load(case, **kwargs):
  return peftjax.load('lowrank.lora_sb', **{'sites': case.chosen, **kwargs})


def start(method, case, stats):
  return peftjax.init(
      method, jax.random.key(0), case.sites, case.params, stats)


def matrix(p):
  """A layer's kernel [d_in, d_out] in float64, as a method sees it."""
  k = np.float64(p['embedding'] if 'embedding' in p else p['kernel'])
  return k.transpose(2, 0, 1, 3).reshape(-1, k.shape[-1]) if k.ndim == 4 else k


# ----------------------------------------------------------------- closed forms
@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_starts_at_a_first_step_of_full_tuning(case, collected, name):
  """As near to -eta sign(G) as rank r comes, on a base that is untouched."""
  c = case(name)
  method = load(c, rank=3, step_size=0.02)
  stats = collected(method, c, [c.x, c.x[::-1]])
  theta = start(method, c, stats)
  folded = peftjax.fold(method, c.params, theta, c.sites)
  for site, t in theta['lora_sb'].items():
    step = -0.02 * np.sign(np.float64(stats['lora_sb'][site]['gradient']))
    s = np.linalg.svd(step, compute_uv=False)
    for gram in (t['a'].T @ t['a'], t['b'] @ t['b'].T):
      np.testing.assert_allclose(gram, np.eye(3), atol=2e-6)
    np.testing.assert_allclose(t['r'], np.diag(s[:3]), atol=1e-6)
    error = np.linalg.norm(t['a'] @ t['r'] @ t['b'] - step)
    np.testing.assert_allclose(error, np.sqrt((s[3:] ** 2).sum()), atol=1e-5)
    np.testing.assert_allclose(
        matrix(folded[site]), matrix(c.params[site]) + t['a'] @ t['r'] @ t['b'],
        atol=1e-6)
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_allclose(y, c.model.apply({'params': folded}, c.x),
                             atol=1e-5)
  assert np.abs(y - c.model.apply({'params': c.params}, c.x)).max() > 1e-2


def test_what_has_no_gradient_stays(case, collected):
  """Rows of the table whose words are in no batch; at full rank, all of D."""
  c = case('words')
  method = load(c, rank=8, step_size=0.02)
  stats = collected(method, c, [c.x])
  folded = peftjax.fold(method, c.params, start(method, c, stats), c.sites)
  moved = folded['table']['embedding'] - c.params['table']['embedding']
  used = np.isin(np.arange(9), c.x)
  np.testing.assert_allclose(np.abs(moved)[used], 0.02, atol=1e-6)
  np.testing.assert_allclose(moved[~used], 0, atol=1e-6)


def test_only_signs_count_and_the_step_size_is_r_s(case, collected):
  c = case('mlp')
  stats = collected(load(c, rank=2), c, [c.x])
  a, b, c_ = (start(load(c, rank=2, step_size=eta), c, jax.tree.map(
      lambda v, k=k: k * v, stats))['lora_sb']['one']
              for eta, k in ((0.1, 1), (0.1, 300.0), (0.2, 1)))
  for n in 'abr':
    np.testing.assert_array_equal(a[n], b[n])
  np.testing.assert_array_equal(a['a'], c_['a'])
  np.testing.assert_allclose(2 * a['r'], c_['r'], rtol=1e-6)


def test_a_step_on_r_is_the_projected_full_step(case, collected):
  """-lr A A^T G B^T B, the nearest to -lr G that the bases allow."""
  c = case('mlp')
  method = load(c, rank=3, step_size=0.01)
  theta = start(method, c, collected(method, c, [c.x]))
  trained, frozen = peftjax.partition(method, theta)
  assert {n: set(v) for n, v in trained['lora_sb'].items()} == dict(
      one={'r'}, two={'r'})
  assert {method.count(c.sites[n]) for n in trained['lora_sb']} == {9}
  fold = lambda t: peftjax.fold(
      method, c.params, peftjax.combine(t, frozen), c.sites)

  def loss(trained):
    theta = peftjax.combine(trained, frozen)
    y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
    return jnp.sin(y).sum()

  now = fold(trained)
  full = jax.grad(lambda p: jnp.sin(c.model.apply({'params': p}, c.x)).sum())(
      now)
  moved = fold(jax.tree.map(lambda v, g: v - 0.5 * g, trained,
                            jax.grad(loss)(trained)))
  for site, t in theta['lora_sb'].items():
    g, a, b = (np.float64(v) for v in (full[site]['kernel'], t['a'], t['b']))
    nearest = a @ np.linalg.lstsq(a, g, rcond=None)[0]  # in A's columns
    nearest = np.linalg.lstsq(b.T, nearest.T, rcond=None)[0].T @ b
    np.testing.assert_allclose(a @ a.T @ g @ b.T @ b, nearest, atol=1e-5)
    np.testing.assert_allclose(
        moved[site]['kernel'] - now[site]['kernel'], -0.5 * nearest,
        atol=1e-5 * np.abs(g).max())


def test_ranks_by_site(case, collected):
  c = case('mlp')
  method = load(c, rank=3, rank_pattern={'two': 1}, step_size=0.1)
  t = start(method, c, collected(method, c, [c.x]))['lora_sb']
  assert [v['r'].shape for v in t.values()] == [(3, 3), (1, 1)]


@pytest.mark.parametrize('kwargs, message', [
    (dict(rank=7), "rank 7 at 'two': expected .* from 1 to 6 .*nearest is 6"),
    (dict(step_size=0.0), 'lora_sb: step_size=0.0: expected a positive number'),
    (dict(dropout=1.0), r'dropout=1.0: expected a rate .* nearest is 0.9'),
    (dict(rank_pattern={'onne': 1}), "'onne' matches none .*'one'"),
    (dict(), 'lora_sb starts from statistics .* none of .one.')])
def test_bad_arguments(case, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    start(load(c, **{'rank': 2, **kwargs}), c, None)


# ------------------------------------------------------------- another library
def test_is_a_lora_of_peft(case, moved, collected, twin):
  """With B of theirs set to R B; PEFT has no LoRA-SB of its own."""
  c = case('mlp')
  method = load(c, rank=3, step_size=0.05)
  start = peftjax.init(method, jax.random.key(0), c.sites, c.params,
                       collected(method, c, [c.x]))
  rng = np.random.default_rng(3)
  theta = {'lora_sb': {site: {**t, 'r': t['r'] + rng.normal(size=(3, 3))}
                       for site, t in start['lora_sb'].items()}}
  other = twin(c, r=3, lora_alpha=3)
  other.put({site: dict(a=t['a'], b=t['r'] @ t['b'])
             for site, t in theta['lora_sb'].items()})
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_allclose(y, other.run(c.x).detach(), rtol=0, atol=1e-5)
  folded = peftjax.fold(method, c.params, theta, c.sites)
  merged = other.model.merge_and_unload()
  for site in theta['lora_sb']:
    np.testing.assert_allclose(
        folded[site]['kernel'], merged.get_submodule(site).weight.detach().T,
        rtol=0, atol=1e-5)
