"""Hypergradients, and the parts of the data that they are made from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax import bilevel
from peftjax import config as config_lib
from peftjax.method import Method
from peftjax.tasks.base import mean_loss

RNG = np.random.default_rng(0)


# ------------------------------------------------------------- closed forms
@pytest.mark.parametrize('step', [0.0, 0.3, 1.0])
def test_exact_gradient_of_a_quadratic(step):
  """L1 = (w - c a)^2 / 2, L2 = (w - d)^2 / 2 + a^2 / 2, all of one number.

  w' = w - xi (w - c a), dw'/da = xi c; L2' = (w' - d) xi c + a. With xi = 1 the
  step solves the inner problem, w' = c a: the gradient of the whole problem.
  """
  w, a, c, d = 0.7, -0.4, 2.0, 1.5
  first = lambda w, a: ((w - c * a) ** 2 / 2, 'aux')
  second = lambda w, a: (w - d) ** 2 / 2 + a ** 2 / 2
  (loss, aux), g, hyper = bilevel.gradients(
      first, second, jnp.float32(w), jnp.float32(a), step, 'exact')
  stepped = w - step * (w - c * a)
  assert aux == 'aux'
  np.testing.assert_allclose(
      [loss, g, hyper], [(w - c * a) ** 2 / 2, w - c * a,
                         (stepped - d) * step * c + a], rtol=1e-5)
  if step == 1:
    whole = jax.grad(lambda a: second(c * a, a))(a)
    np.testing.assert_allclose(hyper, whole, rtol=1e-5)
  darts = bilevel.gradients(
      first, second, jnp.float32(w), jnp.float32(a), step, 'darts')
  # The mixed derivative is constant, so that differences are exact.
  np.testing.assert_allclose(darts[1:], (g, hyper), rtol=1e-3)


def test_many_numbers_against_the_hessian():
  """grad_a L2 - xi (d^2 L1 / da dw) grad_w' L2, each by itself."""
  m, w, a = (jnp.asarray(RNG.normal(size=s), jnp.float32)
             for s in ((4, 3), 4, 3))
  first = lambda w, a: (jnp.sum(jnp.tanh(w) * (m @ jnp.sin(a))), None)
  second = lambda w, a: jnp.sum(jnp.cos(w)) + jnp.sum(a ** 3)
  value = lambda w, a: first(w, a)[0]
  stepped = w - 0.2 * jax.grad(value)(w, a)
  mixed = jax.jacobian(jax.grad(value, 1))(w, a)  # [3, 4]
  want = jax.grad(second, 1)(stepped, a) - 0.2 * mixed @ jax.grad(second)(
      stepped, a)
  for form, tolerance in (('exact', 1e-5), ('darts', 1e-2)):
    _, g, hyper = bilevel.gradients(first, second, w, a, 0.2, form)
    np.testing.assert_allclose(g, jax.grad(value)(w, a), rtol=1e-6)
    np.testing.assert_allclose(hyper, want, atol=tolerance, rtol=tolerance)


def test_darts_where_the_outer_loss_does_not_see_the_weights():
  value = bilevel.gradients(
      lambda w, a: (w * a, None), lambda w, a: 3 * a, jnp.float32(1),
      jnp.float32(2), 0.5, 'darts')
  np.testing.assert_array_equal(value[1:], (2, 3))


# ------------------------------------------------------------------- parts
def batch(rows=4000):
  return dict(image=jnp.asarray(RNG.normal(size=(rows, 2, 3)), jnp.float32),
              half=jnp.asarray(RNG.normal(size=(rows, 2)), jnp.bfloat16),
              ids=jnp.asarray(RNG.integers(-1, 9, (rows, 5)), jnp.int32),
              mask=jnp.asarray(RNG.random((rows, 5)) < 0.5),
              pixel=jnp.asarray(RNG.integers(0, 255, rows), jnp.uint8))


def test_a_row_stays_in_its_part():
  b = batch()
  first = np.asarray(jax.jit(bilevel.first_part, static_argnums=1)(b, 0.7))
  assert abs(first.mean() - 0.7) < 0.03
  order = RNG.permutation(len(first))
  again = bilevel.first_part({k: b[k][order] for k in reversed(b)}, 0.7)
  np.testing.assert_array_equal(again, first[order])
  # Another share moves only the rows between the two.
  assert not (first & ~np.asarray(bilevel.first_part(b, 0.8))).any()


