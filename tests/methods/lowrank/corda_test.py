"""CorDA against its closed form in float64, brute force, Hugging Face PEFT."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax.methods.lowrank import corda
import pytest

DRAW = np.random.default_rng(3).normal
# Calls of unlike size, around means that are not 0.
CALLS = [np.float32(n * (DRAW(size=(32, 12)) * np.linspace(0.3, 2, 12)
                         + DRAW(size=12))) for n in (1, 7)]


def load(case, **kwargs):
  return peftjax.load('lowrank.corda', **{'sites': case.chosen, **kwargs})


def kernel(case, site):
  return np.float64(case.params[site]['kernel'])


def inputs(case, x):
  """{layer: what it reads} of the small network."""
  one = case.params['one']
  return dict(one=np.float64(x), two=np.tanh(x @ one['kernel'] + one['bias']))


def regularised(case, site):
  """C' in float64."""
  c = np.mean([x.T @ x / np.abs(x).max() ** 2 for x in (
      inputs(case, call)[site] for call in CALLS)], 0)
  return c + 0.01 * np.diag(c).mean() * np.eye(len(c))


def terms(case, site):
  """[k, d_in, d_out]: the components of a kernel, the largest first."""
  c = regularised(case, site)
  u, s, vt = np.linalg.svd(c @ kernel(case, site), full_matrices=False)
  return np.linalg.inv(c) @ np.einsum('ik,k,kj->kij', u, s, vt)


# ---------------------------------------------------------------- closed forms
@pytest.mark.parametrize('mode', ['ipm', 'kpm'])
def test_starts_at_components_of_the_kernel(case, calibrated, mode):
  c = case('mlp')
  got = calibrated(load(c, rank=3, alpha=5.0, mode=mode), c, CALLS)
  for site, t in got.theta['corda'].items():
    want = terms(c, site)
    want = want[:3] if mode == 'ipm' else want[-3:]
    for i, term in enumerate(want):
      np.testing.assert_allclose(
          5 / 3 * np.outer(t['a'][:, i], t['b'][i]), term, rtol=0,
          atol=2e-4 * np.abs(term).max())
    values = np.linalg.norm(regularised(c, site) @ want, axis=(1, 2))
    np.testing.assert_allclose(  # b has the roots of the values, and the scale
        np.square(t['b']).sum(1), values * 3 / 5, rtol=1e-4)
    np.testing.assert_array_equal(t['a'], t['a0'])
    np.testing.assert_array_equal(t['b'], t['b0'])
  y, _ = peftjax.apply(c.model, got.method, c.params, got.theta, c.x)
  np.testing.assert_array_equal(y, c.model.apply({'params': c.params}, c.x))
  jax.tree.map(np.testing.assert_array_equal, c.params,
               peftjax.fold(got.method, c.params, got.theta, c.sites))


@pytest.mark.parametrize('mode', ['ipm', 'kpm'])
def test_all_components_together_are_the_kernel(case, calibrated, mode):
  c = case('mlp')
  method = load(c, rank=6, rank_pattern=dict(one=10), mode=mode, alpha=3.0)
  for site, t in calibrated(method, c, CALLS).theta['corda'].items():
    np.testing.assert_allclose(3 / t['a'].shape[1] * t['a'] @ t['b'],
                               kernel(c, site), atol=1e-5)


def test_the_modes_are_extremes_among_all_choices_of_components(
    case, calibrated):
  """||C' s A B||^2 is the sum of the squares of the values that were chosen."""
  c = case('mlp')
  energy = {}
  for mode in ('ipm', 'kpm'):
    theta = calibrated(load(c, rank=2, mode=mode), c, CALLS).theta['corda']
    energy[mode] = {
        site: np.square(regularised(c, site) @ (4 * t['a'] @ t['b'])).sum()
        for site, t in theta.items()}
  for site in ('one', 'two'):
    every = terms(c, site)
    choices = [np.square(regularised(c, site) @ every[list(j)].sum(0)).sum()
               for j in itertools.combinations(range(len(every)), 2)]
    np.testing.assert_allclose(energy['ipm'][site], max(choices), rtol=1e-4)
    np.testing.assert_allclose(energy['kpm'][site], min(choices), rtol=1e-3)


