"""Views: stored leaves as matrices and back, activations to match."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from peftjax import views
import pytest


@pytest.mark.parametrize('shape, perm, n_in, matrix', [
    ((4, 6), (0, 1), 1, (4, 6)),
    ((4, 2, 3), (0, 1, 2), 1, (4, 6)),
    ((2, 3, 4), (0, 1, 2), 2, (6, 4)),
    ((2, 4, 3), (1, 2, 0), 1, (4, 6)),
    ((3, 2, 4, 6), (2, 0, 1, 3), 3, (24, 6)),
    ((2, 3), (1, 0), 0, (6,)),
    ((2, 3), (0, 1), None, (2, 3)),
])
def test_get_and_put_are_inverse(shape, perm, n_in, matrix):
  view = views.View('leaf', shape, perm, n_in)
  stored = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  seen = view.get(jnp.asarray(stored))
  assert seen.shape == view.full == matrix
  np.testing.assert_array_equal(view.put(None, seen), stored)
  if n_in is None or len(matrix) == 1:
    return
  ins, outs = view.dims
  index = tuple(np.array(s) - 1 for s in ins), tuple(np.array(s) - 1
                                                     for s in outs)
  at = dict(zip(perm, (*index[0], *index[1])))
  last = stored[tuple(at[i] for i in range(len(shape)))]
  assert seen[-1, -1] == last


def test_columns_of_a_fused_kernel():
  stored = np.arange(24, dtype=np.float32).reshape(4, 6)
  view = views.matrix_view('kernel', stored)._replace(span=(2, 5))
  part = view.get(jnp.asarray(stored))
  np.testing.assert_array_equal(part, stored[:, 2:5])
  new = view.put(jnp.asarray(stored), -part)
  want = stored.copy()
  want[:, 2:5] *= -1
  np.testing.assert_array_equal(new, want)
  bias = views.matrix_view('bias', stored[0], n_in=0)._replace(span=(2, 5))
  np.testing.assert_array_equal(bias.get(jnp.asarray(stored[0])), [2, 3, 4])


@pytest.mark.filterwarnings('error')
def test_columns_take_the_type_of_what_is_stored():
  stored = jnp.zeros((3, 7), jnp.bfloat16)
  view = views.matrix_view('kernel', stored)._replace(span=(2, 5))
  new = view.put(stored, np.full((3, 3), 1 / 3, np.float32))
  assert new.dtype == jnp.bfloat16 and (new[:, 2:5] == jnp.bfloat16(1 / 3)).all()


def test_paths_with_columns():
  assert views.split_path('a/qkv[0:64]') == ('a/qkv', (0, 64))
  assert views.split_path('a/qkv') == ('a/qkv', None)
  assert views.split_path('') == ('', None)


@pytest.mark.parametrize('axes, dims, flat', [
    ((-1,), (5,), (2, 3, 4, 5)), ((-2, -1), (4, 5), (2, 3, 20)),
    ((-3, -1), (3, 5), (2, 4, 15)), ((-1, -2), (5, 4), (2, 3, 20)),
    ((-3,), (3,), (2, 4, 5, 3))])
def test_activations_are_flattened_and_restored(axes, dims, flat):
  x = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
  seen = views.flatten(jnp.asarray(x), axes)
  assert seen.shape == flat
  np.testing.assert_array_equal(views.unflatten(seen, dims, axes), x)


def layer_and_matrix(module, x):
  """Output of a layer and its view's kernel and bias, all flattened."""
  variables = jax.tree.map(
      lambda v: jnp.asarray(np.random.RandomState(v.size).normal(
          size=v.shape), v.dtype),
      jax.eval_shape(module.init, jax.random.key(0), x))
  own = variables['params']
  layout, seen = views.look(module, own, (x,))
  y = module.apply(variables, x)
  p = {n: v.get(own[v.leaf]) for n, v in seen.items()}
  return layout, p, y


@pytest.mark.parametrize('module', [
    nn.Dense(6), nn.Dense(6, use_bias=False), nn.DenseGeneral((2, 3)),
    nn.DenseGeneral(6, axis=(-3, -1)), nn.DenseGeneral((3, 2), axis=(1, -2)),
    nn.Einsum((5, 2, 3), 'bcde,ekl->bcdlk'),
    nn.Einsum((3, 5, 2), 'bcde,kel->bclkd'),
    nn.Einsum((4, 5, 6), '...de,def->...f', use_bias=False)])
def test_a_flat_layer_is_x_k_plus_b(module):
  x = np.random.RandomState(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
  layout, p, y = layer_and_matrix(module, x)
  assert layout.route == 'flat' and y.ndim > 1
  flat = views.flatten(jnp.asarray(x), layout.x_axes)
  want = flat @ p['kernel'] + p.get('bias', 0)
  np.testing.assert_allclose(
      views.flatten(y, layout.y_axes), want, rtol=0, atol=1e-5)


class Own(nn.Module):
  """Two leaves of its own, used in a way that nobody outside knows."""

  @nn.compact
  def __call__(self, x):
    w = self.param('w', nn.initializers.ones, (5, 5))
    return x @ w.T + self.param('b', nn.initializers.ones, (5,))


@pytest.mark.parametrize('module, route, shapes', [
    (nn.Conv(6, (3, 2)), 'dot', dict(kernel=(30, 6), bias=(6,))),
    (nn.Conv(10, (3,), feature_group_count=5), 'opaque',
     dict(kernel=(3, 10), bias=(10,))),
    (nn.ConvTranspose(6, (3, 2)), 'opaque', dict(kernel=(30, 6), bias=(6,))),
    (nn.Einsum((4, 5, 6), 'bcde,def->bcdf'), 'opaque',
     dict(kernel=(4, 5, 6), bias=(24,))),
    (nn.Einsum((5, 6), 'bcde,ef->bf'), 'opaque', dict(kernel=(5, 6),
                                                      bias=(6,))),
    (nn.LayerNorm(), 'plain', dict(scale=(5,), bias=(5,))),
    (Own(), 'opaque', dict(w=(5, 5), b=(5,)))])
def test_other_layers(module, route, shapes):
  x = np.random.RandomState(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
  layout, p, _ = layer_and_matrix(module, x)
  assert layout.route == route
  assert {n: v.shape for n, v in p.items()} == shapes


def test_inputs_given_by_name_are_found():
  at = lambda *args, **kwargs: views.positional(
      nn.Dense(2), '__call__', args, kwargs)
  assert at(1) == ((1,), {})
  assert at(inputs=1) == ((1,), {})
  assert at() == ((), {})
  assert at(other=2) == ((), {'other': 2})
