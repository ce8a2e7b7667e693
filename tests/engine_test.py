"""The engine on a Linen model that nobody here wrote for it.

One small model with every kind of kernel, in four forms: plain, scanned,
rematerialised, both. The layer view, the fold of the whole tree and the fold
inside the layer must be one function, in values and in gradients.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax import trees
import pytest

FORMS = ('plain', 'scan', 'remat', 'scan+remat')
DEPTH, WIDTH = 2, 8


class Block(nn.Module):
  """Attention of Flax, a fused kernel, kernels of rank 3, a leaf of its own."""

  @nn.compact
  def __call__(self, x, _=None):
    gain = self.param('gain', nn.initializers.ones, (WIDTH,))
    h = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, name='attention')(h, h)
    q, k, v = jnp.split(nn.Dense(3 * WIDTH, name='qkv')(x), 3, -1)
    x = x + jnp.tanh(q * k + v) * gain
    h = nn.Einsum((2, WIDTH, 3), 'btd,kdh->bthk', name='spread')(x)
    h = nn.DenseGeneral(WIDTH, axis=(-2, -1), name='gather')(jnp.tanh(h))
    return x + nn.Dense(WIDTH, name='down')(nn.gelu(h)), None


class Foreign(nn.Module):
  form: str = 'plain'

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(11, WIDTH, name='table')(ids)
    x = nn.Conv(WIDTH, (3,), name='conv')(x)
    block = Block
    if 'remat' in self.form:
      block = nn.remat(block, prevent_cse='scan' not in self.form)
    if 'scan' in self.form:
      x, _ = nn.scan(block, variable_axes={'params': 0}, length=DEPTH,
                     split_rngs={'params': True})(name='blocks')(x, None)
    else:
      for i in range(DEPTH):
        x, _ = block(name=f'block_{i}')(x)
    return nn.Dense(5, name='out')(x.mean(1))


IDS = np.arange(10).reshape(2, 5) % 11


def filled(function, *args, scale=0.3):
  """What a function returns, in shape only, with random numbers in it."""
  rng = np.random.RandomState(0)
  return jax.tree.map(
      lambda v: jnp.asarray(rng.normal(0, scale, v.shape), v.dtype),
      jax.eval_shape(function, *args))


def random_theta(methods, sites, params):
  return filled(
      lambda p: peftjax.init(methods, jax.random.key(0), sites, p), params)


@pytest.fixture(scope='module')
def plain_params():
  return filled(Foreign().init, jax.random.key(0), IDS)['params']


def close(a, b):
  """Equal to 1e-5 of the largest number of each array."""
  jax.tree.map(lambda x, y: np.testing.assert_allclose(
      x, y, rtol=0, atol=1e-5 * max(1, np.abs(y).max())), a, b)


def stacked_theta(theta):
  """LoRA of unrolled blocks -> the same of scanned ones."""
  flat = trees.flatten(trees.stack(theta['lora']))
  out = {}
  for key, v in flat.items():
    path, _, leaf = key.rpartition('/')
    out.setdefault(path, {})[leaf] = v
  return {'lora': out}


KERNELS = peftjax.select(leaf='kernel')
LORA = peftjax.load('lowrank.lora', rank=2, alpha=2.0, sites=KERNELS)


# ------------------------------------------------------------ the four forms
@pytest.mark.parametrize('form', FORMS)
def test_describe_finds_every_site(form):
  sites = peftjax.describe(Foreign(form), IDS)
  block = 'blocks' if 'scan' in form else 'block_1'
  want = {
      'table': ('Embed', 'embed', dict(kernel=(11, 8))),
      'conv': ('Conv', '', dict(kernel=(24, 8), bias=(8,))),
      f'{block}/LayerNorm_0': (
          'LayerNorm', 'norm', dict(scale=(8,), bias=(8,))),
      **{f'{block}/attention/{n}': (
          'DenseGeneral', r, dict(kernel=(8, 8), bias=(8,)))
         for n, r in zip(('query', 'key', 'value', 'out'), 'qkvo')},
      **{f'{block}/qkv[{8 * i}:{8 * i + 8}]': (
          'Dense', r, dict(kernel=(8, 8), bias=(8,)))
         for i, r in enumerate('qkv')},
      f'{block}/spread': ('Einsum', '', dict(kernel=(8, 6), bias=(6,))),
      f'{block}/gather': ('DenseGeneral', '', dict(kernel=(6, 8), bias=(8,))),
      f'{block}/down': ('Dense', 'down', dict(kernel=(8, 8), bias=(8,))),
      'out': ('Dense', 'head', dict(kernel=(8, 5), bias=(5,)))}
  for path, (kind, role, shapes) in want.items():
    site = sites[path]
    assert (site.kind, site.role) == (kind, role), path
    assert {n: v.shape for n, v in site.params.items()} == shapes
    stacked = path.startswith('blocks')
    assert site.stack == ((DEPTH,) if stacked else ())
  assert sites[f'{block}/down'].x.shape == (2, 5, 8)
  assert sites[f'{block}/qkv[0:8]'].y.shape == (2, 5, 8)
  assert sites[block].params['gain'].shape == (8,)
  # Beside these, the root, and of every block itself and its attention.
  assert len(sites) == 1 + 3 + (1 if 'scan' in form else DEPTH) * (
      len(want) - 3 + 2)


@pytest.fixture(scope='module')
def reference(plain_params):
  """Theta; value and gradient by the fold of the unrolled tree; the fold."""
  model = Foreign()
  sites = peftjax.describe(model, IDS)
  theta = random_theta(LORA, sites, plain_params)

  @jax.jit
  def run(params, theta):
    def loss(theta):
      folded = peftjax.fold(LORA, params, theta, sites)
      y = model.apply({'params': folded}, IDS)
      return jnp.sin(y).sum(), (y, folded)
    (_, (y, folded)), grads = jax.value_and_grad(loss, has_aux=True)(theta)
    return y, grads, folded

  return theta, *run(plain_params, theta)


@pytest.mark.parametrize('form', FORMS)
def test_layer_fold_and_fold_in_the_layer_agree(form, plain_params, reference):
  theta, y, grads, folded = reference
  params = plain_params
  if 'scan' in form:
    params, folded = trees.stack(params), trees.stack(folded)
    theta, grads = stacked_theta(theta), stacked_theta(grads)
  model = Foreign(form)
  sites = peftjax.describe(model, IDS)

  @jax.jit
  def run(params, theta):
    def loss(theta, method):
      y, _ = peftjax.apply(model, method, params, theta, IDS)
      return jnp.sin(y).sum(), y
    grad = jax.value_and_grad(loss, has_aux=True)
    return (grad(theta, LORA), grad(theta, LORA._replace(layer=None)),
            model.apply({'params': params}, IDS),
            peftjax.fold(LORA, params, theta, sites))

  ((_, y1), g1), ((_, y2), g2), base, plain = run(params, theta)
  close((y1, g1), (y, grads))
  close((y2, g2), (y, grads))
  close(plain, folded)
  assert np.abs(y - base).max() > 0.1
  assert min(np.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-4


# -------------------------------------------------------------- fused kernels
def test_slices_of_a_fused_kernel_have_their_own_factors():
  class Net(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(3 * WIDTH, name='qkv')(x)

  x = np.random.RandomState(1).normal(size=(4, WIDTH)).astype(np.float32)
  params = filled(Net().init, jax.random.key(0), x)['params']
  sites = peftjax.describe(Net(), x)
  assert list(sites)[1:] == ['qkv[0:8]', 'qkv[8:16]', 'qkv[16:24]']
  method = peftjax.load(
      'lowrank.lora', rank=2, alpha=3, sites=peftjax.select(roles='qv'))
  theta = random_theta(method, sites, params)
  q, v = (theta['lora'][p] for p in ('qkv[0:8]', 'qkv[16:24]'))
  y = x @ params['qkv']['kernel'] + params['qkv']['bias']
  delta = np.concatenate(
      [1.5 * x @ q['a'] @ q['b'], np.zeros((4, 8)),
       1.5 * x @ v['a'] @ v['b']], -1)
  got, _ = peftjax.apply(Net(), method, params, theta, x)
  close(got, y + delta)
  np.testing.assert_array_equal(got[:, 8:16], y[:, 8:16])
  inside, _ = peftjax.apply(
      Net(), method._replace(layer=None), params, theta, x)
  close(inside, y + delta)
  folded = peftjax.fold(method, params, theta, sites)['qkv']
  close(x @ folded['kernel'] + folded['bias'], y + delta)
  np.testing.assert_array_equal(
      folded['kernel'][:, 8:16], params['qkv']['kernel'][:, 8:16])
  # An outer method on a slice sees what the inner one made of that slice.
  two = (method, peftjax.load('lowrank.lora', rank=1, sites=peftjax.select(
      path=r'\[16:24\]')))
  thetas = random_theta(two, sites, params)
  got, _ = peftjax.apply(Net(), two, params, thetas, x)
  folded = peftjax.fold(two, params, thetas, sites)['qkv']
  close(got, x @ folded['kernel'] + folded['bias'])


# --------------------------------------------------------------------- tuples
def shift(name='shift', **kwargs):
  """A method on outputs: y = f(x) + s, folded into the bias."""

  def init(key, site, p, stats):
    del key, stats
    return dict(s=jnp.zeros(p['bias'].shape))

  return peftjax.Method(
      name, peftjax.select(leaf='bias', kind=('Dense', 'DenseGeneral')), init,
      fold=lambda p, t: {**p, 'bias': p['bias'] + t['s']},
      layer=lambda f, x, t, ctx: f(x) + t['s'], **kwargs)


def gain():
  """A method with a fold only: the kernel's rows times 1 + s."""

  def init(key, site, p, stats):
    del key, site, stats
    return dict(s=jnp.zeros(p['kernel'].shape[:1]))

  return peftjax.Method(
      'gain', peftjax.select(leaf='kernel', exclude=['table']), init,
      fold=lambda p, t: {**p, 'kernel': p['kernel'] * (1 + t['s'][:, None])})


