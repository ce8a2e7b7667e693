"""quantised.nf4 in closed form. Methods on top of it are in bases_test, codes
and bytes in tests/ops/quantise_test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
from peftjax.ops import quantise
import pytest


def kernels_of(net, method, theta):
  """{path: the folded kernel [d_in, d_out]}."""
  folded = pj.fold(method, net.params, theta, net.sites)
  return {p: np.asarray(net.sites[p].leaves['kernel'].get(folded[p]['kernel']))
          for p in net.linear}


def expected(kernel, bits, block, double):
  w = np.float64(kernel).T
  flat, book = w.reshape(-1), np.float64(quantise.normal_float(bits))
  runs = [flat[i:i + block] for i in range(0, flat.size, block)]
  absmax = np.array([np.abs(r).max() for r in runs])
  codes = [np.abs(r[:, None] / a - book).argmin(1)
           for r, a in zip(runs, absmax)]
  if double:
    second, mean = np.float64(quantise.dynamic_map()), absmax.mean()
    top = np.abs(absmax - mean).max()
    nearest = np.abs((absmax - mean)[:, None] / top - second).argmin(1)
    absmax = second[nearest] * top + mean
  out = np.concatenate([book[c] * a for c, a in zip(codes, absmax)])
  return out.reshape(w.shape).T


@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('scales', ['double', 'float32'])
def test_kernels_are_the_rounded_ones(net, bits, scales):
  method = pj.load('quantised.nf4', bits=bits, block=16, scales=scales)
  theta = net.start(method)
  trained, frozen = pj.partition(method, theta)
  assert pj.count(trained) == 0 and pj.count(frozen) == pj.count(theta)
  assert set(theta['nf4']) == set(net.linear)
  for path, got in kernels_of(net, method, theta).items():
    want = expected(net.kernels[path], bits, 16, scales == 'double')
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
  folded = pj.fold(method, net.params, theta, net.sites)
  np.testing.assert_array_equal(
      folded['head']['kernel'], net.params['head']['kernel'])


def test_float32_scales_are_idempotent(net):
  method = pj.load('quantised.nf4', block=16, scales='float32')
  theta = net.start(method)
  folded = pj.fold(method, net.params, theta, net.sites)
  jax.tree.map(np.testing.assert_array_equal, theta, net.start(method, folded))


def test_more_bits_are_nearer(net):
  errors = []
  for bits in (2, 3, 4):
    method = pj.load('quantised.nf4', bits=bits, block=16)
    got = kernels_of(net, method, net.start(method))
    errors.append(sum(np.square(got[p] - k).sum()
                      for p, k in net.kernels.items()))
  assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_dora_normalises_the_rounded_kernel(net):
  methods = (pj.load('quantised.nf4'), pj.load('lowrank.dora', rank=2))
  theta = net.start(methods)
  y, _ = jax.jit(lambda t: pj.apply(
      net.model, methods, net.bare, t, net.x))(theta)
  folded = pj.fold(methods, net.params, theta, net.sites)
  np.testing.assert_allclose(
      y, net.model.apply({'params': folded}, net.x), atol=1e-5)
  for path, kernel in net.kernels.items():  # m is the base's norms
    got = net.sites[path].leaves['kernel'].get(folded[path]['kernel'])
    np.testing.assert_allclose(
        np.linalg.norm(got, axis=0), np.linalg.norm(kernel, axis=0), rtol=1e-5)


def test_stores_codes_and_scales_alone(net):
  method = pj.load('quantised.nf4')
  t = net.start(method)['nf4']['split']  # [6, 8]: three bytes an output
  assert {n: (v.shape, v.dtype) for n, v in t.items()} == dict(
      codes=((8, 3), jnp.uint8), absmax=((1,), jnp.uint8),
      absmax_scale=((1,), jnp.float32), absmax_mean=((), jnp.float32))


@pytest.mark.parametrize('kwargs, message', [
    (dict(bits=8), 'bits=8: expected 2, 3 or 4 .8 are those of int8.; the '
     'nearest is 4'),
    (dict(block=7), 'block=7: expected .* from 8 to 4096; the nearest is 8'),
    (dict(block=64.5), 'block=64.5: expected a whole number'),
    (dict(scales='dubble'), "unknown scales 'dubble'; did you mean 'double'")])
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    pj.load('quantised.nf4', **kwargs)