def test_of_inputs_without_a_direction_is_pissa(case):
  c = case('mlp')
  method = load(c, rank=3)
  stats = {p: dict(covariance=0.7 * jnp.eye(len(kernel(c, p))))
           for p in ('one', 'two')}
  start = lambda m, s: peftjax.init(
      m, jax.random.key(0), c.sites, c.params, s)[m.name]
  got = start(method, dict(corda=stats))
  pissa = start(
      peftjax.load('lowrank.pissa', rank=3, sites=c.chosen), None)
  for site, t in got.items():
    np.testing.assert_allclose(
        t['a'] @ t['b'], pissa[site]['a'] @ pissa[site]['b'], atol=2e-6)


def test_damping_is_doubled_until_the_inverse_is_good(monkeypatch):
  x = DRAW(size=(3, 40))
  c = np.float32(x.T @ x)  # rank 3 of 40
  mean = np.diag(c).mean()
  new, inverse = corda.damped(c)
  np.testing.assert_allclose(new, c + 0.01 * mean * np.eye(40), rtol=1e-5)
  np.testing.assert_allclose(np.float64(new) @ inverse, np.eye(40), atol=1e-3)
  error = lambda new: np.linalg.norm(
      new @ np.asarray(jnp.linalg.inv(new)) - np.eye(40))
  damps = [np.float32(0.01) * 2 ** i for i in range(12)]
  errors = [error(np.float32(c + d * mean * np.eye(40))) for d in damps]
  limit = np.sqrt(errors[0] * errors[-1])
  monkeypatch.setattr(corda, 'LIMIT', limit)
  new, _ = jax.jit(corda.damped)(c)
  times = np.log2((np.diag(new) - np.diag(c)).mean() / (0.01 * mean))
  assert 0.9 < times < 11.1 and abs(times - round(times)) < 1e-2
  assert errors[round(times)] < 1.5 * limit  # one more rounding of its own


def test_damping_of_zeros_ends():
  new, inverse = corda.damped(jnp.zeros((4, 4)))
  np.testing.assert_allclose(new @ inverse, np.eye(4), atol=1e-6)


@pytest.mark.parametrize('kwargs, message', [
    (dict(mode='kpa'), "unknown mode 'kpa'.*'kpm'"),
    (dict(rank=7), "rank 7 at 'two': expected .* from 1 to 6 .*nearest is 6"),
    (dict(alpha=0), 'alpha=0: expected a positive number'),
    (dict(sites=peftjax.select(kind='Conv')), 'matches no site')])
def test_bad_arguments(case, calibrated, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    calibrated(load(c, **{'rank': 2, **kwargs}), c, CALLS)


def test_says_that_it_needs_statistics(case):
  c = case('mlp')
  with pytest.raises(ValueError, match="none of 'one'.*calibrate.collect"):
    peftjax.init(load(c, rank=2), jax.random.key(0), c.sites, c.params)


# ------------------------------------------------------------ another library
@pytest.mark.parametrize('mode, scaling', [('ipm', 'lora'), ('kpm', 'rslora')])
def test_equals_peft(
    case, calibrated, moved, twin, monkeypatch, mode, scaling):
  peft = pytest.importorskip('peft')
  torch = pytest.importorskip('torch')
  from peft.tuners.lora import corda as theirs

  c = case('mlp')
  # PEFT's scale is ours where the largest entry is the largest magnitude.
  draws = (n * x for n in (0.3, 1) for x in np.float32(DRAW(size=(40, 32, 12))))
  calls = [x for x in draws if all(
      v.max() == np.abs(v).max() for v in inputs(c, x).values())][::8]
  assert len(calls) > 1
  plain = peft.get_peft_model

  def prepared(net, config):
    theirs.preprocess_corda(net, config, lambda: [
        net(torch.from_numpy(x)) for x in calls])
    return plain(net, config)

  monkeypatch.setattr(peft, 'get_peft_model', prepared)
  other = twin(c, r=3, lora_alpha=5, use_rslora=scaling == 'rslora',
               init_lora_weights='corda', corda_config=peft.tuners.lora.config.
               CordaConfig(corda_method=mode))
  got = calibrated(
      load(c, rank=3, alpha=5.0, mode=mode, scaling=scaling), c, calls)
  for site, t in got.theta['corda'].items():  # signs differ, not this
    a, b = (other.matrix(other.parts[site][n]) for n in 'ab')
    np.testing.assert_allclose(
        t['a'] @ t['b'], a @ b, rtol=0, atol=1e-4 * np.abs(a @ b).max())
  other.check(got.method, moved(got.method, c, start=got.theta))
