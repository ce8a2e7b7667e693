"""Fold on trees that are not Linen's, and on every kind of Linen kernel."""

import flax.linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import peftjax
import pytest

KERNELS = peftjax.select(leaf='kernel')
LORA = peftjax.load('lowrank.lora', rank=2, alpha=2.0, sites=KERNELS)
X = np.random.RandomState(1).normal(size=(4, 8)).astype(np.float32)


def filled(function, *args):
  """What a function returns, in shape only, with random numbers in it."""
  rng = np.random.RandomState(0)
  return jax.tree.map(
      lambda v: jnp.asarray(rng.normal(0, 0.3, v.shape), v.dtype),
      jax.eval_shape(function, *args))


def random_theta(methods, sites, params):
  return filled(
      lambda p: peftjax.init(methods, jax.random.key(0), sites, p), params)


def close(a, b):
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), a, b)


# ------------------------------------------------------- not written in Linen
class Net(nnx.Module):

  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(8, 6, rngs=rngs),
                            nnx.Linear(6, 3, rngs=rngs)])

  def __call__(self, x):
    return self.layers[1](jnp.tanh(self.layers[0](x)))


def test_fold_of_an_nnx_state():
  net = Net(nnx.Rngs(0))
  graph, state = nnx.split(net)
  params = nnx.to_pure_dict(state)
  sites = peftjax.describe(params)
  assert {p: s.params['kernel'].shape for p, s in sites.items()} == {
      'layers/0': (8, 6), 'layers/1': (6, 3)}
  theta = random_theta(LORA, sites, params)
  folded = peftjax.fold(LORA, params, theta, sites)
  assert jax.tree.structure(folded) == jax.tree.structure(params)
  nnx.replace_by_pure_dict(state, folded)
  adapted = nnx.merge(graph, state)
  h = X
  for i, layer in enumerate(net.layers):
    t = theta['lora'][f'layers/{i}']
    h = h @ layer.kernel[...] + layer.bias[...] + h @ t['a'] @ t['b']
    h = h if i else jnp.tanh(h)
  close(adapted(X), h)
  assert np.abs(adapted(X) - net(X)).max() > 0.1
  # The same through apply, as a function of the pure params.
  def run(params, x):
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(x)
  y, aux = peftjax.apply(run, LORA, params, theta, X)
  close(y, h)
  assert aux == {}


def mlp(params, x):
  for p in params['layers']:
    x = jnp.tanh(x @ p['w'] + p['b'])
  return x @ params['out']['w']


def test_apply_to_a_plain_function_and_its_gradient():
  rng = np.random.RandomState(0)
  draw = lambda *shape: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)
  params = dict(layers=[dict(w=draw(8, 8), b=draw(8)) for _ in range(2)],
                out=dict(w=draw(8, 3)))
  sites = peftjax.describe(params)
  assert list(sites) == ['layers/0', 'layers/1', 'out']
  assert set(sites['layers/0'].params) == {'kernel', 'bias'}
  shift = peftjax.Method(
      'shift', peftjax.select(leaf='bias'),
      lambda key, site, p, stats: dict(s=jnp.zeros(p['bias'].shape)),
      fold=lambda p, t: {**p, 'bias': p['bias'] + t['s']})
  methods = (LORA, shift)
  theta = random_theta(methods, sites, params)

  def by_hand(theta, x):
    for i, p in enumerate(params['layers']):
      t = theta['lora'][f'layers/{i}']
      x = jnp.tanh(x @ p['w'] + x @ t['a'] @ t['b'] + p['b']
                   + theta['shift'][f'layers/{i}']['s'])
    t = theta['lora']['out']
    return x @ params['out']['w'] + x @ t['a'] @ t['b']

  @jax.jit
  def run(theta):
    grad = lambda f: jax.value_and_grad(lambda t: f(t).sum())(theta)
    return (grad(lambda t: peftjax.apply(mlp, methods, params, t, X)[0]),
            grad(lambda t: by_hand(t, X)))

  close(*run(theta))
  folded = peftjax.fold(methods, params, theta, sites)
  assert isinstance(folded['layers'], list)
  close(mlp(folded, X), by_hand(theta, X))


def test_describe_of_something_else_is_an_error():
  with pytest.raises(ValueError, match='neither a Linen module nor a tree'):
    peftjax.describe(mlp)


def test_low_precision_params_are_folded_in_float32():
  params = dict(w=jnp.ones((8, 8), jnp.bfloat16))
  sites = peftjax.describe(params)
  theta = random_theta(LORA, sites, params)
  got = peftjax.fold(LORA, params, theta, sites)['w']
  t = theta['lora']['']
  want = (jnp.ones((8, 8)) + t['a'] @ t['b']).astype(jnp.bfloat16)
  np.testing.assert_array_equal(got, want)


def test_products_are_exact_but_in_training():
  """What is exported, not what a step makes of a model that is not Linen's."""
  params = dict(w=jnp.ones((8, 8)))
  sites = peftjax.describe(params)
  theta = random_theta(LORA, sites, params)
  for train in (False, True):
    text = jax.jit(lambda p, t, train=train: peftjax.fold(
        LORA, p, t, sites, train=train)).lower(params, theta).as_text()
    products = [line for line in text.splitlines() if 'dot_general' in line]
    assert products
    assert all(('HIGHEST' in line) != train for line in products)


