"""Encoders: shapes, positions, masks, hooks, stacking, roles, training."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax
from peftjax import trees
from peftjax.models import layers
from peftjax.models.encoder import Encoder
import pytest

SMALL = dict(vocab=23, width=8, depth=2, heads=2, mlp_dim=12, positions=9)
IDS = np.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, 1, 1, 1]], np.int32)
MASK = IDS != 1
TYPES = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]], np.int32)


def filled(model, *args):
  """Parameters with nothing at zero or one."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda s: jnp.asarray(rng.normal(0.2, 1., s.shape), s.dtype),
      jax.eval_shape(model.init, jax.random.key(0), *args)['params'])


@pytest.fixture(scope='module')
def params():
  return filled(Encoder(**SMALL, head='classify', classes=3), IDS)


def run(model, params, *args):
  return jax.jit(model.apply)({'params': params}, *args)


def body(params):
  return {n: v for n, v in params.items() if n != 'head'}


def test_parameters_of_minilm():
  model = Encoder(head='mlm')
  shapes = jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']
  d, m, v = 384, 1536, 30522
  block = 4 * (d * d + d) + 2 * 2 * d + (d * m + m) + (m * d + d)
  head = d * d + d + 2 * d + v  # the decoder is the word table
  assert trees.count(shapes) == (v + 512 + 2) * d + 2 * d + 6 * block + head


@pytest.mark.parametrize('head, options, shape', [
    (None, {}, (2, 6, 8)), ('pool', {}, (2, 8)), ('classify', {}, (2, 3)),
    ('tag', {}, (2, 6, 3)), ('mlm', {}, (2, 6, 23)),
    ('mlm', dict(embed_dim=4, types=0), (2, 6, 23)),
    ('classify', dict(embed_dim=4, padding=1), (2, 3))])
def test_heads_and_roles(head, options, shape):
  model = Encoder(**SMALL, head=head, classes=3, **options)
  sites = peftjax.describe(model, IDS, MASK)
  out = jax.eval_shape(
      lambda: model.init_with_output(jax.random.key(0), IDS, MASK))[0]
  assert out.shape == shape and out.dtype == jnp.float32
  want = {'q', 'k', 'v', 'o', 'up', 'down', 'norm', 'embed', ''}
  assert {s.role for s in sites.values()} == want | (
      {'head'} if head not in (None, 'pool') else set())
  assert ('embed_project' in sites) == ('embed_dim' in options)
  assert ('type_embed' in sites) == (options.get('types') != 0)


@pytest.mark.parametrize('scan, remat',
                         [(True, False), (False, True), (True, True)])
def test_scan_and_remat_equal_plain(params, scan, remat):
  def both(scan, remat):
    model = Encoder(**SMALL, head='classify', classes=3, scan=scan, remat=remat)
    def loss(p):
      y = model.apply({'params': p}, IDS, MASK, TYPES)
      return (y ** 2).sum(), y
    tree = trees.stack(params) if scan else params
    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(tree)
    return y, trees.flatten(trees.unstack(grads))
  y, grads = both(False, False)
  y2, grads2 = both(scan, remat)
  assert np.abs(y).max() > 0.1 and set(grads) == set(grads2)
  np.testing.assert_allclose(y2, y, atol=1e-5, rtol=1e-5)
  for name, g in grads.items():
    np.testing.assert_allclose(grads2[name], g, atol=1e-4, rtol=1e-4,
                               err_msg=name)


def test_padding_is_not_seen(params):
  model = Encoder(**SMALL)
  ids = np.where(MASK, IDS, 17)
  a, b = (run(model, body(params), x, MASK, TYPES) for x in (IDS, ids))
  np.testing.assert_allclose(a[MASK], b[MASK], atol=1e-6)
  c = run(model, body(params), ids, None, TYPES)
  assert np.abs(a - c)[MASK].max() > 1e-2
  d = run(model, body(params), IDS, MASK)  # no types: zeros
  assert np.abs(a - d)[MASK].max() > 1e-2
  # A text alone, not padded, is what it is in the batch.
  e = run(model, body(params), IDS[1:, :3], None, TYPES[1:, :3])
  np.testing.assert_allclose(e[0], a[1, :3], atol=1e-5)
  pooled = run(Encoder(**SMALL, head='pool'), body(params), IDS, MASK, TYPES)
  np.testing.assert_allclose(pooled[1], a[1, :3].mean(0), atol=1e-5)
  np.testing.assert_allclose(pooled[0], a[0].mean(0), atol=1e-5)


def test_positions_are_counted_from_padding(params):
  """RoBERTa's: padding in front moves nothing."""
  model = Encoder(**SMALL, padding=1)
  right = np.array([[5, 6, 7, 1, 1]], np.int32)
  left = np.array([[1, 1, 5, 6, 7]], np.int32)
  p = body(params)
  a, b = (run(model, p, x, x != 1) for x in (right, left))
  np.testing.assert_allclose(a[0, :3], b[0, 2:], atol=1e-5)
  # The first token is at row padding + 1 of the table, pads at row padding.
  seen = []
  def watch(f, args, kwargs, context):
    if (context.module.name, context.method_name) == (
        'position_embed', '__call__'):
      seen.append(np.asarray(args[0]))
    return f(*args, **kwargs)
  with nn.intercept_methods(watch):
    model.apply({'params': p}, left)
  np.testing.assert_array_equal(seen, [[[1, 1, 2, 3, 4]]])


