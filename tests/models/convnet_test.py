"""Convolutional networks: sites, hooks, forms, and methods on them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax import trees
from peftjax.models.convnet import ConvNeXt
from peftjax.models.convnet import ResNet
from peftjax.models.mobilenet import MobileNetV2

MODELS = dict(
    bottleneck=ResNet(classes=3, stem=8, widths=(8, 16), depths=(1, 1)),
    basic=ResNet(classes=3, stem=4, widths=(4, 6), depths=(1, 1),
                 bottleneck=False),
    convnext=ConvNeXt(classes=3, widths=(4, 8), depths=(1, 1), patch=2,
                      layer_scale=0.5),
    mobilenet=MobileNetV2(classes=3, stem=4, last=10,
                          stages=((1, 4, 1, 1), (2, 6, 2, 2))))
IMAGES = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
LABELS = jnp.array([0, 1, 2, 1])


def filled(model):
  """Params away from zero and one: a wrong path must change the output."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)['params']
  return trees.unflatten({
      n: jnp.asarray(rng.normal(
          1. if n.endswith('scale') else 0.,
          0.3 if len(s.shape) < 2 else np.prod(s.shape[:-1]) ** -0.5,
          s.shape), jnp.float32) for n, s in trees.flatten(shapes).items()})


@pytest.fixture(scope='module')
def params():
  return {name: filled(model) for name, model in MODELS.items()}


def test_leaves_of_a_residual_block(params):
  got = {n: v.shape for n, v in trees.flatten(params['bottleneck']).items()
         if n.startswith('stage_1_layer_0/')}
  want = {'down/kernel': (1, 1, 8, 4), 'conv/kernel': (3, 3, 4, 4),
          'up/kernel': (1, 1, 4, 16), 'shortcut/kernel': (1, 1, 8, 16)}
  for name in list(want):
    for leaf in ('scale', 'bias'):
      want[name.replace('/kernel', f'_norm/{leaf}')] = want[name][-1:]
  assert got == {f'stage_1_layer_0/{n}': s for n, s in want.items()}
  # The first block changes nothing about the shape.
  assert not any('stage_0_layer_0/shortcut' in n
                 for n in trees.flatten(params['bottleneck']))


@pytest.mark.parametrize('name, ups', [
    ('bottleneck', ['stage_0_layer_0', 'stage_1_layer_0']),
    ('basic', []), ('convnext', ['stage_0_layer_0', 'stage_1_layer_0']),
    ('mobilenet', ['layer_1', 'layer_2'])])
def test_roles(name, ups):
  sites = pj.describe(MODELS[name], IMAGES)
  by_role = {}
  for path, site in sites.items():
    by_role.setdefault(site.role, []).append(path)
  assert by_role['head'] == ['head']
  assert by_role.get('up', []) == [f'{p}/up' for p in ups]
  downs = ['layer_0/down'] if name == 'mobilenet' else []
  assert by_role.get('down', []) == downs + [f'{p}/down' for p in ups]
  norms = [p for p, s in sites.items() if 'Norm' in s.kind]
  assert by_role.get('norm', []) == norms
  assert bool(norms) == (name != 'mobilenet')
  if name == 'convnext':
    assert norms == ['patch_norm', 'stage_0_layer_0/norm', 'reduce_1/norm',
                     'stage_1_layer_0/norm', 'norm']


@pytest.mark.parametrize('name, shape', [
    ('bottleneck', (4, 2, 2, 16)), ('basic', (4, 2, 2, 6)),
    ('convnext', (4, 4, 4, 8)), ('mobilenet', (4, 4, 4, 10))])
def test_heads_and_hooks(params, name, shape):
  model, seen = MODELS[name], []

  def watch(f, args, kwargs, context):
    y = f(*args, **kwargs)
    if context.method_name in ('embed', 'join', 'readout'):
      seen.append((context.method_name, y.shape))
    return y

  with nn.intercept_methods(watch):
    logits = jax.eval_shape(model.apply, {'params': params[name]}, IMAGES)
  assert logits.shape == (4, 3) and logits.dtype == jnp.float32
  assert seen[0][0] == 'embed' and seen[-1] == ('readout', (4, shape[-1]))
  # Of MobileNet's three blocks the second changes the shape.
  assert [n for n, _ in seen[1:-1]] == ['join', 'join']
  for head, want in ((None, shape), ('pool', (4, shape[-1]))):
    one = model.clone(head=head)
    own = jax.eval_shape(one.init, jax.random.key(0), IMAGES)['params']
    assert 'head' not in own
    assert jax.eval_shape(one.apply, {'params': own}, IMAGES).shape == want


