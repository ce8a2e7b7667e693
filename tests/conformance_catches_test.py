"""The conformance suite finds what is wrong with broken methods."""

import jax
import jax.numpy as jnp
import pytest

from peftjax import conformance
from peftjax import sites as sites_lib
from peftjax.conformance import checks
from peftjax.method import Method

SITES = sites_lib.select(roles='qo')


def gain(sites=SITES, least=0.0):
  """Output scale, a method without a fault: y = (x K + b) g.

  Args:
    sites: Predicate on sites.
    least: Any number of at least -1; does nothing.
  """
  if not least >= -1:
    raise ValueError(f'least={least}: expected at least -1')

  def init(key, site, p, stats):
    del key, stats
    return dict(g=jnp.ones(p['kernel'].shape[1]))

  def fold(p, t):
    return {**p, 'kernel': p['kernel'] * t['g'], 'bias': p['bias'] * t['g']}

  def layer(f, x, t, ctx):
    del ctx
    return f(x) * t['g']

  return Method('gain', sites, init, fold=fold, layer=layer,
                count=lambda site: site.params['kernel'].shape[1])


def zeros(key, site, p, stats):
  """Two factors that both start at zero: no gradient reaches either."""
  del key, stats
  d_in, d_out = p['kernel'].shape
  return dict(a=jnp.zeros((d_in, 2)), b=jnp.zeros((2, d_out)))


GOOD = gain()
BROKEN = {
    checks.identity_at_init: GOOD._replace(
        init=lambda *a: {'g': 1.01 * GOOD.init(*a)['g']}),
    checks.layer_equals_fold: GOOD._replace(
        fold=lambda p, t: {**p, 'kernel': p['kernel'] * t['g']}),
    checks.gradient_alive: GOOD._replace(
        init=zeros, count=lambda site: 0,
        fold=lambda p, t: {**p, 'kernel': p['kernel'] + t['a'] @ t['b']},
        layer=lambda f, x, t, ctx: f(x) + x @ t['a'] @ t['b']),
    checks.rest_is_frozen: GOOD._replace(
        init=lambda *a: {**GOOD.init(*a), 'data': jnp.ones(2)},
        frozen=('data',),
        after_step=lambda theta: {
            p: {**t, 'data': t['data'] + 1} for p, t in theta.items()}),
    checks.count_as_declared: GOOD._replace(count=lambda site: 1),
    checks.traced_once: GOOD._replace(
        after_step=lambda theta: jax.tree.map(
            lambda v: v.astype(jnp.float16), theta)),
    checks.bfloat16: GOOD._replace(
        layer=lambda f, x, t, ctx: f(x) * t['g'].astype(jnp.float32)),
    checks.vmap_equals_loop: GOOD._replace(
        layer=lambda f, x, t, ctx: f(x) * jax.pure_callback(
            lambda g: g.mean(keepdims=True), jax.ShapeDtypeStruct(
                (1,), x.dtype), t['g'], vmap_method='expand_dims')),
    checks.devices_agree: GOOD._replace(  # holds on to one device
        layer=lambda f, x, t, ctx: f(x) * jax.lax.with_sharding_constraint(
            t['g'], jax.sharding.SingleDeviceSharding(jax.devices()[0]))),
    checks.quantised_base: GOOD._replace(  # reads the kernel behind f's back
        layer=lambda f, x, t, ctx: x @ ctx.params['kernel'] * t['g']
        + ctx.params['bias'] * t['g']),
}


def _outcome(method, check, form='plain'):
  make = method if callable(method) else lambda: method
  return conformance.outcome(conformance.Subject(make, {}), check, form)


@pytest.mark.parametrize('check', BROKEN, ids=lambda c: c.__name__)
def test_broken_method_fails(check):
  result = _outcome(BROKEN[check], check)
  assert result.outcome == 'fail', result
  assert result.why


def test_check_prints_a_table(capsys):
  results = conformance.check(gain, forms=('plain',))
  failed = [r for r in results if r.outcome == 'fail']
  assert not failed, failed
  assert {r.check for r in results} >= {c.__name__ for c in BROKEN}
  printed = capsys.readouterr().out
  assert all(r.check in printed for r in results)
  assert 'not under peftjax/methods' in printed  # why a check was skipped


def test_weak_types_are_traced_twice():
  weak = GOOD._replace(
      init=lambda key, site, p, stats: dict(
          g=jnp.full(p['kernel'].shape[1], 1.0)))
  result = _outcome(weak, checks.traced_once)
  assert result.outcome == 'fail' and 'weakly typed' in result.why


def test_int8_refuses_a_kernel_that_full_trains():
  why = checks.on_int8(conformance.subject('selective.full').run('plain'))
  assert "int8 drops 'kernel'" in why and 'full trains' in why