@pytest.mark.parametrize('name', list(batch(1)))
def test_a_hash_sees_every_number(name):
  b = batch(50)
  want, value = bilevel.hash_rows(b), b[name]
  last = (slice(None), *[-1] * (value.ndim - 1))
  changed = ~value if value.dtype == bool else value + 1
  got = bilevel.hash_rows({**b, name: value.at[last].set(changed[last])})
  assert not (got == want).any()
  # Nor are columns that change places the same row.
  if value.ndim > 1:
    got = bilevel.hash_rows({**b, name: value[:, ::-1]})
    same = (value == value[:, ::-1]).reshape(50, -1).all(1)
    np.testing.assert_array_equal(got == want, same)


@pytest.mark.parametrize('weight', [None, [1.0, 2.0, 3.0]])
@pytest.mark.parametrize('rows', [[0, 1, 1], [0, 0, 0]])
def test_a_part_without_rows_has_no_gradient(weight, rows):
  rows = np.array(rows, bool)
  weight = None if weight is None else np.array(weight)

  def loss(x):
    return mean_loss(*bilevel.on_rows(jnp.log(x), weight, rows))

  x = jnp.array([0.0, 1.0, 2.0])  # log 0 in a row that does not count
  value, grad = jax.value_and_grad(loss)(x)
  w = rows / max(1, (rows * (1 if weight is None else weight)).sum())
  np.testing.assert_allclose(value, w[1:] @ np.log(x[1:]), atol=1e-6)
  np.testing.assert_allclose(grad[1:], w[1:] / x[1:], atol=1e-6)


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize('kwargs, words', [
    (dict(step=-1.0), 'xi=-1.0: expected a finite number, at least 0'),
    (dict(step=float('inf')), 'xi=inf'),
    (dict(form='dart'), "unknown hypergradient 'dart'.*'darts'"),
    (dict(share=1.0), r'share 1.0 of the rows: expected a number in \(0, 1\)')])
def test_bad_arguments(kwargs, words):
  with pytest.raises(ValueError, match=words):
    bilevel.outer(**{'leaves': ('a',), 'step': 0.1, **kwargs})


def test_what_cannot_be_trained_together():
  config = config_lib.defaults()
  one, other = (Method('m', None, None, outer=bilevel.outer(('a',), step))
                for step in (0.1, 0.2))
  bilevel.check(config, (one, one))
  with pytest.raises(ValueError, match='m and m_2 .* in 2 ways'):
    bilevel.check(config, (one, other))
  config.data.augment = 'crop'
  bilevel.check(config, Method('m', None, None))
  with pytest.raises(ValueError, match="data.augment='crop': m tells rows"):
    bilevel.check(config, one)


def test_without_outer_leaves_it_is_the_gradient():
  loss = lambda trained, *rest: (trained['m']['p']['a'] ** 2, 'out')
  (value, out), g = bilevel.value_and_grad(loss, Method('m', None, None))(
      {'m': {'p': dict(a=3.0)}}, *[None] * 5)
  assert (value, out, g) == (9.0, 'out', {'m': {'p': dict(a=6.0)}})


def test_weights_see_one_part_and_outer_leaves_the_other():
  """With xi = 0 the two gradients are plain ones of the two parts."""
  methods = (Method('m', None, None, outer=bilevel.outer(('a',), 0.0)),
             Method('head', None, None))
  theta = {'m': {'p': dict(a=jnp.float32(2), w=jnp.float32(1))},
           'head': {'q': dict(w=jnp.float32(3))}}
  b = dict(x=jnp.arange(10, dtype=jnp.float32))
  rows = np.asarray(bilevel.first_part(b, 0.7))
  assert 0 < rows.sum() < 10

  def loss(trained, frozen, params, batch, rng, step, rows=None):
    m, h = trained['m']['p'], trained['head']['q']
    each = (m['a'] * m['w'] * h['w']) * batch['x']
    return jnp.where(rows, each, 0).sum(), each

  (value, out), g = jax.jit(bilevel.value_and_grad(loss, methods))(
      theta, None, None, b, None, 0)
  s1, s2 = b['x'][rows].sum(), b['x'][~rows].sum()
  np.testing.assert_allclose(value, 6 * s1)
  np.testing.assert_allclose(out, 6 * b['x'])
  assert jax.tree.structure(g) == jax.tree.structure(theta)
  np.testing.assert_allclose(
      [g['m']['p']['a'], g['m']['p']['w'], g['head']['q']['w']],
      [3 * s2, 6 * s1, 2 * s1])