@pytest.mark.parametrize('scan', [False, True])
def test_hooks_and_tokens_in_front(params, scan):
  """Two tokens that `embed` puts in front are seen, and read by 'classify'."""
  model = Encoder(**SMALL, head='classify', classes=3, scan=scan)
  tree = trees.stack(params) if scan else params
  seen = set()
  def prompt(f, args, kwargs, context):
    y = f(*args, **kwargs)
    if context.method_name in ('embed', 'attend', 'join', 'readout'):
      seen.add((context.method_name, *(a for a in args if isinstance(a, str)),
                args[0].shape))
    if context.method_name == 'embed':
      return jnp.concatenate([jnp.ones_like(y[:, :2]), y], 1)
    return y
  plain = run(model, tree, IDS, MASK)
  with nn.intercept_methods(prompt):
    longer = model.apply({'params': tree}, IDS, MASK)
  assert longer.shape == plain.shape and np.abs(longer - plain).max() > 1e-2
  assert seen == {
      ('embed', (2, 6)), ('attend', (2, 8, 2, 4)), ('join', 'attn', (2, 8, 8)),
      ('join', 'mlp', (2, 8, 8)), ('readout', (2, 8, 8))}


def test_bfloat16_is_close(params):
  args = params, IDS, MASK, TYPES
  y = run(Encoder(**SMALL, head='classify', classes=3), *args)
  half = run(Encoder(**SMALL, head='classify', classes=3,
                     dtype=jnp.bfloat16), *args)
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, y, atol=0.1 * np.abs(y).max())


@pytest.mark.parametrize('scan', [False, True])
def test_lora_and_a_full_head_train(scan):
  model = Encoder(**SMALL, head='classify', classes=3, scan=scan)
  methods = (peftjax.load('lowrank.lora', rank=2, sites=dict(roles='qv')),
             peftjax.load('selective.full', sites=dict(roles='head')))
  params = model.init(jax.random.key(0), IDS)['params']
  sites = peftjax.describe(model, IDS, MASK)
  theta = peftjax.init(methods, jax.random.key(1), sites, params)
  labels = jnp.array([2, 0])
  tx = optax.adam(3e-2)
  def loss(theta):
    y, _ = peftjax.apply(model, methods, params, theta, IDS, MASK)
    return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()
  @jax.jit
  def step(theta, state):
    value, grads = jax.value_and_grad(loss)(theta)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(theta, updates), state, value
  start, state, values = theta, tx.init(theta), []
  for _ in range(20):
    theta, state, value = step(theta, state)
    values.append(float(value))
  assert values[0] == pytest.approx(np.log(3), abs=1e-5)  # the head is zero
  assert values[-1] < 0.2
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), theta, start)
  moved = trees.flatten(moved['lora'])
  assert len(moved) == (4 if scan else 8) and min(moved.values()) > 1e-3


@pytest.mark.parametrize('changes, args, match', [
    (dict(heads=3), (IDS,), 'width 8 .* 3 heads.*1, 2, 4, 8'),
    (dict(head='means'), (IDS,), "unknown head 'means'.*pool"),
    (dict(act='gelu_'), (IDS,), "unknown activation 'gelu_'.*gelu"),
    (dict(types=0), (IDS, MASK, TYPES), 'types given.*none'),
    (dict(positions=5), (IDS,), '6 tokens: expected at most 5'),
    (dict(padding=1, positions=7), (IDS,), '6 tokens: expected at most 5'),
    ({}, (IDS[0],), r'ids of shape \(6,\): expected \[B, T\]'),
    ({}, (IDS, MASK[:, :4]), r'mask of shape \(2, 4\): expected \(2, 6\)'),
    ({}, (IDS, MASK, TYPES[:1]), r'types of shape \(1, 6\)'),
])
def test_bad_input(changes, args, match):
  model = Encoder(**{**SMALL, **changes})
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(model.init, jax.random.key(0), *args)


def test_mean_head_is_a_layer_on_what_pool_gives():
  args = dict(vocab=20, width=8, depth=1, heads=2, mlp_dim=12, positions=9)
  ids = np.arange(10).reshape(2, 5)
  mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
  model = Encoder(**args, head='mean', classes=3)
  params = model.init(jax.random.key(0), ids)['params']
  rng = np.random.default_rng(0)
  params['head']['out'] = dict(kernel=rng.normal(size=(8, 3)),
                               bias=rng.normal(size=3))
  body = {k: v for k, v in params.items() if k != 'head'}
  pooled = Encoder(**args, head='pool').apply({'params': body}, ids, mask)
  want = pooled @ params['head']['out']['kernel'] + params['head']['out']['bias']
  found = model.apply({'params': params}, ids, mask)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_gelu_and_its_slope_are_those_of_float64():
  x = np.linspace(-8, 8, 1601, dtype=np.float32)
  y, dy = jax.vmap(jax.value_and_grad(layers.gelu))(x)
  share = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
  slope = share + x * np.exp(-0.5 * x.astype(float)**2) / math.sqrt(2 * math.pi)
  np.testing.assert_allclose(y, x * share, rtol=0, atol=1e-6)
  np.testing.assert_allclose(dy, slope, rtol=0, atol=1e-6)
