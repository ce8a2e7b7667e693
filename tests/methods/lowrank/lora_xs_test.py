"""LoRA-XS against the singular value decomposition and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
import pytest

FORMS = ['mlp', 'image', 'words']


def load(case, **kwargs):
  return peftjax.load('lowrank.lora_xs', **{'sites': case.chosen, **kwargs})


def start(method, case, seed=0):
  return peftjax.init(method, jax.random.key(seed), case.sites, case.params)


def matrix(p):
  """A layer's kernel [d_in, d_out] in float64, as a method sees it."""
  k = np.float64(p['embedding'] if 'embedding' in p else p['kernel'])
  return k.transpose(2, 0, 1, 3).reshape(-1, k.shape[-1]) if k.ndim == 4 else k


def delta(case, method, theta, site):
  folded = peftjax.fold(method, case.params, theta, case.sites)
  return matrix(folded[site]) - matrix(case.params[site])


# ------------------------------------------------------------------ properties
@pytest.mark.parametrize('name', FORMS)
def test_stays_in_the_spans_of_the_principal_vectors(case, moved, name):
  c = case(name)
  method = load(c, rank=3, alpha=5.0)
  theta = moved(method, c)
  for site in theta['lora_xs']:
    u, _, vt = np.linalg.svd(matrix(c.params[site]), full_matrices=False)
    d = delta(c, method, theta, site)
    assert np.abs(d).max() > 0.1
    np.testing.assert_allclose(d - u[:, :3] @ u[:, :3].T @ d, 0, atol=2e-6)
    np.testing.assert_allclose(d - d @ vt[:3].T @ vt[:3], 0, atol=2e-6)
    assert np.linalg.matrix_rank(d, tol=1e-4) == 3


def test_only_the_core_is_trained(case):
  c = case('mlp')
  method = load(c, rank=4)
  trained, frozen = peftjax.partition(method, start(method, c))
  for site in ('one', 'two'):
    assert {n: v.shape for n, v in trained['lora_xs'][site].items()} == dict(
        r=(4, 4))
    assert method.count(c.sites[site]) == 16
    assert set(frozen['lora_xs'][site]) == {'a', 'b'}


@pytest.mark.parametrize('basis', ['svd', 'random'])
def test_starts_at_the_base_but_for_the_noise(case, basis):
  c = case('mlp')
  method = load(c, rank=6, alpha=6.0, basis=basis)
  theta = start(method, c)
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  far = np.abs(y - c.model.apply({'params': c.params}, c.x)).max()
  assert 0 < far < method.tolerance
  core = np.concatenate([theta['lora_xs'][s]['r'].ravel() for s in
                         ('one', 'two')])
  assert 0.6e-5 < core.std() < 1.5e-5 and abs(core.mean()) < 5e-6
  other = start(method, c, 1)['lora_xs']['one']
  assert np.abs(other['r'] - theta['lora_xs']['one']['r']).max() > 1e-6
  if basis == 'svd':  # the kernel's, whatever the key
    np.testing.assert_array_equal(other['a'], theta['lora_xs']['one']['a'])


# ----------------------------------------------------------------- closed forms
@pytest.mark.parametrize('name', FORMS)
def test_bases_are_the_principal_vectors(case, name):
  c = case(name)
  for site, t in start(load(c, rank=3), c)['lora_xs'].items():
    u, s, vt = np.linalg.svd(matrix(c.params[site]), full_matrices=False)
    sign = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])[:3]
    np.testing.assert_allclose(t['a'], u[:, :3] * s[:3] * sign, atol=5e-6)
    np.testing.assert_allclose(t['b'], vt[:3] * sign[:, None], atol=5e-6)


@pytest.mark.parametrize('name', FORMS)
def test_minus_one_over_s_takes_the_principal_part_out(case, name):
  c = case(name)
  method = load(c, rank=3, alpha=5.0)
  theta = start(method, c)
  for t in theta['lora_xs'].values():
    t['r'] = -np.eye(3, dtype=np.float32) * 3 / 5
  folded = peftjax.fold(method, c.params, theta, c.sites)
  for site in theta['lora_xs']:
    u, s, vt = np.linalg.svd(matrix(c.params[site]), full_matrices=False)
    np.testing.assert_allclose(
        matrix(folded[site]), u[:, 3:] * s[3:] @ vt[3:], atol=2e-6)


