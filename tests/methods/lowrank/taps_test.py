"""TAPS against full fine-tuning of the kernels; gates, and what is kept."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax import phases
import pytest


def load(case, **kwargs):
  return peftjax.load('lowrank.taps', **{'sites': case.chosen, **kwargs})


def gradients(case, method, theta):
  """d sum(sin(y)) / d theta of the method."""
  def loss(theta):
    y, _ = peftjax.apply(case.model, method, case.params, theta, case.x)
    return jnp.sin(y).sum()
  return jax.jit(jax.grad(loss))(theta)[method.name]


def test_starts_open_and_as_the_base(case):
  c = case('mlp')
  method = load(c)
  theta = peftjax.init(method, jax.random.key(0), c.sites, c.params)
  assert {p: {n: v.shape for n, v in t.items()}
          for p, t in theta['taps'].items()} == dict(
              one=dict(delta=(12, 10), u=()), two=dict(delta=(10, 6), u=()))
  assert method.count(c.sites['one']) == 121
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_array_equal(y, c.model.apply({'params': c.params}, c.x))


@pytest.mark.parametrize('name, layers', [
    ('mlp', ('one', 'two')), ('image', ('conv',)), ('words', ('table',))])
def test_gradients_are_those_of_the_whole_kernel(case, moved, name, layers):
  """Open: the kernel's own; closed: none. Of u: <dK, D> in both cases."""
  c = case(name)
  method = load(c)
  theta = moved(method, c)
  for layer in layers:
    theta['taps'][layer]['u'] = jnp.float32(0.4)
  if len(layers) > 1:
    theta['taps'][layers[0]]['u'] = jnp.float32(0.02)
  full = peftjax.load('selective.full', sites=c.chosen)
  start = peftjax.fold(method, c.params, theta, c.sites)
  there = types.SimpleNamespace(**{**vars(c), 'params': start})
  dense = gradients(there, full, peftjax.init(
      full, jax.random.key(0), c.sites, start))
  got = gradients(c, method, theta)
  for layer in layers:
    site, t = c.sites[layer], theta['taps'][layer]
    view = site.leaves['kernel']
    dk = view.get(dense[layer][view.leaf])
    open_ = float(t['u'] >= 0.1)
    np.testing.assert_allclose(
        got[layer]['delta'], open_ * dk, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        got[layer]['u'], (dk * t['delta']).sum(), rtol=1e-3)
    change = view.get(start[layer][view.leaf]) - view.get(
        c.params[layer][view.leaf])
    np.testing.assert_allclose(change, open_ * t['delta'], atol=1e-6)


def test_penalty_is_the_mean_over_gates_after_the_warm_up(case, moved):
  c = case('mlp')
  method = load(c, lam=0.5, warmup=2)
  theta = moved(method, c)
  theta['taps']['one']['u'] = jnp.float32(-0.5)
  theta['taps']['two']['u'] = jnp.float32(0.1)
  for step, want in ((0, 0), (1, 0), (2, 0.15)):
    np.testing.assert_allclose(
        peftjax.penalty(method, theta, {}, step), want, rtol=1e-6)


def test_the_last_phase_keeps_open_deltas_alone(case, moved):
  c = case('mlp')
  method = load(c)
  theta = moved(method, c)
  theta['taps']['one']['u'] = jnp.float32(0.09)
  theta['taps']['two']['u'] = jnp.float32(0.11)
  stage = phases.schedule(method, 5)[-1]
  kept = stage.convert(theta, jax.random.key(0), c.sites)
  assert {p: set(t) for p, t in kept['taps'].items()} == {'two': {'delta'}}
  jax.tree.map(np.testing.assert_array_equal,
               peftjax.fold(stage.methods, c.params, kept, c.sites),
               peftjax.fold(method, c.params, theta, c.sites))


@pytest.mark.parametrize('kwargs, message', [
    (dict(lam=-0.1), 'taps: lam=-0.1: expected a finite number, at least 0'),
    (dict(tau=-1.0), 'taps: tau=-1.0: expected a finite number above 0'),
    (dict(start=0.0), 'taps: start=0.0: expected .* at least tau=0.1'),
    (dict(sites=peftjax.select(path='^$')), "taps: '' .Mlp. has no kernel")])
def test_bad_arguments(case, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    peftjax.init(load(c, **kwargs), jax.random.key(0), c.sites, c.params)
