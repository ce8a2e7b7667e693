"""DeLoRA: its bounds and invariances, closed forms, and Hugging Face PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax
from peftjax import config as config_lib
from peftjax import optim
import pytest

FORMS = ['mlp', 'image', 'words']
BOTH = pytest.mark.parametrize('form', ['paper', 'peft'])


def load(case, **kwargs):
  return peftjax.load('lowrank.delora', **{'sites': case.chosen, **kwargs})


def start(method, case):
  return peftjax.init(method, jax.random.key(0), case.sites, case.params)


def matrix(p):
  """A layer's kernel [d_in, d_out] in float64, as a method sees it."""
  k = np.float64(p['embedding'] if 'embedding' in p else p['kernel'])
  return k.transpose(2, 0, 1, 3).reshape(-1, k.shape[-1]) if k.ndim == 4 else k


def product(a, b):
  """sum_i A_i B_i / (||A_i|| ||B_i||) in float64."""
  a, b = np.float64(a), np.float64(b)
  return a / np.linalg.norm(a, axis=0) @ (
      b / np.linalg.norm(b, axis=1, keepdims=True))


def deltas(case, method, theta):
  folded = peftjax.fold(method, case.params, theta, case.sites)
  return {site: matrix(folded[site]) - matrix(case.params[site])
          for site in theta['delora']}


def gradients(case, method, theta):
  @jax.jit
  @jax.grad
  def fn(theta):
    y, _ = peftjax.apply(case.model, method, case.params, theta, case.x)
    return jnp.sin(y).sum()
  return fn(theta)['delora']


# ------------------------------------------------------------------ properties
@BOTH
@pytest.mark.parametrize('name', FORMS)
def test_is_bounded_by_its_strength_whatever_the_factors(
    case, moved, name, form):
  c = case(name)
  method = load(c, rank=3, strength=2.0, form=form)
  for scale in (1e-3, 0.3, 100.0):
    theta = moved(method, c, scale)
    found = deltas(c, method, theta)
    for site, t in theta['delora'].items():
      top = np.linalg.norm(matrix(c.params[site]), axis=1).max()
      most = (1 + (form == 'paper')) * np.abs(t['strength']) * top
      assert np.linalg.norm(found[site]) <= most * (1 + 1e-5)
      one = np.abs(t['strength']) / 3 * product(t['a'], t['b'])
      assert np.linalg.norm(one) <= np.abs(t['strength']) * (1 + 1e-6)


@BOTH
def test_lengths_of_the_factors_change_nothing(case, moved, form):
  c = case('mlp')
  method = load(c, rank=3, strength=2.0, form=form)
  theta = moved(method, c)
  longer = jax.tree.map(jnp.asarray, theta)
  for t in longer['delora'].values():
    t['a'] = t['a'] * jnp.array([7., 0.1, 3.])
    t['b'] = t['b'] * jnp.array([[0.5], [20.], [3.]])
  got, want = (deltas(c, method, t) for t in (longer, theta))
  for site in want:
    np.testing.assert_allclose(got[site], want[site], atol=2e-6)
  for site, g in gradients(c, method, theta).items():
    t = theta['delora'][site]
    for leaf, axis in (('a', 0), ('b', 1)):  # orthogonal to the factors
      size = np.linalg.norm(g[leaf], axis=axis)
      assert (size > 1e-3).all()
      np.testing.assert_allclose(
          (t[leaf] * g[leaf]).sum(axis) / size, 0, atol=1e-5)


@BOTH
@pytest.mark.parametrize('name', FORMS)
def test_starts_as_the_base_to_the_bit(case, name, form):
  c = case(name)
  method = load(c, rank=3, form=form)
  theta = start(method, c)
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_array_equal(y, c.model.apply({'params': c.params}, c.x))
  used = jax.jit(lambda t: method.prepare(t, None))(theta['delora'][
      next(iter(theta['delora']))])
  if form == 'paper':  # not by luck in the order of sums
    assert not used['a'][:, :3].any() and not used['b'][3:].any()
  jax.tree.map(np.testing.assert_array_equal, c.params,
               peftjax.fold(method, c.params, theta, c.sites))


