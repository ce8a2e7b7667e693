"""Products of low rank: plain values and gradients, nothing wide transposed."""

import jax
import jax.numpy as jnp
import numpy as np
from peftjax import program
from peftjax.ops import products
import pytest


def arrays(*shapes, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


@pytest.mark.parametrize('shape', [(7, 3), (3, 7), (5, 5)])
@pytest.mark.parametrize('lead', [(), (4,), (2, 4)])
def test_values_and_gradients_are_those_of_a_plain_product(shape, lead):
  if not lead:
    lead = (1,)
  x, a, w = arrays((*lead, shape[0]), shape, (*lead, shape[1]))
  run = lambda f: jax.value_and_grad(
      lambda x, a: (jnp.sin(f(x, a)) * w).sum(), argnums=(0, 1))(x, a)
  got, want = run(products.thin), run(jnp.matmul)
  jax.tree.map(lambda g, w: np.testing.assert_allclose(
      g, w, rtol=1e-5, atol=1e-5), got, want)


def test_gradients_have_the_operands_dtypes():
  x, = arrays((4, 7), dtype=jnp.bfloat16)
  a, = arrays((7, 3), dtype=jnp.bfloat16)
  grads = jax.grad(lambda x, a: products.thin(x, a).astype(
      jnp.float32).sum(), argnums=(0, 1))(x, a)
  assert [g.dtype for g in grads] == [jnp.bfloat16] * 2


def test_mapped_over_many_a():
  x, a, w = arrays((4, 7), (3, 7, 2), (3, 4, 2))
  loss = lambda a: (jax.vmap(lambda a: products.thin(x, a))(a) * w).sum()
  np.testing.assert_allclose(
      jax.grad(loss)(a), jnp.einsum('nd,knr->kdr', x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(7, 2), (2, 7)])
def test_gradients_of_gradients_are_those_of_a_plain_product(shape):
  """As a loss after a step of SGD has them."""
  x, a, w = arrays((3, 4, shape[0]), shape, (3, 4, shape[1]))

  def after(dot):
    loss = lambda a, x: (jnp.sin(dot(x, a)) * w).sum()

    def moved(a, x):
      g = jax.grad(loss, (0, 1))(a, x)
      return loss(a - 0.3 * g[0], x - 0.3 * g[1])

    return jax.jit(jax.grad(moved, (0, 1)))(a, x)

  for got, want in zip(after(products.thin), after(jnp.matmul)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_scale_is_that_of_the_result():
  h, b = arrays((4, 2), (2, 7))
  np.testing.assert_allclose(
      products.low_rank(h, b, 0.5), 0.5 * (h @ b), rtol=1e-6)


def test_a_low_rank_step_transposes_nothing_wide():
  """Neither x [rows, 96] nor dy [rows, 160] is written out a second time."""
  rows, r = 257, 4
  x, a, b, w = arrays((rows, 96), (96, r), (r, 160), (rows, 160))

  def step(a, b, x, w):
    y = products.low_rank(products.thin(x, a), b, 2.)
    return (jnp.sin(y) * w).sum()

  p = program.read(jax.jit(jax.grad(step, argnums=(0, 1))).lower(
      a, b, x, w).compile())
  assert not [v for v in p.arrays if v.shape in ((96, rows), (160, rows))]
  # One way there, and for each factor the way to it and to its input; x has
  # no gradient.
  assert p.flops == 2 * rows * r * (96 * 2 + 160 * 3)
