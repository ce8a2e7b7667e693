"""Methods on hooks and whole modules; what they report, and what they draw."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax import trees
from peftjax.models import vit
import pytest

ARGS = dict(classes=3, width=8, depth=2, heads=2, mlp_dim=8, patch=4)
X = np.random.RandomState(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def filled(function, *args):
  """What a function returns, in shape only, with random numbers in it."""
  rng = np.random.RandomState(0)
  return jax.tree.map(
      lambda v: jnp.asarray(rng.normal(0, 0.3, v.shape), v.dtype),
      jax.eval_shape(function, *args))


def random_theta(methods, sites, params):
  return filled(
      lambda p: peftjax.init(methods, jax.random.key(0), sites, p), params)


def hook(name, on, layer, shape, path, **kwargs):
  """A method with one array `s` on a hook."""
  return peftjax.Method(
      name, peftjax.select(path=path),
      lambda key, site, p, stats: dict(s=jnp.zeros(shape)), layer=layer, on=on,
      **kwargs)


def tokens(f, images, t, ctx):
  """Prompts: learned tokens after the image's."""
  u = f(images)
  new = jnp.broadcast_to(t['s'], (u.shape[0], *t['s'].shape))
  return jnp.concatenate([u, new], 1)


def prefix(f, q, t, ctx):
  """Prefixes: one learned key and value of every head before the tokens'."""
  k, v, mask = ctx.rest
  new = jnp.broadcast_to(t['s'], (k.shape[0], 1, *k.shape[2:]))
  return f(q, *(jnp.concatenate([new, a], 1) for a in (k, v)), mask)


def parallel(f, u, t, ctx):
  """An adapter beside the perceptron, which reads its input."""
  x, _, which = ctx.rest
  return f(u) + (x @ t['s'] if which == 'mlp' else 0)


def scaled(f, h, t, ctx):
  return f(h) * (1 + t['s'])


HOOKS = (hook('prompt', 'embed', tokens, (3, 8), '^$'),
         hook('prefix', 'attend', prefix, (2, 4), 'attn$'),
         hook('parallel', 'join', parallel, (8, 8), r'block[^/]*$'),
         hook('scaled', 'readout', scaled, (8,), '^$'))


def attend(p, x, new):
  """Two heads of four, with one key and value more."""
  q, k, v = (
      (x @ p[n]['kernel'] + p[n]['bias']).reshape(*x.shape[:2], 2, 4)
      for n in ('query', 'key', 'value'))
  more = jnp.broadcast_to(new, (x.shape[0], 1, 2, 4))
  k, v = (jnp.concatenate([more, a], 1) for a in (k, v))
  w = jax.nn.softmax(jnp.einsum('bthd,bshd->bhts', q / 2, k))
  y = jnp.einsum('bhts,bshd->bthd', w, v).reshape(x.shape)
  return y @ p['out']['kernel'] + p['out']['bias']


def by_hand(params, theta):
  """The transformer with the four edits written out."""
  def norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(
        x.var(-1, keepdims=True) + 1e-6)
    return x * p['scale'] + p['bias']
  theta = {n: {k: v['s'] for k, v in t.items()} for n, t in theta.items()}
  patches = X.reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5)
  u = patches.reshape(2, 4, 48) @ params['patch']['kernel'].reshape(48, 8)
  u = u + params['patch']['bias'] + params['pos']
  u = jnp.concatenate(
      [u, jnp.broadcast_to(theta['prompt'][''], (2, 3, 8))], 1)
  for i in range(2):
    p, name = params[f'block_{i}'], f'block_{i}'
    u = u + attend(p['attn'], norm(p['norm1'], u),
                   theta['prefix'][f'{name}/attn'])
    x = norm(p['norm2'], u)
    h = nn.gelu(x @ p['mlp']['up']['kernel'] + p['mlp']['up']['bias'])
    u = u + h @ p['mlp']['down']['kernel'] + p['mlp']['down']['bias']
    u = u + x @ theta['parallel'][name]
  h = norm(params['norm'], u).mean(1) * (1 + theta['scaled'][''])
  return h @ params['head']['kernel'] + params['head']['bias']


@pytest.mark.parametrize('form', [{}, dict(scan=True, remat=True)])
def test_methods_on_hooks_equal_the_edits_written_out(form):
  model = vit.ViT(**ARGS)
  params = filled(model.init, jax.random.key(0), X)['params']
  theta = random_theta(HOOKS, peftjax.describe(model, X), params)
  want = by_hand(params, theta)
  if form:
    model, params = vit.ViT(**ARGS, **form), trees.stack(params)
    theta = {n: {(k.replace('block_0', 'blocks')): (
        dict(s=jnp.stack([t[k.replace('_0', f'_{i}')]['s'] for i in range(2)]))
        if 'block' in k else v) for k, v in t.items() if 'block_1' not in k}
             for n, t in theta.items()}
  got, _ = jax.jit(lambda p, t: peftjax.apply(model, HOOKS, p, t, X))(
      params, theta)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  assert np.abs(got).max() > 0.1
  base = jax.jit(model.apply)({'params': params}, X)
  assert np.abs(got - base).max() > 0.1