@BOTH
def test_what_is_trained_and_stored(case, form):
  c = case('mlp')
  method = load(c, rank=3, strength=12.0, form=form)
  trained, frozen = peftjax.partition(method, start(method, c))
  t, data = trained['delora']['one'], frozen['delora']['one']
  assert {n: v.shape for n, v in t.items()} == dict(
      a=(12, 3), b=(3, 10), strength=())
  assert method.count(c.sites['one']) == 3 * 22 + 1
  assert t['strength'] == 12
  assert set(data) == ({'w'} if form == 'peft' else {'w', 'a0', 'b0'})
  np.testing.assert_allclose(
      data['w'], np.linalg.norm(c.params['one']['kernel'], axis=1), rtol=1e-6)
  assert 0.2 < np.abs(t['a']).max() <= 12 ** -0.5
  if form == 'paper':
    assert 0.4 < np.abs(t['b']).max() <= 3 ** -0.5
  else:
    assert not t['b'].any()


def test_a_step_moves_the_factors_away_from_their_copies(case):
  """Copies that shared memory with them would keep the delta at zero."""
  c = case('mlp')
  method = load(c, rank=3)
  theta = start(method, c)
  trained, frozen = peftjax.partition(method, theta)
  g = gradients(c, method, theta)
  for site, t in trained['delora'].items():
    assert g[site]['strength'] == 0  # the delta is
    for leaf in 'ab':
      assert np.abs(g[site][leaf]).max() > 1e-2
      t[leaf] = t[leaf] - 0.1 * g[site][leaf]
  moved = peftjax.combine(trained, frozen)
  for site, d in deltas(c, method, moved).items():
    assert np.abs(d).max() > 1e-2, site


# ----------------------------------------------------------------- closed forms
@BOTH
@pytest.mark.parametrize('name', FORMS)
def test_delta_is_the_formula(case, moved, name, form):
  c = case(name)
  method = load(c, rank=2, strength=3.0, form=form)
  theta = moved(method, c)
  got = deltas(c, method, theta)
  for site, t in theta['delora'].items():
    w = np.linalg.norm(matrix(c.params[site]), axis=1)
    n = product(t['a'], t['b'])
    if form == 'paper':
      n -= product(t['a0'], t['b0'])
    want = np.float64(t['strength']) / 2 * w[:, None] * n
    np.testing.assert_allclose(got[site], want, atol=5e-6)
  folded = peftjax.fold(method, c.params, theta, c.sites)
  run = jax.jit(
      lambda t: peftjax.apply(c.model, method, c.params, t, c.x)[0])
  np.testing.assert_allclose(
      run(theta), c.model.apply({'params': folded}, c.x), atol=2e-5)


