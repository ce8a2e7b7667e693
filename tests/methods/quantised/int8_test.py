"""quantised.int8: its error bound, and methods on top of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax import trees


class Net(nn.Module):
  """A convolution, a DenseGeneral and Dense layers, one without a bias."""
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (2, 2), (2, 2), dtype=self.dtype, name='patch')(x)
    x = x.reshape(x.shape[0], -1, 6)
    x = nn.DenseGeneral((2, 4), dtype=self.dtype, name='split')(x)
    x = nn.DenseGeneral(8, (-2, -1), use_bias=False, dtype=self.dtype,
                        name='out')(x)
    return nn.Dense(3, dtype=self.dtype, name='head')(jnp.tanh(x).mean(1))


MODEL = Net()
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 3)), jnp.float32)
SITES = pj.describe(MODEL, X)
LINEAR = ('patch', 'split', 'out')


def noisy(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda v: jnp.asarray(
      v + rng.normal(0, 0.3, v.shape).astype(v.dtype)), tree)


def random_params(model, x):
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  return noisy(jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), shapes), 2)


PARAMS = random_params(MODEL, X)


def without_kernels(params):
  return trees.unflatten({p: v for p, v in trees.flatten(params).items()
                          if p not in {f'{n}/kernel' for n in LINEAR}})


def test_error_is_at_most_half_a_scale():
  method = pj.load('quantised.int8')
  theta = pj.init(method, jax.random.key(0), SITES, PARAMS)
  folded = pj.fold(method, PARAMS, theta, SITES)
  assert set(theta['int8']) == set(LINEAR)
  for path, t in theta['int8'].items():
    assert t['q'].dtype == jnp.int8 and t['scale'].dtype == jnp.float32
    get = SITES[path].leaves['kernel'].get
    kernel = np.asarray(get(PARAMS[path]['kernel']), np.float64)
    scale = np.abs(kernel).max(0) / 127
    np.testing.assert_allclose(t['scale'], scale, rtol=1e-6)
    assert np.abs(t['q']).max(0).tolist() == [127] * kernel.shape[1]
    error = np.abs(np.asarray(get(folded[path]['kernel'])) - kernel)
    assert (error <= scale * (0.5 + 1e-4)).all()  # 127 scale is rounded, too
    assert error.max() > 0.3 * scale.max()
  np.testing.assert_array_equal(folded['head']['kernel'],
                                PARAMS['head']['kernel'])
  assert method.count(SITES['out']) == 0
  trained, frozen = pj.partition(method, theta)
  assert pj.count(trained) == 0 and pj.count(frozen) == pj.count(theta)


def test_a_column_of_zeros_stays_zero():
  params = {**PARAMS, 'out': dict(
      kernel=PARAMS['out']['kernel'].at[..., 3].set(0))}
  method = pj.load('quantised.int8')
  theta = pj.init(method, jax.random.key(0), SITES, params)
  kernel = pj.fold(method, params, theta, SITES)['out']['kernel']
  assert jnp.isfinite(kernel).all() and (kernel[..., 3] == 0).all()


@pytest.mark.parametrize('outer', ['none', 'lora', 'fold-only lora'])
def test_methods_on_top_without_the_float_kernels(outer):
  methods = (pj.load('quantised.int8'),)
  if outer != 'none':
    lora = pj.load('lowrank.lora', rank=2)
    methods += (lora._replace(layer=None) if 'fold' in outer else lora,)
  theta = pj.init(methods, jax.random.key(0), SITES, PARAMS)
  trained, frozen = pj.partition(methods, theta)
  trained = noisy(trained, 3)
  bare = without_kernels(PARAMS)
  assert set(bare) == {'patch', 'split', 'head'}  # 'out' has nothing left

  def adapted(trained):
    y = pj.apply(MODEL, methods, bare, pj.combine(trained, frozen), X)[0]
    return jnp.square(y).sum(), y

  def folded(trained):
    plain = pj.fold(methods, PARAMS, pj.combine(trained, frozen), SITES)
    y = MODEL.apply({'params': plain}, X)
    return jnp.square(y).sum(), y

  (have, y_have), (want, y_want), y = jax.jit(lambda t: (
      jax.grad(adapted, has_aux=True)(t), jax.grad(folded, has_aux=True)(t),
      MODEL.apply({'params': PARAMS}, X)))(trained)
  np.testing.assert_allclose(y_have, y_want, atol=1e-5)
  assert np.abs(y_want - y).max() > 1e-4
  if outer != 'none':
    assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-4, atol=1e-5), have, want)


def test_computes_in_the_layer_dtype():
  method = pj.load('quantised.int8')
  theta = pj.init(method, jax.random.key(0), SITES, PARAMS)
  exact, y = jax.jit(lambda t: [
      pj.apply(m, method, PARAMS, t, X)[0] for m in (MODEL, Net('bfloat16'))
  ])(theta)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05)


class Fused(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name='head')(nn.Dense(12, name='qkv')(x))


def test_errors_and_fused_kernels():
  method = pj.load('quantised.int8')
  model, x = Fused(), jnp.ones((2, 4))
  params = random_params(model, x)
  with pytest.raises(ValueError, match=r"'qkv\[0:4\]' is a slice.*fused=\(\)"):
    pj.init(method, jax.random.key(0), pj.describe(model, x), params)
  sites = pj.describe(model, x, fused=())
  theta = pj.init(method, jax.random.key(0), sites, params)
  y, folded = jax.jit(lambda t: (
      pj.apply(model, method, params, t, x)[0],
      model.apply({'params': pj.fold(method, params, t, sites)}, x)))(theta)
  np.testing.assert_allclose(y, folded, rtol=1e-5)
  everything = pj.load('quantised.int8', sites=dict(kind=('Net', 'Dense')))
  with pytest.raises(ValueError, match=r"'' \(Net\) has no kernel"):
    pj.init(everything, jax.random.key(0), SITES, PARAMS)