def test_one_method_on_two_hooks_equals_two_methods():
  """A site that comes along, a leaf that init reads, shapes of the calls."""
  def added(f, u, t, ctx):
    return f(u) + t['s']

  def both(f, x, t, ctx):
    return (added if ctx.hook == 'join' else scaled)(f, x, t, ctx)

  model = vit.ViT(**ARGS)
  params = filled(model.init, jax.random.key(0), X)['params']
  sites = peftjax.describe(model, X)
  assert sites['block_0'].hooks['join'].inputs[0].shape == (2, 4, 8)
  assert sites[''].hooks['readout'].output.shape == (2, 8)
  assert sites[''].attributes['width'] == 8
  method = peftjax.Method(
      'both', peftjax.select(path=r'block[^/]*$'),
      lambda key, site, p, stats: dict(s=p['other']), layer=both,
      on=('join', 'readout'), along=lambda site: 'readout' in site.hooks,
      reads=lambda sites: dict(other='patch/bias'))
  theta = peftjax.init(method, jax.random.key(0), sites, params)
  assert set(theta['both']) == {'', 'block_0', 'block_1'}
  t = dict(s=params['patch']['bias'])
  jax.tree.map(np.testing.assert_array_equal, theta, {
      'both': dict.fromkeys(theta['both'], t)})
  two = (hook('a', 'join', added, (8,), r'block[^/]*$'), HOOKS[3])
  got, _ = peftjax.apply(model, method, params, theta, X)
  want, _ = peftjax.apply(model, two, params, {
      'a': dict(block_0=t, block_1=t), 'scaled': {'': t}}, X)
  np.testing.assert_array_equal(got, want)
  wrong = method._replace(on=('join', 'read_out'))
  with pytest.raises(ValueError, match="'' was .* call join or read_out"):
    peftjax.apply(model, wrong, params, theta, X)


# ------------------------------------------------------- reports, randomness
def report(f, x, t, ctx):
  y = f(x)
  ctx.sow('mean', y.mean())
  return y + t['s']


def test_reports_of_layers_reach_the_caller():
  class Net(nn.Module):
    axes: tuple = ('params', 'aux')

    @nn.compact
    def __call__(self, x):
      layer = nn.scan(Layer, variable_axes={a: 0 for a in self.axes},
                      split_rngs={'params': True}, length=3)
      x, _ = layer(name='blocks')(x, None)
      return nn.Dense(2, name='out')(x)

  class Layer(nn.Module):

    @nn.compact
    def __call__(self, x, _):
      return nn.Dense(8, name='down')(x), None

  x = np.ones((1, 8), np.float32)
  params = filled(Net().init, jax.random.key(0), x)['params']
  method = hook('watch', '__call__', report, (), 'down|out')
  sites = peftjax.describe(Net(), x)
  theta = jax.tree.map(
      jnp.zeros_like, random_theta(method, sites, params))
  y, aux = peftjax.apply(Net(), method, params, theta, x)
  down = params['blocks']['down']
  h, means = x, []
  for i in range(3):
    h = h @ down['kernel'][i] + down['bias'][i]
    means.append(h.mean())
  np.testing.assert_allclose(aux['blocks']['down']['mean'][0], jnp.stack(means),
                             rtol=0, atol=1e-5)
  np.testing.assert_allclose(aux['out']['mean'][0], y.mean(), rtol=0,
                             atol=1e-5)
  blind = Net(axes=('params',))
  with pytest.raises(ValueError, match=(
      r"watch at 'blocks/down' reports 'mean'.*variable_axes=")):
    peftjax.apply(blind, method, params, theta, x)


