"""KaSA against closed forms, LoRA on a cut kernel, and Hugging Face PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax import theta as theta_lib
import pytest

FORMS = ['mlp', 'image', 'words']


def load(case, **kwargs):
  return peftjax.load('lowrank.kasa', **{'sites': case.chosen, **kwargs})


def start(method, case):
  return peftjax.init(method, jax.random.key(0), case.sites, case.params)


def matrix(p):
  """A layer's kernel [d_in, d_out] in float64, as a method sees it."""
  k = np.float64(p['embedding'] if 'embedding' in p else p['kernel'])
  return k.transpose(2, 0, 1, 3).reshape(-1, k.shape[-1]) if k.ndim == 4 else k


# ------------------------------------------------------------------ properties
@pytest.mark.parametrize('name', FORMS)
def test_starts_at_the_base_without_its_last_terms(case, name):
  """Also where d_in > d_out + r, which the authors' code leaves whole."""
  c = case(name)
  method = load(c, rank=3)
  theta = start(method, c)
  folded = peftjax.fold(method, c.params, theta, c.sites)
  for site in theta['kasa']:
    k, w = matrix(c.params[site]), matrix(folded[site])
    s = np.linalg.svd(k, compute_uv=False)
    left = np.linalg.svd(w, compute_uv=False)
    np.testing.assert_allclose(left[:-3], s[:-3], atol=5e-6)
    np.testing.assert_allclose(left[-3:], 0, atol=2e-6)  # rank k - r
    np.testing.assert_allclose(
        np.square(k - w).sum(), np.square(s[-3:]).sum(), rtol=1e-5)
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_allclose(
      y, c.model.apply({'params': folded}, c.x), atol=1e-5)
  assert np.abs(y - c.model.apply({'params': c.params}, c.x)).max() > 0.01


def test_the_dropped_factors_give_the_kernel_back(case):
  c = case('mlp')
  method = load(c, rank=3)
  theta = start(method, c)
  folded = peftjax.fold(method, c.params, theta, c.sites)
  _, frozen = peftjax.partition(method, theta)
  for site, t in frozen['kasa'].items():
    assert set(t) == {'d', 'e'}
    np.testing.assert_allclose(
        folded[site]['kernel'] + t['d'] @ t['e'], c.params[site]['kernel'],
        atol=1e-6)


def test_trains_factors_and_singular_values(case):
  c = case('mlp')
  method = load(c, rank=3)
  trained, _ = peftjax.partition(method, start(method, c))
  assert {n: v.shape for n, v in trained['kasa']['one'].items()} == dict(
      a=(12, 3), b=(3, 10), g=(3,))
  assert method.count(c.sites['one']) == 3 * 22 + 3
  t = trained['kasa']['one']
  assert not t['b'].any() and np.abs(t['a']).max() <= 12 ** -0.5
  assert np.abs(t['g']).max() > 12 ** -0.5  # N(0, 1)


# ----------------------------------------------------------------- closed forms
@pytest.mark.parametrize('name', FORMS)
def test_adds_a_product_with_singular_values(case, moved, name):
  c = case(name)
  method = load(c, rank=2, alpha=3.0)
  theta = moved(method, c)
  folded = peftjax.fold(method, c.params, theta, c.sites)
  for site, t in theta['kasa'].items():
    k = matrix(c.params[site])
    u, s, vt = np.linalg.svd(k, full_matrices=False)
    t = {n: np.float64(v) for n, v in t.items()}
    want = (u[:, :-2] * s[:-2] @ vt[:-2]
            + 1.5 * t['a'] @ np.diag(t['g']) @ t['b'])
    np.testing.assert_allclose(matrix(folded[site]), want, atol=2e-6)
  run = jax.jit(
      lambda t: peftjax.apply(c.model, method, c.params, t, c.x)[0])
  np.testing.assert_allclose(
      run(theta), c.model.apply({'params': folded}, c.x), atol=1e-5)


def test_with_unit_values_and_no_penalty_it_is_lora_on_the_cut_kernel(
    case, moved):
  c = case('mlp')
  method = load(c, rank=2, alpha=3.0, beta=0, gamma=0)
  assert method.penalty is None
  cut = peftjax.fold(method, c.params, start(method, c), c.sites)
  theta = moved(method, c)
  for t in theta['kasa'].values():
    t['g'] = jnp.ones(2)
  lora = peftjax.load('lowrank.lora', rank=2, alpha=3.0, sites=c.chosen)
  same = {'lora': {site: dict(a=t['a'], b=t['b'])
                   for site, t in theta['kasa'].items()}}

  def value(method, params):
    @jax.jit
    def run(theta):
      def loss(theta):
        y, _ = peftjax.apply(c.model, method, params, theta, c.x)
        return jnp.sin(y).sum(), y
      return jax.grad(loss, has_aux=True)(theta)
    return run

  got, y = value(method, c.params)(theta)
  want, z = value(lora, cut)(same)
  np.testing.assert_allclose(y, z, atol=5e-6)
  for site, t in want['lora'].items():
    for leaf, v in t.items():
      np.testing.assert_allclose(got['kasa'][site][leaf], v, atol=2e-5)


