"""OLoRA against the QR decomposition and Hugging Face PEFT."""

import jax
import numpy as np
import peftjax
import pytest


def load(case, **kwargs):
  return peftjax.load('lowrank.olora', **{'sites': case.chosen, **kwargs})


def start(method, case):
  return peftjax.init(method, jax.random.key(0), case.sites, case.params)


def matrix(p):
  """A layer's kernel [d_in, d_out] in float64, as a method sees it."""
  k = np.float64(p['embedding'] if 'embedding' in p else p['kernel'])
  return k.transpose(2, 0, 1, 3).reshape(-1, k.shape[-1]) if k.ndim == 4 else k


# ----------------------------------------------------------------- closed forms
@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_starts_at_the_first_columns_of_a_whole_decomposition(case, name):
  c = case(name)
  method = load(c, rank=3, alpha=5.0)
  theta = start(method, c)
  for site, t in theta['olora'].items():
    k = matrix(c.params[site])
    q, r = np.linalg.qr(k.T)
    sign = np.sign(np.diag(r))[:3]
    np.testing.assert_allclose(t['b'].T, q[:, :3] * sign, atol=3e-6)
    np.testing.assert_allclose(t['a'].T, sign[:, None] * r[:3], atol=3e-6)
    np.testing.assert_allclose(t['b'] @ t['b'].T, np.eye(3), atol=1e-6)
    # The first r inputs give what they gave; B0 lies on the outputs' side.
    np.testing.assert_allclose((t['a'] @ t['b'])[:3], k[:3], atol=3e-6)
    assert (np.diag(t['a'][:3]) > 0).all()
    np.testing.assert_array_equal(t['a'], t['a0'])
    np.testing.assert_array_equal(t['b'], t['b0'])
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_array_equal(y, c.model.apply({'params': c.params}, c.x))


@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_adds_the_difference_of_two_products(case, moved, name):
  c = case(name)
  method = load(c, rank=2, alpha=3.0)
  theta = moved(method, c)
  folded = peftjax.fold(method, c.params, theta, c.sites)
  for site, t in theta['olora'].items():
    t = {n: np.float64(v) for n, v in t.items()}
    delta = 1.5 * (t['a'] @ t['b'] - t['a0'] @ t['b0'])
    np.testing.assert_allclose(
        matrix(folded[site]), matrix(c.params[site]) + delta, atol=2e-6)
  run = jax.jit(
      lambda t: peftjax.apply(c.model, method, c.params, t, c.x)[0])
  np.testing.assert_allclose(
      run(theta), c.model.apply({'params': folded}, c.x), atol=1e-5)


def test_rows_that_depend_on_each_other_are_finite_and_start_as_the_base(case):
  c = case('mlp')
  kernel = c.params['one']['kernel']
  kernel[1], kernel[2] = 2 * kernel[0], 0
  method = load(c, rank=4)
  theta = start(method, c)
  t = theta['olora']['one']
  np.testing.assert_allclose(t['b'] @ t['b'].T, np.eye(4), atol=1e-6)
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_array_equal(y, c.model.apply({'params': c.params}, c.x))


@pytest.mark.parametrize('kwargs, message', [
    (dict(rank=0), "rank 0 at 'one': expected .* from 1 to 10 .*nearest is 1"),
    (dict(alpha=0), 'alpha=0: expected a positive number'),
    (dict(dropout=1.0), r'dropout=1.0: expected a rate .* nearest is 0.9'),
    (dict(scaling='rs'), "unknown scaling 'rs'.*'rslora'"),
    (dict(alpha_pattern={'onne': 1.0}), "'onne' matches none .*'one'")])
def test_bad_arguments(case, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    start(load(c, **{'rank': 2, **kwargs}), c)


# ------------------------------------------------------------- another library
def test_equals_peft(case, moved, twin):
  c = case('mlp')
  method = load(c, rank=3, alpha=5.0)  # s is not 1
  other = twin(c, r=3, lora_alpha=5, init_lora_weights='olora')
  for site, t in start(method, c)['olora'].items():  # signs differ, not this
    a, b = (other.matrix(other.parts[site][n]) for n in 'ab')
    np.testing.assert_allclose(t['a'] @ t['b'], a @ b, atol=2e-6)
    for mine, theirs in ((t['a'], a), (t['b'], b)):
      np.testing.assert_allclose(np.abs(mine), np.abs(theirs), atol=5e-6)
  other.check(method, moved(method, c))
