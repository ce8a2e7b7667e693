"""What holds for every quantised base."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj

BASES = {
    'int8': dict(name='int8'),
    'nf4': dict(name='nf4'),
    'nf2': dict(name='nf4', bits=2, block=16, scales='float32'),
    'loftq': dict(name='loftq', rank=2, block=16),
    'loftq double': dict(name='loftq', rank=2, block=16, scales='double'),
    'loftq int8': dict(name='loftq', rank=2, bits=8)}


@pytest.fixture(params=BASES)
def base(request):
  kwargs = dict(BASES[request.param])
  return pj.load(f'quantised.{kwargs.pop("name")}', **kwargs)


@pytest.mark.parametrize('outer', ['none', 'lora', 'fold-only lora'])
def test_methods_on_top_without_the_float_kernels(net, base, outer):
  methods = (base,)
  if outer != 'none':
    lora = pj.load('lowrank.lora', rank=2)
    methods += (lora._replace(layer=None) if 'fold' in outer else lora,)
  theta = net.start(methods)
  trained, frozen = pj.partition(methods, theta)
  trained = net.noisy(trained, 3)
  assert set(net.bare) == {'patch', 'split', 'head'}  # 'out' has nothing left

  def adapted(trained):
    theta = pj.combine(trained, frozen)
    y = pj.apply(net.model, methods, net.bare, theta, net.x)[0]
    return jnp.square(y).sum(), y

  def folded(trained):
    plain = pj.fold(
        methods, net.params, pj.combine(trained, frozen), net.sites)
    y = net.model.apply({'params': plain}, net.x)
    return jnp.square(y).sum(), y

  (have, y_have), (want, y_want), y = jax.jit(lambda t: (
      jax.grad(adapted, has_aux=True)(t), jax.grad(folded, has_aux=True)(t),
      net.model.apply({'params': net.params}, net.x)))(trained)
  np.testing.assert_allclose(y_have, y_want, atol=1e-5)
  assert np.abs(y_want - y).max() > 1e-4
  assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(want))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-4 * np.abs(b).max()), have, want)


def test_computes_in_the_layer_dtype(net, base):
  theta = net.start(base)
  exact, y = jax.jit(lambda t: [
      pj.apply(m, base, net.params, t, net.x)[0] for m in (net.model, net.half)
  ])(theta)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05)


class Fused(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name='head')(nn.Dense(12, name='qkv')(x))


def test_errors_and_fused_kernels(net, base):
  model, x = Fused(), jnp.ones((2, 4))
  params = net.random_params(model, x)
  with pytest.raises(ValueError, match=(
      rf"{base.name}: 'qkv\[0:4\]' is a slice.*fused=\(\)")):
    pj.init(base, jax.random.key(0), pj.describe(model, x), params)
  sites = pj.describe(model, x, fused=())
  theta = pj.init(base, jax.random.key(0), sites, params)
  y, folded = jax.jit(lambda t: (
      pj.apply(model, base, params, t, x)[0],
      model.apply({'params': pj.fold(base, params, t, sites)}, x)))(theta)
  np.testing.assert_allclose(y, folded, rtol=1e-5)
  everything = base._replace(sites=pj.select(kind=('Net', 'Dense')))
  with pytest.raises(ValueError, match='Net.*has no kernel'):
    net.start(everything)


class Wide(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(96, name='wide')(x)


def test_a_float_kernel_is_no_residual(net, base):
  if base.name == 'int8':
    pytest.skip('keeps its codes as floats between the passes')
  model, x = Wide(), jnp.ones((2, 64))
  params, sites = net.random_params(model, x), pj.describe(model, x)
  base = base._replace(sites=pj.select(path='wide'))
  theta = pj.init(base, jax.random.key(0), sites, params)
  trained, frozen = pj.partition(base, theta)
  bare = dict(wide=dict(bias=params['wide']['bias']))

  def kept(x, trained):
    run = lambda x, t: pj.apply(
        model, base, bare, pj.combine(t, frozen), x)[0]
    return jax.vjp(run, x, trained)[1]

  found = jax.tree.leaves(jax.eval_shape(kept, x, trained))
  assert not [v for v in found if v.size >= 64 * 96
              and jnp.issubdtype(v.dtype, jnp.floating)]
  if base.name == 'nf4':  # which reads no x in the backward pass
    assert {v.shape for v in found} == {
        theta['nf4']['wide'][n].shape for n in ('codes', 'absmax')}