def test_random_parts_differ_by_site_layer_and_step():
  class Net(nn.Module):

    @nn.compact
    def __call__(self, x):
      layer = nn.scan(Layer, variable_axes={'params': 0, 'aux': 0}, length=2,
                      split_rngs={'params': True})
      x, _ = layer(name='blocks')(x, None)
      return nn.Dense(8, name='out')(x)

  class Layer(nn.Module):

    @nn.compact
    def __call__(self, x, _):
      return nn.Dense(8, name='down')(x), None

  def layer(f, x, t, ctx):
    ctx.sow('draw', jax.random.uniform(ctx.rng) if ctx.train else -1.0)
    return f(x)

  method = hook('draw', '__call__', layer, (), 'down|out')
  x = np.ones((1, 8), np.float32)
  params = filled(Net().init, jax.random.key(0), x)['params']
  theta = random_theta(method, peftjax.describe(Net(), x), params)

  def draws(seed, train=True):
    _, aux = peftjax.apply(Net(), method, params, theta, x, train=train,
                           rng=jax.random.key(seed))
    return np.concatenate([np.ravel(v) for v in jax.tree.leaves(aux)])

  one, again, other = draws(0), draws(0), draws(1)
  assert len(set(one) | set(other)) == 6
  np.testing.assert_array_equal(one, again)
  np.testing.assert_array_equal(draws(0, train=False), -1)


def own(name, leaf, path, **kwargs):
  """Adds s to one of a module's own leaves; folds only."""
  return peftjax.Method(
      name, peftjax.select(path=path),
      lambda key, site, p, stats: dict(s=jnp.zeros(p[leaf].shape)),
      fold=lambda p, t: {**p, leaf: p[leaf] + t['s']}, **kwargs)


def test_folding_a_module_keeps_the_hooks_and_reports_below_it():
  """The root's positions are folded around everything else that is adapted."""
  model = vit.ViT(**ARGS, scan=True)
  params = filled(model.init, jax.random.key(0), X)['params']
  sites = peftjax.describe(model, X)
  inner = (hook('prompt', 'embed', tokens, (3, 8), '^$'),
           hook('report', '__call__', report, (8,), 'up$'),
           peftjax.load('lowrank.lora', rank=1))
  methods = (own('moved', 'pos', '^$'), *inner)
  theta = random_theta(methods, sites, params)
  moved = {**params, 'pos': params['pos'] + theta['moved']['']['s']}
  rest = {n: t for n, t in theta.items() if n != 'moved'}

  @jax.jit
  def run(params, moved, theta, rest):
    return (peftjax.apply(model, methods, params, theta, X),
            peftjax.apply(model, inner, moved, rest, X))

  (y, aux), (y2, aux2) = run(params, moved, theta, rest)
  np.testing.assert_allclose(y, y2, rtol=0, atol=1e-5)
  assert aux['blocks']['mlp']['up']['mean'][0].shape == (2,)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5), aux, aux2)


class Switch(nn.Module):
  """A leaf of its own, and inputs that are no arrays."""

  @nn.compact
  def __call__(self, x, double=False, *, shift=0.0):
    scale = self.param('scale', nn.initializers.ones, (8,))
    return x * scale * (2 if double else 1) + shift


class Caller(nn.Module):
  """Calls layers in the ways that foreign code does."""

  @nn.compact
  def __call__(self, x, train=False):
    x = Switch(name='switch')(x, True, shift=1.0)
    x = nn.Dense(8, name='named')(inputs=x)
    shared = nn.Dense(8, name='shared')
    x = shared(jnp.tanh(shared(x)))
    return nn.Dropout(0.5)(x, deterministic=not train)


def test_calls_with_flags_names_and_shared_layers():
  x = X.reshape(-1, 8)[:4]
  model = Caller()
  params = filled(model.init, jax.random.key(0), x)['params']
  sites = peftjax.describe(model, x)
  assert sites['named'].x.shape == (4, 8)
  lora = peftjax.load(
      'lowrank.lora', rank=2, sites=peftjax.select(kind='Dense'))
  methods = (own('moved', 'scale', 'switch'), lora)
  theta = random_theta(methods, sites, params)

  @jax.jit
  def run(params, theta):
    grad = lambda f: jax.value_and_grad(lambda t: f(t).sum())(theta)
    return (
        grad(lambda t: peftjax.apply(model, methods, params, t, x)[0]),
        grad(lambda t: model.apply(
            {'params': peftjax.fold(methods, params, t, sites)}, x)))

  got, want = run(params, theta)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-5), got, want)


def test_the_mode_reaches_the_model_by_name_or_position():
  x = np.ones((4, 8), np.float32)
  model = Caller()
  params = filled(model.init, jax.random.key(0), x)['params']
  method = peftjax.load('lowrank.lora', rank=1, sites=dict(kind='Dense'))
  theta = random_theta(method, peftjax.describe(model, x), params)
  run = lambda *args, **kwargs: np.asarray(peftjax.apply(
      model, method, params, theta, x, *args, rng=jax.random.key(0),
      **kwargs)[0])
  assert (run(train=True) == 0).any()
  assert (run() != 0).all()
  np.testing.assert_array_equal(run(True, train=True), run(train=True))
  np.testing.assert_array_equal(run(False, train=True), run())