def test_small_turns_are_exact(case):
  """A difference of two normalised factors has no digits left at 1e-6."""
  c = case('mlp')
  method = load(c, rank=2, strength=2.0)
  t = start(method, c)['delora']['one']
  a = np.float64(t['a'])
  near = {**t, 'a': jnp.asarray(a * (1 + 1e-6 * np.arange(12)[:, None]),
                                jnp.float32)}
  used = method.prepare(near, peftjax.Context('one'))
  want = np.float64(t['w'])[:, None] * (
      (lambda v: v / np.linalg.norm(v, axis=0))(np.float64(near['a']))
      - a / np.linalg.norm(a, axis=0))
  np.testing.assert_allclose(
      used['a'][:, :2], want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_columns_of_zeros_are_no_nan(case):
  c = case('mlp')
  for form in ('paper', 'peft'):
    method = load(c, rank=2, form=form)
    theta = start(method, c)
    t = theta['delora']['one']
    t['a'], t['b'] = t['a'].at[:, 0].set(0), t['b'].at[0].set(0)
    for v in jax.tree.leaves((deltas(c, method, theta),
                              gradients(c, method, theta))):
      assert np.isfinite(v).all()


def test_patterns_choose_the_rank_and_so_the_share_of_a_term(case, moved):
  c = case('mlp')
  method = load(c, rank=3, strength=6.0, rank_pattern={'two': 1}, form='peft')
  theta = moved(method, c)
  for site, r in (('one', 3), ('two', 1)):
    t = theta['delora'][site]
    assert t['a'].shape[1] == r
    used = method.prepare(t, peftjax.Context(site))
    np.testing.assert_allclose(used['scale'], t['strength'] / r, rtol=1e-6)


def test_the_strength_has_a_rate_of_its_own_and_no_decay(case, moved):
  c = case('mlp')
  method = load(c, rank=2)
  trained, _ = peftjax.partition(method, moved(method, c))
  grads = jax.tree.map(jnp.ones_like, trained)
  for given, rate in ((None, 1e-3), (0.03, 0.03)):
    conf = config_lib.defaults().optim
    conf.schedule, conf.warmup, conf.weight_decay = 'constant', 0.0, 0.1
    conf.groups.strength.lr_abs = given
    tx = optim.make(conf, method, trained, 2)
    updates, _ = tx.update(grads, tx.init(trained), trained)
    new = optax.apply_updates(trained, updates)['delora']['one']
    old = trained['delora']['one']
    np.testing.assert_allclose(
        old['strength'] - new['strength'], rate, rtol=1e-2)
    np.testing.assert_allclose(
        old['a'] - new['a'], 1e-3 * (1 + 0.1 * old['a']), rtol=1e-3)


@pytest.mark.parametrize('kwargs, message', [
    (dict(strength=0.0), 'strength=0.0: expected a finite number above 0'),
    (dict(form='code'), "unknown form 'code'.*"),
    (dict(rank=7), "rank 7 at 'two': expected .* from 1 to 6 .*nearest is 6"),
    (dict(dropout=1.0), r'dropout=1.0: expected a rate in \[0, 1\)'),
    (dict(rank_pattern={'onne': 1}), "'onne' matches none .*'one'")])
def test_bad_arguments(case, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    start(load(c, **{'rank': 2, **kwargs}), c)


# ------------------------------------------------------------- another library
@pytest.fixture
def net(case):
  """(model in PEFT, {layer: {leaf: parameter}}, tensor) of the case 'mlp'."""
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  if not hasattr(peft, 'DeloraConfig'):
    pytest.skip('this version of PEFT has no DeLoRA')
  tensor = lambda v: torch.from_numpy(np.array(v))
  c = case('mlp')

  def make(**options):
    net = torch.nn.Sequential()
    for name, shape in (('one', (12, 10)), ('two', (10, 6))):
      net.add_module(name, torch.nn.Linear(*shape))
      with torch.no_grad():
        net.get_submodule(name).weight.copy_(tensor(c.params[name]['kernel'].T))
        net.get_submodule(name).bias.copy_(tensor(c.params[name]['bias']))
      if name == 'one':
        net.add_module('tanh', torch.nn.Tanh())
    model = peft.get_peft_model(net, peft.DeloraConfig(
        target_modules=['one', 'two'], **options))
    parts = {}
    for name in ('one', 'two'):
      layer = model.base_model.model.get_submodule(name)
      parts[name] = dict(
          a=layer.delora_A['default'], b=layer.delora_B['default'],
          strength=layer.delora_lambda['default'])
    return model, parts, tensor

  return make


@pytest.mark.parametrize('scale', [0.3, 0.0])
def test_equals_peft(case, moved, net, scale):
  """Output, gradients and merged weights, away from the start and at it."""
  torch = pytest.importorskip('torch')
  c = case('mlp')
  method = load(c, rank=3, strength=5.0, form='peft')
  model, parts, tensor = net(r=3, delora_lambda=5)
  theta = moved(method, c, scale)
  for name, leaves in parts.items():
    layer = model.base_model.model.get_submodule(name)
    np.testing.assert_allclose(
        theta['delora'][name]['w'], layer.delora_w_norm['default'], rtol=1e-6)
    assert leaves['strength'].item() == 5 and not leaves['b'].any()
    for leaf, parameter in leaves.items():
      with torch.no_grad():
        parameter.copy_(
            tensor(theta['delora'][name][leaf].T).reshape(parameter.shape))
  got, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  want = model(tensor(c.x))
  np.testing.assert_allclose(got, want.detach(), rtol=0, atol=1e-5)
  torch.sin(want).sum().backward()
  grads = gradients(c, method, theta)
  for name, leaves in parts.items():
    for leaf, parameter in leaves.items():
      g = parameter.grad.numpy().T.reshape(grads[name][leaf].shape)
      np.testing.assert_allclose(
          grads[name][leaf], g, rtol=0, atol=1e-4 * np.abs(g).max() + 1e-12,
          err_msg=f'{name}/{leaf}')
  folded = peftjax.fold(method, c.params, theta, c.sites)
  merged = model.merge_and_unload()
  for name in parts:
    np.testing.assert_allclose(
        folded[name]['kernel'], merged.get_submodule(name).weight.detach().T,
        rtol=0, atol=1e-5)