class Small(nn.Module):
  """Layers that tuples of methods meet in."""

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(11, WIDTH, name='table')(ids)
    x = nn.Conv(WIDTH, (3,), name='conv')(x)
    x = jnp.tanh(nn.Dense(3 * WIDTH, name='qkv')(x))
    x = nn.DenseGeneral((3, 4), name='general')(x)
    return nn.Einsum((3, 2, 4), 'bthd,hkd->btk', name='einsum')(x)


def small():
  model = Small()
  params = filled(model.init, jax.random.key(0), IDS)['params']
  return model, params, peftjax.describe(model, IDS)


@pytest.mark.parametrize('kinds', [
    'lora lora', 'lora shift', 'shift lora', 'lora gain', 'gain lora',
    'lora gain lora shift'])
def test_tuples_compose(kinds):
  model, params, sites = small()
  make = dict(lora=lambda: LORA, shift=shift, gain=gain)
  methods = tuple(make[k]() for k in kinds.split())
  theta = random_theta(methods, sites, params)
  assert len(theta) == len(methods)

  @jax.jit
  def run(params, theta):
    plain = peftjax.fold(methods, params, theta, sites)
    one = params
    for name, m in zip(theta_names(kinds), methods):
      one = peftjax.fold(m, one, {m.name: theta[name]}, sites)
    return (peftjax.apply(model, methods, params, theta, IDS)[0],
            model.apply({'params': plain}, IDS), plain, one)

  got, want, plain, one = run(params, theta)
  close(got, want)
  close(plain, one)  # the first is innermost: it is folded first