def test_gradient_of_the_core_is_that_of_the_kernel_between_the_bases(
    case, moved):
  """dL/dR = s A^T G B^T, G being the gradient of the folded kernel."""
  c = case('mlp')
  method = load(c, rank=3, alpha=5.0)
  theta = moved(method, c)
  trained, frozen = peftjax.partition(method, theta)

  @jax.jit
  @jax.grad
  def cores(trained):
    y, _ = peftjax.apply(c.model, method, c.params,
                         peftjax.combine(trained, frozen), c.x)
    return jnp.sin(y).sum()

  folded = peftjax.fold(method, c.params, theta, c.sites)
  kernels = jax.grad(
      lambda p: jnp.sin(c.model.apply({'params': p}, c.x)).sum())(folded)
  for site, g in cores(trained)['lora_xs'].items():
    t = theta['lora_xs'][site]
    np.testing.assert_allclose(
        g['r'], 5 / 3 * t['a'].T @ kernels[site]['kernel'] @ t['b'].T,
        atol=2e-5)


def test_is_a_lora_with_the_core_in_b(case, moved):
  c = case('mlp')
  method = load(c, rank=2, alpha=3.0)
  theta = moved(method, c)
  lora = peftjax.load('lowrank.lora', rank=2, alpha=3.0, sites=c.chosen)
  same = {'lora': {site: dict(a=t['a'], b=t['r'] @ t['b'])
                   for site, t in theta['lora_xs'].items()}}
  got, want = (peftjax.apply(c.model, m, c.params, t, c.x)[0] for m, t in (
      (method, theta), (lora, same)))
  np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize('name', FORMS)
def test_random_bases_have_the_kernels_sizes_and_other_directions(case, name):
  c = case(name)
  method = load(c, rank=3, basis='random')
  first, second = (start(method, c, seed)['lora_xs'] for seed in (0, 1))
  for site, t in first.items():
    s = np.linalg.svd(matrix(c.params[site]), compute_uv=False)[:3]
    np.testing.assert_allclose(t['a'].T @ t['a'], np.diag(s ** 2), atol=1e-5)
    np.testing.assert_allclose(t['b'] @ t['b'].T, np.eye(3), atol=2e-6)
    for leaf in 'ab':  # neither the kernel's nor those of another key
      assert np.abs(t[leaf] - second[site][leaf]).max() > 0.1
    u, _, _ = np.linalg.svd(matrix(c.params[site]), full_matrices=False)
    inside = np.linalg.norm(u[:, :3].T @ (t['a'] / s), axis=0)
    assert (inside < 0.95).all()


def test_random_bases_are_not_the_same_at_every_layer(case):
  c = case('mlp')
  t = start(load(c, rank=2, basis='random'), c)['lora_xs']
  a = [t[site]['b'][:, :6] for site in ('one', 'two')]
  assert np.abs(a[0] - a[1]).max() > 0.1


def test_dropout_acts_on_the_input_of_a(case, moved):
  c = case('mlp')
  method = load(c, rank=2, alpha=2.0, dropout=0.5)
  t = moved(method, c)['lora_xs']['one']
  ctx = peftjax.Context('one', train=True, rng=jax.random.key(0),
                        dot=jnp.matmul)
  seen = []
  dot = lambda x, a: seen.append(x) or x @ a
  got = method.layer(lambda x: 0 * x[:, :1], c.x, method.prepare(t, ctx),
                     ctx._replace(dot=dot))
  assert (seen[0] == 0).any()
  np.testing.assert_allclose(got, seen[0] @ t['a'] @ t['r'] @ t['b'], atol=1e-5)


@pytest.mark.parametrize('kwargs, message', [
    (dict(basis='qr'), "unknown basis 'qr'.*'svd'|random"),
    (dict(rank=7), "rank 7 at 'two': expected .* from 1 to 6 .*nearest is 6"),
    (dict(alpha=0), 'alpha=0: expected a positive number'),
    (dict(dropout=1.0), r'dropout=1.0: expected a rate in \[0, 1\)')])
def test_bad_arguments(case, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    start(load(c, **{'rank': 2, **kwargs}), c)
