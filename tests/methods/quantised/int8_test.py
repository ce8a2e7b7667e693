"""quantised.int8: its error bound. Methods on top of it are in bases_test."""

import jax.numpy as jnp
import numpy as np

import peftjax as pj


def test_error_is_at_most_half_a_scale(net):
  method = pj.load('quantised.int8')
  theta = net.start(method)
  folded = pj.fold(method, net.params, theta, net.sites)
  assert set(theta['int8']) == set(net.linear)
  for path, t in theta['int8'].items():
    assert t['q'].dtype == jnp.int8 and t['scale'].dtype == jnp.float32
    get = net.sites[path].leaves['kernel'].get
    kernel = np.float64(net.kernels[path])
    scale = np.abs(kernel).max(0) / 127
    np.testing.assert_allclose(t['scale'], scale, rtol=1e-6)
    assert np.abs(t['q']).max(0).tolist() == [127] * kernel.shape[1]
    error = np.abs(np.asarray(get(folded[path]['kernel'])) - kernel)
    assert (error <= scale * (0.5 + 1e-4)).all()  # 127 scale is rounded, too
    assert error.max() > 0.3 * scale.max()
  np.testing.assert_array_equal(folded['head']['kernel'],
                                net.params['head']['kernel'])
  assert method.count(net.sites['out']) == 0
  trained, frozen = pj.partition(method, theta)
  assert pj.count(trained) == 0 and pj.count(frozen) == pj.count(theta)


def test_a_column_of_zeros_stays_zero(net):
  params = {**net.params, 'out': dict(
      kernel=net.params['out']['kernel'].at[..., 3].set(0))}
  method = pj.load('quantised.int8')
  theta = net.start(method, params)
  kernel = pj.fold(method, params, theta, net.sites)['out']['kernel']
  assert jnp.isfinite(kernel).all() and (kernel[..., 3] == 0).all()