def test_penalty_is_the_papers_sum(case, moved):
  c = case('mlp')
  theta = moved(load(c, rank=3), c)
  off = lambda m: np.linalg.norm(m - np.eye(3))
  squares, offs = 0, 0
  for t in theta['kasa'].values():
    a, b, g = (np.float64(t[n]) for n in 'abg')
    squares += (g ** 2).sum()
    offs += off(b @ b.T) + off(a.T @ a)
  for beta, gamma in ((1e-4, 1e-3), (0.5, 0), (0, 0.5)):
    got = theta_lib.penalty(
        load(c, rank=3, beta=beta, gamma=gamma), theta, {}, 0)
    np.testing.assert_allclose(got, beta * squares + gamma * offs, rtol=1e-5)


def test_penalty_of_the_start_is_finite_and_flat_in_b(case):
  c = case('mlp')
  method = load(c, rank=3, beta=0.0, gamma=1.0)
  theta = start(method, c)
  value, grads = jax.value_and_grad(
      lambda t: theta_lib.penalty(method, t, {}, 0))(theta)
  assert np.isfinite(value) and value > 2 * 3 ** 0.5  # sqrt(r) of each B
  for t in grads['kasa'].values():
    assert not t['b'].any() and not t['g'].any() and t['a'].any()


def test_dropout_leaves_the_cut_alone(case, moved):
  c = case('mlp')
  method = load(c, rank=2, alpha=2.0, dropout=0.5)
  t = moved(method, c)['kasa']['one']
  seen = []
  ctx = peftjax.Context(
      'one', train=True, rng=jax.random.key(0),
      dot=lambda x, a: seen.append(x) or x @ a)
  got = method.layer(lambda x: 0 * x[:, :1], c.x, method.prepare(t, ctx), ctx)
  kept, = (x for x in seen if x is c.x)
  less, = (x for x in seen if x is not c.x)
  assert (less == 0).any()
  want = less @ t['a'] * t['g'] @ t['b'] - kept @ t['d'] @ t['e']
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('kwargs, message', [
    (dict(rank=6), r"rank 6 at 'two' leaves nothing of a kernel of \[10, 6\]; "
                   'the nearest that does is 5'),
    (dict(rank=7), "rank 7 at 'two': expected .* from 1 to 6"),
    (dict(beta=-0.1), 'beta=-0.1: expected a finite number, at least 0'),
    (dict(gamma=float('nan')), 'gamma=nan: expected a finite number'),
    (dict(alpha=0), 'alpha=0: expected a positive number')])
def test_bad_arguments(case, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    start(load(c, **{'rank': 2, **kwargs}), c)


# ------------------------------------------------------------- another library
@pytest.fixture
def pefts(twin):
  """The same model in PEFT, with the singular values among its parts."""
  peft = pytest.importorskip('peft')
  if not hasattr(peft, 'KasaConfig'):
    pytest.skip('this version of PEFT has no KaSA')

  def make(c, beta=1e-4, gamma=1e-3, **options):
    other = twin(c, kasa_config=peft.KasaConfig(beta=beta, gamma=gamma),
                 **options)
    for name, layer in other.layers.items():
      other.parts[name]['g'] = layer.lora_diag['default']
    return other

  return make


@pytest.mark.parametrize('scaling', ['lora', 'rslora'])
def test_equals_peft(case, moved, pefts, scaling):
  c = case('mlp')
  method = load(c, rank=3, alpha=5.0, scaling=scaling)
  other = pefts(c, r=3, lora_alpha=5, use_rslora=scaling == 'rslora')
  other.check(method, moved(method, c))


def test_truncated_base_is_pefts(case, pefts):
  c = case('mlp')
  method = load(c, rank=3)
  other = pefts(c, r=3)
  folded = peftjax.fold(method, c.params, start(method, c), c.sites)
  for name, layer in other.layers.items():
    np.testing.assert_allclose(
        folded[name]['kernel'], other.matrix(layer.base_layer.weight),
        atol=2e-6)


def test_penalty_and_its_gradients_are_pefts(case, moved, pefts):
  c = case('mlp')
  method = load(c, rank=3, beta=0.2, gamma=0.3)
  other = pefts(c, r=3, beta=0.2, gamma=0.3)
  theta = moved(method, c)
  other.put(theta['kasa'])
  value, grads = jax.value_and_grad(
      lambda t: theta_lib.penalty(method, t, {}, 0))(theta)
  want = other.model.base_model._get_kasa_loss()
  np.testing.assert_allclose(value, want.item(), rtol=1e-5)
  want.backward()
  for name, parts in other.parts.items():
    for leaf, parameter in parts.items():
      np.testing.assert_allclose(
          grads['kasa'][name][leaf], other.matrix(parameter.grad), atol=1e-5)
