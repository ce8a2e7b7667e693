"""Encoder-decoders: forms, masks, hooks, adapters and generation."""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax import trees
from peftjax.models import layers
from peftjax.models.encdec import EncDec
import pytest

SMALL = dict(vocab=30, width=8, depth=2, heads=2, head_dim=4, mlp_dim=12,
             act='gelu_new', gated=True, tied=False, buckets=8, furthest=12)
MODEL = EncDec(**SMALL)
RNG = np.random.RandomState(0)
IDS = RNG.randint(2, 30, (3, 7))
MASK = np.arange(7) < np.array([[7], [4], [6]])
TARGETS = RNG.randint(2, 30, (3, 5))


def filled(function, *args):
  """What a function returns, in shape only, with random numbers in it."""
  rng = np.random.RandomState(1)
  return jax.tree.map(
      lambda v: jnp.asarray(rng.normal(0, 0.3, v.shape), v.dtype),
      jax.eval_shape(function, *args))


@pytest.fixture(scope='module')
def params():
  return filled(MODEL.init, jax.random.key(0), IDS, TARGETS)['params']


def outputs(model, params):
  """Logits and the gradient of their squares."""
  def loss(p):
    y = model.apply({'params': p}, IDS, TARGETS, MASK)
    return (y ** 2).sum(), y
  (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return y, trees.flatten(grads)


def test_scan_and_remat_equal_the_plain_model(params):
  y, grads = outputs(MODEL, params)
  again, stacked = outputs(MODEL.clone(scan=True, remat=True),
                           trees.stack(params))
  np.testing.assert_allclose(again, y, rtol=0, atol=1e-5)
  assert all(np.abs(g).max() > 1e-4 for g in grads.values())
  stacked = trees.flatten(trees.unstack(trees.unflatten(stacked)))
  assert set(stacked) == set(grads)
  for path, g in grads.items():
    np.testing.assert_allclose(stacked[path], g, rtol=1e-4, atol=1e-4)


def test_every_role_is_there():
  roles = lambda model: {
      s.role for s in peftjax.describe(model, IDS, TARGETS).values()} - {''}
  assert roles(MODEL) == {
      'q', 'k', 'v', 'o', 'up', 'gate', 'down', 'norm', 'embed', 'head'}
  plain = MODEL.clone(gated=False, act='relu', tied=True)
  assert roles(plain) == {'q', 'k', 'v', 'o', 'up', 'down', 'norm', 'embed'}
  sites = peftjax.describe(MODEL, IDS, TARGETS)
  assert {p for p, s in sites.items() if s.role == 'v'} == {
      f'{stack}/block_{i}/{layer}/value' for i in range(2)
      for stack, layer in (('encoder', 'attn'), ('decoder', 'attn'),
                           ('decoder', 'cross_attn'))}


def test_bfloat16_gives_float32_logits():
  model = MODEL.clone(dtype=jnp.bfloat16)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IDS, TARGETS)
  assert {v.dtype for v in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
  for m in (model, model.clone(tied=True), model.clone(head=None)):
    y = jax.eval_shape(m.apply, shapes, IDS, TARGETS)
    assert y.dtype == jnp.float32
  encoded = jax.eval_shape(
      lambda p: model.apply(p, IDS, method='encode'), shapes)
  assert encoded.dtype == jnp.bfloat16


def test_masks_hide_padding_and_targets_see_no_future(params):
  run = jax.jit(lambda ids, targets: MODEL.apply(
      {'params': params}, ids, targets, MASK))
  y = run(IDS, TARGETS)
  np.testing.assert_array_equal(run(np.where(MASK, IDS, 9), TARGETS), y)
  assert np.abs(run(np.where(MASK, 9, IDS), TARGETS) - y).min(axis=2).max() > 0
  later = TARGETS.copy()
  later[:, 3:] = 9
  again = run(IDS, later)
  np.testing.assert_array_equal(again[:, :3], y[:, :3])
  assert np.abs(again[:, 3] - y[:, 3]).max() > 1e-3


def test_cached_steps_equal_one_call(params):
  run = lambda *args, **kwargs: MODEL.apply(
      {'params': params}, *args, method='decode', **kwargs)

  @jax.jit
  def both(ids, targets):
    encoded = MODEL.apply({'params': params}, ids, MASK, method='encode')
    y, cache = run(targets[:, :2], encoded, MASK, cache=3)
    ys = [y]
    for part in (targets[:, 2:3], targets[:, 3:5]):
      y, cache = run(part, None, MASK, cache=cache)
      ys.append(y)
    return jnp.concatenate(ys, axis=1), run(targets, encoded, MASK), cache

  got, want, cache = both(IDS, TARGETS)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  assert cache.length == 5 and cache.k.shape == (2, 3, 5, 2, 4)
  y, _ = run(TARGETS[:, :1], None, MASK, cache=cache)  # There is no room.
  assert np.isnan(y).all()


# -------------------------------------------------------------------- methods
def hook(name, on, layer, path, value):
  return peftjax.Method(
      name, peftjax.select(path=path),
      lambda key, site, p, stats: dict(s=value), layer=layer, on=on)


def in_front(f, ids, t, ctx):
  u = f(ids)
  new = jnp.broadcast_to(t['s'], (len(u), *t['s'].shape))
  return jnp.concatenate([new, u], axis=1)


def test_prompts_equal_further_tokens(params):
  # Positions are distances, so a prompt of token vectors is those tokens.
  first, start = np.array([5, 11]), np.array([3])
  table = params['tokens']['embedding']
  methods = (hook('source', 'embed', in_front, '^$', table[first]),
             hook('target', 'embed_targets', in_front, '^$', table[start]))
  sites = peftjax.describe(MODEL, IDS, TARGETS)
  theta = peftjax.init(methods, jax.random.key(0), sites, params)
  front = lambda new, a: np.concatenate([np.tile(new, (3, 1)), a], axis=1)

  @jax.jit
  def both(params, theta):
    got, _ = peftjax.apply(MODEL, methods, params, theta, IDS, TARGETS, MASK)
    want = MODEL.apply({'params': params}, front(first, IDS),
                       front(start, TARGETS), front([True] * 2, MASK))
    return got, want

  got, want = both(params, theta)
  assert got.shape == (3, 5, 30)
  np.testing.assert_allclose(got, want[:, 1:], rtol=0, atol=1e-5)


def test_keys_in_front_have_no_mask_and_no_bias():
  normal = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
  q, k, v, new, bias = (normal(3, 7, 2, 4), normal(3, 7, 2, 4),
                        normal(3, 7, 2, 4), normal(3, 2, 2, 4),
                        normal(1, 2, 7, 7))
  k, v = (jnp.concatenate([new, a], axis=1) for a in (k, v))
  got = layers.attention(q, k, v, layers.padding_mask(MASK), bias)
  mask = np.concatenate([np.ones((3, 2), bool), MASK], axis=1)
  bias = jnp.concatenate([jnp.zeros((1, 2, 7, 2)), bias], axis=-1)
  want = layers.attention(q, k, v, layers.padding_mask(mask), bias)
  np.testing.assert_array_equal(got, want)


def test_lora_and_a_full_head_train(params):
  methods = (
      peftjax.load('lowrank.lora', rank=2, sites=peftjax.select(roles='qv')),
      peftjax.load('selective.full', sites=peftjax.select(roles=('head',))))
  sites = peftjax.describe(MODEL, IDS, TARGETS)
  theta = peftjax.init(methods, jax.random.key(0), sites, params)
  trained, frozen = peftjax.partition(methods, theta)
  assert len(theta['lora']) == 12 and len(theta['full']) == 1

  @jax.jit
  def step(trained):
    def loss(trained):
      y, _ = peftjax.apply(MODEL, methods, params,
                           peftjax.combine(trained, frozen), IDS, TARGETS, MASK)
      return -jnp.take_along_axis(
          jax.nn.log_softmax(y), IDS[:, :5, None], axis=2).mean()
    value, grads = jax.value_and_grad(loss)(trained)
    return value, jax.tree.map(lambda a, g: a - 0.5 * g, trained, grads)

  losses = []
  for _ in range(8):
    value, trained = step(trained)
    losses.append(float(value))
  assert losses[-1] < losses[0] - 0.3
  assert all(np.abs(v['b']).max() > 0
             for v in peftjax.combine(trained, frozen)['lora'].values())


# ------------------------------------------------------------------ bad input
def test_bad_input(params):
  run = lambda *args, model=MODEL, **kwargs: jax.eval_shape(
      lambda p: model.apply({'params': p}, *args, **kwargs), params)
  with pytest.raises(ValueError, match=r'ids of shape \(3,\)'):
    run(IDS[:, 0], TARGETS)
  with pytest.raises(ValueError, match='targets of shape .* float'):
    run(IDS, TARGETS.astype(np.float32))
  with pytest.raises(ValueError, match=r'mask of shape \(3, 5\)'):
    run(IDS, TARGETS, MASK[:, :5])
  with pytest.raises(ValueError, match='target_mask with a cache'):
    run(TARGETS, np.ones((3, 7, 8)), MASK, np.ones((3, 5), bool), cache=2,
        method='decode')
  with pytest.raises(ValueError, match="unknown head 'lmm'.*'lm'"):
    run(IDS, TARGETS, model=MODEL.clone(head='lmm'))
  with pytest.raises(ValueError, match="no method 'encoded'.*'encode'"):
    peftjax.apply(MODEL, (), params, {}, IDS, method='encoded')