def theta_names(kinds):
  seen, out = {}, []
  for k in kinds.split():
    seen[k] = seen.get(k, 0) + 1
    out.append(k if seen[k] == 1 else f'{k}_{seen[k]}')
  return out


def test_order_of_a_tuple_matters_and_is_innermost_first():
  model, params, sites = small()
  double = gain()
  lora = LORA._replace(sites=double.sites)
  theta = random_theta((lora, double), sites, params)
  kernel = params['general']['kernel'].reshape(24, 12)
  ab = theta['lora']['general']['a'] @ theta['lora']['general']['b'] 
  s = 1 + theta['gain']['general']['s'][:, None]
  for methods, want in (((lora, double), (kernel + ab) * s),
                        ((double, lora), kernel * s + ab)):
    folded = peftjax.fold(methods, params, theta, sites)
    close(folded['general']['kernel'].reshape(24, 12), want)


# -------------------------------------------------------------------- compute
def test_no_gradient_has_the_shape_of_a_kernel():
  """Distinctive sizes: a dense dW would be the only [57, 43] in the program."""
  class Net(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(29)(jnp.tanh(nn.Dense(43, name='wide')(x)))

  x = np.ones((3, 57), np.float32)
  params = filled(Net().init, jax.random.key(0), x)['params']
  sites = peftjax.describe(Net(), x)
  lora = peftjax.load('lowrank.lora', rank=2)
  theta = random_theta(lora, sites, params)

  def results(method):
    step = jax.grad(lambda t, p: peftjax.apply(
        Net(), method, p, t, x)[0].sum())
    text = jax.jit(step).lower(theta, params).compile().as_text()
    made = re.findall(r'= f32\[(57,43|43,57)\]\S* (\w+)\(', text)
    return [op for _, op in made if op != 'parameter']

  assert not results(lora)
  # The same search does find it where it is made.
  assert results(lora._replace(layer=None))
