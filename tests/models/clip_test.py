"""CLIP: forms, masks, hooks and adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax
from peftjax import trees
from peftjax.models.clip import Clip, Sizes
import pytest

SMALL = dict(
    text_sizes=Sizes(8, 2, 2, 12), image_sizes=Sizes(12, 2, 3, 10), vocab=30,
    positions=9, end=29, image_side=8, patch=4, dim=6)
MODEL = Clip(**SMALL)
RNG = np.random.RandomState(0)
IDS = RNG.randint(2, 28, (4, 7))
LENGTHS = np.array([7, 4, 6, 3])
MASK = np.arange(7) < LENGTHS[:, None]
IDS[np.arange(4), LENGTHS - 1] = 29
IMAGES = RNG.normal(size=(3, 8, 8, 3)).astype(np.float32)


def filled(function, *args):
  """What a function returns, in shape only, with random numbers in it."""
  rng = np.random.RandomState(1)
  return jax.tree.map(
      lambda v: jnp.asarray(rng.normal(0, 0.3, v.shape), v.dtype),
      jax.eval_shape(function, *args))


@pytest.fixture(scope='module')
def params():
  return filled(MODEL.init, jax.random.key(0), IDS, IMAGES)['params']


def outputs(model, params):
  """Logits and the gradient of their squares."""
  def loss(p):
    y = model.apply({'params': p}, IDS, IMAGES, MASK)
    return (y ** 2).sum(), y
  (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return y, trees.flatten(grads)


def test_scan_and_remat_equal_the_plain_model(params):
  y, grads = outputs(MODEL, params)
  assert y.shape == (3, 4) and np.ptp(y) > 0.1
  again, stacked = outputs(MODEL.clone(scan=True, remat=True),
                           trees.stack(params))
  np.testing.assert_allclose(again, y, rtol=0, atol=1e-5)
  stacked = trees.flatten(trees.unstack(trees.unflatten(stacked)))
  assert set(stacked) == set(grads)
  for path, g in grads.items():
    # Softmax does not see a number that all keys add to the scores.
    assert path.endswith('key/bias') or np.abs(g).max() > 1e-4, path
    np.testing.assert_allclose(stacked[path], g, rtol=1e-4, atol=1e-4)


def test_every_role_is_there_in_both_towers():
  sites = peftjax.describe(MODEL, IDS, IMAGES)
  for tower in ('text_tower', 'image_tower'):
    roles = {s.role for p, s in sites.items() if p.startswith(tower)} - {''}
    assert roles == {'q', 'k', 'v', 'o', 'up', 'down', 'norm', 'embed'}


def test_embeddings_have_norm_one_and_make_the_logits(params):
  @jax.jit
  def run(params):
    call = lambda *args, method=None: model.apply(
        {'params': params}, *args, method=method)
    return (call(IDS, IMAGES, MASK), call(IDS, MASK, method='text'),
            call(IMAGES, method='image'))

  model = MODEL.clone(dtype=jnp.bfloat16)
  logits, text, image = map(np.asarray, run(params))
  assert logits.dtype == text.dtype == image.dtype == np.float32
  for x in (text, image):
    np.testing.assert_allclose((x ** 2).sum(axis=1), 1, rtol=0, atol=1e-5)
  np.testing.assert_allclose(
      logits, np.exp(params['logit_scale']) * image @ text.T, rtol=0, atol=1e-5)


def test_texts_are_read_at_their_first_end(params):
  run = jax.jit(lambda ids, mask=None: MODEL.apply(
      {'params': params}, ids, mask, method='text'))
  y = run(IDS)
  # What stands behind the end is not looked at, be it masked or not.
  np.testing.assert_array_equal(run(np.where(MASK, IDS, 29)), y)
  np.testing.assert_allclose(run(IDS, MASK), y, rtol=0, atol=1e-6)
  first = IDS.copy()
  first[:, 0] = 9
  assert np.abs(run(first) - y).max(axis=1).min() > 1e-3


# -------------------------------------------------------------------- methods
def test_a_text_prompt_equals_further_tokens(params):
  # Without positions a prompt of token vectors is those tokens.
  tower = params['text_tower']
  table = jnp.zeros_like(tower['position_embed']['embedding'])
  params = params | dict(
      text_tower=tower | dict(position_embed=dict(embedding=table)))
  first = np.array([5, 11])

  def in_front(f, ids, t, ctx):
    u = f(ids)
    new = jnp.broadcast_to(t['s'], (len(u), *t['s'].shape))
    return jnp.concatenate([new, u], axis=1)

  prompt = peftjax.Method(
      'prompt', peftjax.select(path='^text_tower$'),
      lambda key, site, p, stats: dict(
          s=tower['token_embed']['embedding'][first]),
      layer=in_front, on='embed')
  sites = peftjax.describe(MODEL, IDS, IMAGES)
  theta = peftjax.init(prompt, jax.random.key(0), sites, params)
  front = lambda new, a: np.concatenate([np.tile(new, (4, 1)), a], axis=1)

  @jax.jit
  def both(params, theta):
    got, _ = peftjax.apply(
        MODEL, prompt, params, theta, IDS, MASK, method='text')
    want = MODEL.apply({'params': params}, front(first, IDS),
                       front([True] * 2, MASK), method='text')
    return got, want

  got, want = both(params, theta)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_lora_on_both_towers_and_the_scale_train(params):
  methods = (
      peftjax.load('lowrank.lora', rank=2, sites=peftjax.select(roles='qv')),
      peftjax.load('selective.full', sites=peftjax.select(leaf='logit_scale')))
  sites = peftjax.describe(MODEL, IDS, IMAGES)
  theta = peftjax.init(methods, jax.random.key(0), sites, params)
  assert len(theta['lora']) == 8 and set(theta['full']) == {''}
  trained, frozen = peftjax.partition(methods, theta)

  def loss(trained):
    y, _ = peftjax.apply(
        MODEL, methods, params, peftjax.combine(trained, frozen), IDS[:3],
        IMAGES, MASK[:3])
    return sum(-jnp.diag(jax.nn.log_softmax(a)).mean() for a in (y, y.T))

  tx = optax.adam(0.05)

  def step(carry, _):
    trained, state = carry
    value, grads = jax.value_and_grad(loss)(trained)
    updates, state = tx.update(grads, state)
    return (optax.apply_updates(trained, updates), state), value

  (trained, _), losses = jax.jit(lambda t: jax.lax.scan(
      step, (t, tx.init(t)), None, 20))(trained)
  assert losses[-1] < losses[0] - 0.5
  after = peftjax.combine(trained, frozen)
  assert all(np.abs(v['b']).max() > 0 for v in after['lora'].values())
  assert after['full']['']['logit_scale'] != params['logit_scale']


# ------------------------------------------------------------------ bad input
def test_bad_input(params):
  run = lambda *args, model=MODEL: jax.eval_shape(
      lambda p: model.apply({'params': p}, *args), params)
  with pytest.raises(ValueError, match=r'ids of shape \(4,\)'):
    run(IDS[:, 0], IMAGES)
  with pytest.raises(ValueError, match='10 tokens: expected at most 9'):
    run(np.ones((2, 10), int), IMAGES)
  with pytest.raises(ValueError, match=r'mask of shape \(4, 5\)'):
    run(IDS, IMAGES, MASK[:, :5])
  with pytest.raises(ValueError, match=r'expected \[B, 8, 8, 3\]'):
    run(IDS, IMAGES[..., :1])
  with pytest.raises(ValueError, match='12 cannot be split into 5 heads'):
    run(IDS, IMAGES, model=MODEL.clone(image_sizes=Sizes(12, 2, 5, 10)))