# ------------------------------------------------------ every kind of kernel
def check_layer_equals_fold(model, x, methods=LORA, **kwargs):
  """Value and gradient of both views of all methods; returns the output."""
  params = filled(model.init, jax.random.key(0), x)['params']
  sites = peftjax.describe(model, x)
  theta = random_theta(methods, sites, params)

  @jax.jit
  def run(params, theta):
    grad = lambda f: jax.value_and_grad(lambda t: jnp.sin(f(t)).sum())(theta)
    return (
        grad(lambda t: peftjax.apply(
            model, methods, params, t, x, **kwargs)[0]),
        grad(lambda t: model.apply(
            {'params': peftjax.fold(methods, params, t, sites)}, x)),
        model.apply({'params': params}, x))

  (v1, g1), (v2, g2), base = run(params, theta)
  close((v1, g1), (v2, g2))
  assert abs(v1 - jnp.sin(base).sum()) > 1e-3
  return sites


def scaled():
  """Scale and shift of the output; both views know columns and the bias."""

  def init(key, site, p, stats):
    return dict(s=jnp.ones(p['kernel'].shape[1]))

  def fold(p, t):
    new = {**p, 'kernel': p['kernel'] * t['s']}
    return new | ({'bias': p['bias'] * t['s']} if 'bias' in p else {})

  return peftjax.Method('scaled', KERNELS, init, fold=fold,
                        layer=lambda f, x, t, ctx: f(x) * t['s'])


@pytest.mark.parametrize('shape, equation, width', [
    ((2, 8, 3), 'btd,kdh->bthk', 6),  # outputs in another order than stored
    ((8, 3, 2), 'btd,dhk->bkht', 6),  # and apart from the last axes
    ((3, 8, 2), 'dbt,hdk->tbkh', 6),  # rows in another order
    ((5, 4, 2), '...td,kdt->...k', 5),  # two inputs
    ((8, 5), 'btd,dk->bk', 5),  # tokens summed up
])
def test_einsum_with_odd_orders_of_axes(shape, equation, width):
  class Model(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Einsum(shape, equation, name='e')(x)

  x = np.random.RandomState(0).normal(size=(3, 2, 8)).astype(np.float32)
  x = dict(d=x.transpose(2, 0, 1), b=x).get(equation[0], x[..., :4])
  sites = check_layer_equals_fold(Model(), x, (LORA, scaled()))
  assert sites['e'].params['kernel'].shape[1] == width
  assert sites['e'].params['bias'].shape == (width,)


class Kernels(nn.Module):
  """One layer of a class that is given by name."""

  kind: str

  @nn.compact
  def __call__(self, x):
    kinds = dict(
        general=lambda: nn.DenseGeneral((3, 2), axis=(-3, -1)),
        strided=lambda: nn.Conv(6, (3, 2), 2, padding='VALID'),
        grouped=lambda: nn.Conv(4, (3, 3), feature_group_count=2),
        masked=lambda: nn.Conv(6, (3, 3), mask=np.tri(9).reshape(
            3, 3, 9)[..., None][:, :, :4, :] * np.ones(6)),
        transposed=lambda: nn.ConvTranspose(6, (3, 3), (2, 2)),
        flipped=lambda: nn.ConvTranspose(
            6, (3, 3), (2, 2), transpose_kernel=True))
    return kinds[self.kind]()(x)


@pytest.mark.parametrize('kind', [
    'general', 'strided', 'grouped', 'masked', 'transposed', 'flipped'])
def test_other_kernels(kind):
  x = np.random.RandomState(0).normal(size=(2, 5, 6, 4)).astype(np.float32)
  sites = check_layer_equals_fold(Kernels(kind), x, (scaled(), LORA))
  (site,) = [s for s in sites.values() if s.params]
  assert site.params['kernel'].shape == dict(
      general=(20, 6), strided=(24, 6), grouped=(18, 4), masked=(36, 6),
      transposed=(36, 6), flipped=(36, 6))[kind]


def test_tied_embedding_is_changed_on_both_sides():
  class Model(nn.Module):

    @nn.compact
    def __call__(self, ids):
      table = nn.Embed(11, 8, name='table')
      return table.attend(jnp.tanh(nn.Dense(8)(table(ids))))

  ids = np.arange(6).reshape(2, 3)
  sites = check_layer_equals_fold(Model(), ids)
  assert sites['table'].role == 'embed'


def test_random_parts_of_a_fold_follow_the_key():
  noise = peftjax.Method(
      'noise', KERNELS, lambda key, site, p, stats: dict(s=jnp.ones(())),
      prepare=lambda t, ctx: dict(s=t['s'] * (
          jax.random.uniform(ctx.rng) if ctx.train else 1.0)),
      fold=lambda p, t: {**p, 'kernel': p['kernel'] * t['s']})
  params = dict(a=dict(w=jnp.ones((2, 2))), b=dict(w=jnp.ones((2, 2))))
  sites = peftjax.describe(params)
  theta = {'noise': {'a': dict(s=jnp.ones(())), 'b': dict(s=jnp.ones(()))}}
  fold = lambda seed, train: [float(v[0, 0]) for v in jax.tree.leaves(
      peftjax.fold(noise, params, theta, sites, train=train,
                   rng=jax.random.key(seed)))]
  assert fold(0, False) == [1, 1]
  assert fold(0, True) == fold(0, True)
  assert len({*fold(0, True), *fold(1, True)}) == 4