def test_readout_with_a_mask(params):
  model = MODELS['basic']
  h = jnp.arange(2 * 2 * 2 * 6.).reshape(2, 2, 2, 6)
  mask = jnp.array([[[1, 0], [0, 1]], [[0, 0], [0, 0]]], bool)
  got = model.apply({'params': params['basic']}, h, mask, method='readout')
  np.testing.assert_allclose(got, [(h[0, 0, 0] + h[0, 1, 1]) / 2, [0] * 6])


def test_bad_input(params):
  model, p = MODELS['basic'], params['basic']
  with pytest.raises(ValueError, match=r'\(4, 16, 16, 1\): expected \[B, H'):
    model.apply({'params': p}, IMAGES[..., :1])
  with pytest.raises(ValueError, match="unknown head 'lm'; .*'classify'"):
    model.clone(head='lm').apply({'params': p}, IMAGES)
  with pytest.raises(ValueError, match=r'depths \(1,\): expected as many'):
    model.clone(depths=(1,)).apply({'params': p}, IMAGES)


# ---------------------------------------------------------------- methods


METHODS = dict(
    lora=('lowrank.lora', dict(rank=2, sites=pj.select(
        path='stage_', leaf='kernel'))),
    ssf=('scaling.ssf', dict(sites=pj.select(roles=('norm',)))),
    bitfit=('selective.bitfit', {}),
    full=('selective.full', dict(sites=pj.select(leaf=('kernel', 'scale')))))


@pytest.mark.parametrize('name', METHODS)
def test_methods_take_a_step_on_a_resnet(params, name):
  model, p = MODELS['bottleneck'], params['bottleneck']
  path, options = METHODS[name]
  method = pj.load(path, **options)
  sites = pj.describe(model, IMAGES)
  theta = pj.init(method, jax.random.key(3), sites, p)
  where = set(theta[name])
  if name == 'lora':
    assert where == {s for s in sites if s.startswith('stage_')
                     and sites[s].kind == 'Conv'} and len(where) == 7
    # At b = 0 nothing reaches a.
    theta[name] = {s: dict(t, b=t['b'] + 0.1) for s, t in theta[name].items()}
  elif name in ('ssf', 'bitfit'):
    assert where == {s for s in sites if sites[s].role == 'norm'}
  trained, frozen = pj.partition(method, theta)

  @jax.jit
  @jax.value_and_grad
  def loss(trained):
    theta = pj.combine(trained, frozen)
    y, _ = pj.apply(model, method, p, theta, IMAGES)
    return optax.softmax_cross_entropy_with_integer_labels(y, LABELS).mean()

  before, g = loss(trained)
  for leaf, v in trees.flatten(g).items():
    assert np.isfinite(v).all() and np.any(v), leaf
  after, _ = loss(jax.tree.map(
      lambda t, g: np.asarray(t) - 0.02 * np.asarray(g), trained, g))
  assert after < before


@pytest.mark.parametrize('name, path, where', [
    ('bottleneck', 'lowrank.lora', dict(path='stage_', leaf='kernel')),
    ('bottleneck', 'scaling.ssf', dict(roles=('norm',))),
    # A depthwise convolution is not a product with its two-dimensional view.
    ('convnext', 'lowrank.lora', dict(
        path='stage_|reduce_', leaf='kernel', exclude='depthwise'))])
def test_fold_equals_layer(params, name, path, where):
  model, p = MODELS[name], params[name]
  sites = pj.describe(model, IMAGES)
  method = pj.load(path, sites=pj.select(**where), **(
      dict(rank=2) if path == 'lowrank.lora' else {}))
  theta = pj.init(method, jax.random.key(3), sites, p)
  rng = np.random.default_rng(0)
  theta = jax.tree.map(lambda v: np.asarray(v) + rng.normal(
      0, 0.2, v.shape).astype(np.float32), theta)
  run = jax.jit(lambda p: model.apply({'params': p}, IMAGES))
  want = run(jax.jit(lambda t: pj.fold(method, p, t, sites))(theta))
  assert np.abs(want - run(p)).max() > 0.05
  # Without the other view there is nothing else to fall back on.
  alone = method._replace(fold=None)
  got = jax.jit(lambda t: pj.apply(model, alone, p, t, IMAGES)[0])(theta)
  np.testing.assert_allclose(got, want, atol=3e-5, rtol=1e-5)


def test_remat_and_bfloat16(params):
  model, p = MODELS['basic'], params['basic']

  def run(model):
    def loss(p):
      y = model.apply({'params': p}, IMAGES)
      return (y ** 2).sum(), y
    (_, y), g = jax.jit(jax.value_and_grad(loss, has_aux=True))(p)
    return y, g

  y, g = run(model)
  y2, g2 = run(model.clone(remat=True))
  np.testing.assert_allclose(y2, y, atol=1e-5, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(g2), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
  half = jax.jit(model.clone(dtype=jnp.bfloat16).apply)({'params': p}, IMAGES)
  assert half.dtype == jnp.float32
  assert 0 < np.abs(half - y).max() / np.abs(y).max() < 0.05
