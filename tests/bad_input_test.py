"""Bad input: every error names the value, what was expected, and what is near.

Adapter files are in artifact_test.py, LoRA's own arguments in its test, runs
and their configs in train_test.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax
import pytest

X = np.ones((2, 8), np.float32)


class Net(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name='head')(jnp.tanh(nn.Dense(6, name='up')(x)))


def params_of(model, x=X):
  return jax.tree.map(
      lambda v: jnp.ones(v.shape, v.dtype),
      jax.eval_shape(model.init, jax.random.key(0), x))['params']


def theta_of(methods, sites, params):
  return jax.tree.map(
      lambda v: jnp.ones(v.shape, v.dtype),
      jax.eval_shape(lambda p: peftjax.init(
          methods, jax.random.key(0), sites, p), params))


@pytest.fixture(scope='module')
def net():
  model = Net()
  return model, params_of(model), peftjax.describe(model, X)


def lora(**kwargs):
  return peftjax.load('lowrank.lora', **{'rank': 2, **kwargs})


def fold_only(**kwargs):
  """Kernels times a scalar, by folding alone."""
  return peftjax.Method(
      'scale', kwargs.pop('sites', peftjax.select(leaf='kernel')),
      lambda key, site, p, stats: dict(s=jnp.ones(())),
      fold=lambda p, t: {n: v * t['s'] for n, v in p.items()}, **kwargs)


def start(net, method):
  _, params, sites = net
  return peftjax.init(method, jax.random.key(0), sites, params)


# -------------------------------------------------- methods and their arguments
@pytest.mark.parametrize('name, near', [
    ('lowrank.lara', "did you mean 'lowrank.lora'"),
    ('lora', "did you mean 'lowrank.lora'"),
    ('', r'choose from .*lowrank\.lora'), ('lowrank', 'lowrank.lora')])
def test_unknown_method(name, near):
  with pytest.raises(ValueError, match=f"unknown method '{name}'.*{near}"):
    peftjax.load(name)


def test_misspelt_hyper_parameters():
  with pytest.raises(ValueError, match=(
      "lowrank.lora has no hyper-parameter 'rnak'; did you mean 'rank'")):
    peftjax.load('lowrank.lora', rnak=8)
  with pytest.raises(ValueError, match=(
      "orthogonal.oft has no hyper-parameter 'blocksize'; did you mean "
      "'block_size'")):
    peftjax.load('orthogonal.oft', blocksize=8)
  with pytest.raises(ValueError, match=(
      "lowrank.lora: sites has no keyword 'role'; did you mean 'roles'")):
    peftjax.load('lowrank.lora', sites=dict(role='q'))
  with pytest.raises(ValueError, match='no phase 1; choose from 0 to 0'):
    peftjax.load('lowrank.lora', phase=1)


@pytest.mark.parametrize('rank, near', [(0, 1), (7, 6)])
def test_rank_outside_the_kernel(net, rank, near):
  with pytest.raises(ValueError, match=(
      f"rank {rank} at 'up': expected a whole number from 1 to 6 for a kernel "
      rf"of \[8, 6\]; the nearest is {near}")):
    start(net, lora(rank=rank))


@pytest.mark.parametrize('name', ['oft', 'coft', 'boft'])
def test_block_size_that_does_not_divide(net, name):
  method = peftjax.load(f'orthogonal.{name}', block_size=3)
  with pytest.raises(ValueError, match=r"'up'.*") as error:
    start(net, method)
  message = str(error.value)
  assert 'block_size' in message and '3' in message and '8' in message
  assert 'nearest' in message and ('2' in message or '4' in message)


def test_something_that_is_no_method(net):
  model, params, sites = net
  for wrong in ('lora', dict(name='lowrank.lora'), [lora], [None]):
    with pytest.raises(ValueError, match='expected a Method.*peftjax.load'):
      peftjax.init(wrong, jax.random.key(0), sites, params)
  with pytest.raises(ValueError, match='expected a Method.*peftjax.load'):
    peftjax.apply(model, 'lora', params, {}, X)


# ------------------------------------------------------------------ selections
def test_selection_that_matches_nothing(net):
  with pytest.raises(ValueError, match=(
      r"(?s)lora: select\(roles=\('q', 'v'\)\) matches no site. There are:.*"
      r"up +Dense +up +kernel\[8, 6\] bias\[6\].*head +Dense +head")):
    start(net, lora(sites=peftjax.select(roles='qv')))
  with pytest.raises(ValueError, match='(?s)lora: never matches no site.*head'):
    def never(site):
      return not site.path and site.path
    start(net, lora(sites=never))


def test_a_part_of_a_selection_that_matches_nothing(net):
  with pytest.raises(ValueError, match=(
      "lora: roles='down' matches no site; choose from head, up")):
    start(net, lora(sites=peftjax.select(roles=('up', 'down'))))
  with pytest.raises(ValueError, match=(
      "lora: path='haed' matches no site; did you mean 'head'")):
    start(net, lora(sites=dict(path=['up', 'haed'])))


def test_unknown_role_and_broken_pattern():
  with pytest.raises(ValueError, match="unknown role 'dwon'; did you mean 'do"):
    lora(sites=dict(roles=('up', 'dwon')))
  with pytest.raises(ValueError, match=r"path '\(up' is not a regular express"):
    lora(sites=dict(path='(up'))


# ------------------------------------------------------------------- base trees
def test_params_that_do_not_fit_the_model(net):
  model, params, sites = net
  method = lora()
  theta = theta_of(method, sites, params)
  renamed = dict(upp=params['up'], head=params['head'])
  thin = dict(params, up=dict(params['up'], kernel=jnp.ones((8, 5))))
  for call in (
      lambda p: peftjax.init(method, jax.random.key(0), sites, p),
      lambda p: peftjax.fold(method, p, theta, sites)):
    with pytest.raises(ValueError, match=(
        "params has no 'up/kernel'; did you mean 'upp/kernel'")):
      call(renamed)
    with pytest.raises(ValueError, match=(
        r"'up/kernel' has shape \(8, 5\), .*\(8, 6\)")):
      call(thin)
    with pytest.raises(ValueError, match=(
        "params has no 'up/kernel'; did you mean 'params/up/kernel'")):
      call(dict(params=params))  # the whole of what model.init returns
  with pytest.raises(ValueError, match="lora: the params tree has no 'up'; di"):
    peftjax.apply(model, method, renamed, theta, X)
  with pytest.raises(ValueError, match=(
      r'does not fit the model: .*"/up".*\(8, 6\).*shape \(8, 5\)')):
    peftjax.apply(model, method, thin, theta, X)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_nan_in_the_base(net, bad):
  _, params, sites = net
  broken = dict(params, up=dict(
      params['up'], bias=params['up']['bias'].at[3].set(bad)))
  with pytest.raises(ValueError, match='base holds NaN or infinity in up/bias'):
    peftjax.init(lora(), jax.random.key(0), sites, broken)


def test_boxed_params_are_refused():
  class Boxed(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(4, kernel_init=nn.with_partitioning(
          nn.initializers.ones, ('in', 'out')), name='up')(x)

  with pytest.raises(ValueError, match=(
      r'up: boxed parameters \(nn.with_partitioning\).*meta.unbox')):
    peftjax.describe(Boxed(), X)


def test_boxed_params_given_to_a_plain_model_are_refused(net):
  _, params, sites = net
  boxed = jax.tree.map(
      lambda v: nn.Partitioned(v, (None,) * v.ndim), params)
  with pytest.raises(ValueError, match=(
      "'up/(kernel|bias)' is a Partitioned, .*meta.unbox")):
    peftjax.init(lora(), jax.random.key(0), sites, boxed)


def test_modules_that_share_a_scope_are_refused():
  class Wrapped(nn.Module):

    def setup(self):
      self.dense = nn.Dense(4)
      nn.share_scope(self, self.dense)

    def __call__(self, x):
      return 2 * self.dense(x)

  class Model(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(Wrapped(name='wrapped')(x))

  with pytest.raises(ValueError, match=(
      r'wrapped: modules Dense and Wrapped share one scope .nn.share_scope.')):
    peftjax.describe(Model(), X)


def test_layers_with_state_need_a_layer_view():
  class Normed(nn.Module):

    @nn.compact
    def __call__(self, x):
      x = nn.BatchNorm(use_running_average=True, name='norm')(x)
      return nn.Dense(4)(x)

  model = Normed()
  variables = model.init(jax.random.key(0), X)
  sites = peftjax.describe(model, X)
  method = fold_only(sites=peftjax.select(kind='BatchNorm'))
  theta = theta_of(method, sites, variables['params'])
  state = {'batch_stats': variables['batch_stats']}
  with pytest.raises(ValueError, match=(
      r"norm \(BatchNorm\) keeps state in \['batch_stats'\]; scale has no "
      'layer view')):
    peftjax.apply(model, method, variables['params'], theta, X, variables=state)
  # With one it works, and so do methods on layers without state.
  layer = method._replace(layer=lambda f, x, t, ctx: f(x) * t['s'])
  for m in (layer, fold_only(sites=peftjax.select(kind='Dense'))):
    theta = theta_of(m, sites, variables['params'])
    y, _ = peftjax.apply(
        model, m, variables['params'], theta, X, variables=state)
    np.testing.assert_allclose(y, model.apply(variables, X), rtol=1e-6)


# ------------------------------------------------------------------------ theta
def test_theta_of_other_methods(net):
  model, params, sites = net
  theta = theta_of(lora(), sites, params)
  other = fold_only()
  for call in (
      lambda: peftjax.apply(model, other, params, theta, X),
      lambda: peftjax.fold(other, params, theta, sites),
      lambda: peftjax.partition(other, theta),
      lambda: peftjax.apply(model, (lora(), lora()), params, theta, X)):
    with pytest.raises(ValueError, match=(
        r"theta holds \['lora'\], the methods are \['(scale|lora', 'lora_2)'")):
      call()


def test_theta_for_a_layer_that_the_model_does_not_have(net):
  model, params, sites = net
  t = theta_of(lora(), sites, params)['lora']['up']
  theta = {'lora': {'upp': t}}
  with pytest.raises(ValueError, match="no 'upp'; did you mean 'up'"):
    peftjax.apply(model, lora(), params, theta, X)
  with pytest.raises(ValueError, match="no site 'upp'; did you mean 'up'"):
    peftjax.fold(lora(), params, theta, sites)


def test_theta_for_a_layer_that_is_never_called(net):
  class Skips(nn.Module):

    def setup(self):
      self.up, self.head = nn.Dense(6), nn.Dense(4)

    def __call__(self, x, skip=False):
      return self.head(x[:, :6] if skip else self.up(x))

  model = Skips()
  _, params, sites = net
  theta = theta_of(lora(), sites, params)
  peftjax.apply(model, lora(), params, theta, X)
  with pytest.raises(ValueError, match=(
      "lora: theta for 'up' was never used: the model did not call __call__")):
    peftjax.apply(model, lora(), params, theta, X, skip=True)


def test_theta_of_another_shape(net):
  model, params, sites = net
  theta = theta_of(lora(), sites, params)
  theta['lora']['up']['a'] = jnp.ones((7, 2))
  for call in (lambda: peftjax.apply(model, lora(), params, theta, X),
               lambda: peftjax.fold(lora(), params, theta, sites)):
    with pytest.raises((TypeError, ValueError), match=(
        r"(?s)\(7,.*in lora at 'up'")):
      call()


def test_methods_that_cannot_fold(net):
  _, params, sites = net
  method = fold_only()._replace(fold=None, layer=lambda f, x, t, ctx: f(x))
  theta = theta_of(method, sites, params)
  with pytest.raises(ValueError, match=(
      'scale has no fold: it changes activations, not weights')):
    peftjax.fold(method, params, theta, sites)
  with pytest.raises(ValueError, match='scale has no fold'):
    peftjax.apply(lambda p, x: x, method, dict(up=params['up']), theta, X)


def test_methods_in_an_order_that_loses_something(net):
  methods = (lora(), peftjax.load('selective.full'))
  with pytest.raises(ValueError, match=(
      "full replaces leaves of 'up', which an inner method changes: put full "
      'first')):
    start(net, methods)
  int8, nf4 = (peftjax.load(f'quantised.{n}') for n in ('int8', 'nf4'))
  for methods in ((lora(), int8), (nf4, int8)):
    with pytest.raises(ValueError, match=(
        "int8 holds 'kernel' of 'up' itself, .* would be lost: put it first")):
      start(net, methods)
  bias = peftjax.load('selective.bitfit')
  assert set(start(net, (bias, int8, lora()))) == {'bitfit', 'int8', 'lora'}


def test_fold_that_makes_an_unknown_leaf(net):
  _, params, sites = net
  method = fold_only()._replace(fold=lambda p, t: {**p, 'gain': t['s']})
  theta = theta_of(method, sites, params)
  with pytest.raises(ValueError, match=(
      r"scale at '(up|head)': folding needs a leaf 'gain' .*\['bias', 'kerne")):
    peftjax.fold(method, params, theta, sites)
