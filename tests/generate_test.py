"""Generation with methods applied: what the full call would choose."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax import trees
from peftjax.data.tokenizer import load_tokenizer
from peftjax.generate import _run, generate, nucleus
from peftjax.interop import huggingface
from peftjax.models.decoder import Decoder
from peftjax.models.encdec import EncDec
import pytest

SIZES = dict(vocab=30, width=8, depth=2, heads=2, head_dim=4, mlp_dim=12)
IDS = np.random.RandomState(0).randint(2, 30, (3, 7))
MASK = np.arange(7) >= np.array([[0], [3], [1]])


def filled(function, *args):
  """What a function returns, in shape only, with random numbers in it."""
  rng = np.random.RandomState(1)
  return jax.tree.map(
      lambda v: jnp.asarray(rng.normal(0, 0.3, v.shape), v.dtype),
      jax.eval_shape(function, *args))


def hook(name, on, layer, path, shape):
  return peftjax.Method(
      name, peftjax.select(path=path),
      lambda key, site, p, stats: dict(s=jnp.zeros(shape)), layer=layer, on=on)


def in_front(f, ids, t, ctx):
  """Prompts: learned tokens before the text's."""
  u = f(ids)
  new = jnp.broadcast_to(t['s'], (len(u), *t['s'].shape))
  return jnp.concatenate([new, u], axis=1)


def prefix(f, q, t, ctx):
  """One learned key and value of every head before the tokens'."""
  k, v, mask = ctx.rest
  new = jnp.broadcast_to(t['s'], (len(k), 1, *k.shape[2:]))
  return f(q, *(jnp.concatenate([new, a], axis=1) for a in (k, v)), mask)


def lora():
  return peftjax.load('lowrank.lora', rank=2, sites=peftjax.select(roles='qv'))


METHODS = (hook('prompt', 'embed', in_front, '^$', (2, 8)),
           hook('prefix', 'attend', prefix, 'attn$', (2, 4)))


def test_encoder_decoder():
  model = EncDec(**SIZES, gated=True, act='gelu_new', tied=False, scan=True)
  methods = (lora(), *METHODS,
             hook('first', 'embed_targets', in_front, '^$', (1, 8)))
  params = trees.stack(filled(
      model.clone(scan=False).init, jax.random.key(0), IDS, IDS)['params'])
  sites = peftjax.describe(model, IDS, IDS)
  theta = filled(lambda p: peftjax.init(
      methods, jax.random.key(0), sites, p), params)
  tokens = np.asarray(generate(
      model, params, IDS, MASK, 6, methods, theta, start=1))
  targets = np.concatenate([np.ones((3, 1), int), tokens[:, :-1]], axis=1)
  logits, _ = jax.jit(lambda p, t: peftjax.apply(
      model, methods, p, t, IDS, targets, MASK))(params, theta)
  np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
  assert len(np.unique(tokens)) > 2
  bare = generate(model, params, IDS, MASK, 6, methods,
                  jax.tree.map(jnp.zeros_like, theta), start=1)
  assert (bare != tokens).any()


def test_decoder():
  model = Decoder(**SIZES, scan=True)
  methods = (lora(), *METHODS)
  params = trees.stack(filled(
      model.clone(scan=False).init, jax.random.key(0), IDS)['params'])
  theta = filled(lambda p: peftjax.init(
      methods, jax.random.key(0), peftjax.describe(model, IDS), p), params)
  tokens = np.asarray(generate(model, params, IDS, MASK, 6, methods, theta))
  ids = np.concatenate([IDS, tokens[:, :-1]], axis=1)
  mask = np.concatenate([MASK, np.ones((3, 5), bool)], axis=1)
  logits, _ = jax.jit(lambda p, t: peftjax.apply(
      model, methods, p, t, ids, mask))(params, theta)
  np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1)[:, 6:])
  assert len(np.unique(tokens)) > 2
  bare = generate(model, params, IDS, MASK, 6, methods,
                  jax.tree.map(jnp.zeros_like, theta))
  assert (bare != tokens).any()


def test_one_method_without_a_tuple():
  with pytest.raises(ValueError, match=r"theta holds \[\], the methods are"):
    generate(Decoder(**SIZES), {}, IDS, methods=lora(), max_new_tokens=1)


@pytest.mark.parametrize('model, kwargs, message', [
    (EncDec(**SIZES, head=None), {}, 'head=None: generation needs a decoder'),
    (Decoder(**SIZES), dict(start=1), 'only an encoder-decoder has a start'),
    (EncDec(**SIZES), dict(max_new_tokens=0), 'max_new_tokens=0'),
])
def test_bad_input(model, kwargs, message):
  with pytest.raises(ValueError, match=message):
    generate(model, {}, IDS, **kwargs)


def test_a_part_of_a_model_runs_where_it_is_said():
  two, one = EncDec(**SIZES), Decoder(**SIZES)
  params = filled(two.init, jax.random.key(0), IDS, IDS)['params']
  theta = filled(lambda p: peftjax.init(
      lora(), jax.random.key(0), peftjax.describe(two, IDS, IDS), p), params)
  encoded, _ = jax.eval_shape(lambda: peftjax.apply(
      two, lora(), params, theta, IDS, method='encode'))
  assert encoded.shape == (3, 7, 8)

  params = filled(one.init, jax.random.key(0), IDS)['params']
  theta = filled(lambda p: peftjax.init(
      METHODS, jax.random.key(0), peftjax.describe(one, IDS), p), params)
  _, cache = jax.eval_shape(lambda: peftjax.apply(
      one, METHODS, params, theta, IDS, cache=1)[0])
  step = lambda **kwargs: jax.eval_shape(
      lambda cache: peftjax.apply(
          one, METHODS, params, theta, IDS[:, :1], cache=cache, **kwargs)[0],
      cache)
  with pytest.raises(ValueError, match='never used: .* did not call embed'):
    step()
  assert step(partial=True)[0].shape == (3, 1, 30)


SAMPLE = """Once upon a time, there was a little girl named Lily. She loved to \
play outside in the park. One day, she saw a big, red ball. She wanted to play \
with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know \
what to do. She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't \
know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know \
what to do." Her mom said, "Don't worry, Lily. We can help you."""


def test_the_packaged_model_tells_its_documented_story():
  folder = pathlib.Path(peftjax.__file__).parent / 'weights' / 'stories260k'
  model, params, _ = huggingface.load(folder, scan=True)
  tokenizer = load_tokenizer(folder)
  out = generate(model, params, [[tokenizer.bos]], max_new_tokens=250)
  text = tokenizer.decode(np.asarray(out)[0])
  assert len(text) > 500
  assert SAMPLE.startswith(text)


def test_sampling_stops_and_compiles_once():
  model = Decoder(**SIZES, scan=True)
  params = filled(model.init, jax.random.key(0), IDS)['params']
  run = functools.partial(generate, model, params, IDS, MASK, 12)
  greedy = np.asarray(run(pad=1))
  # A row ends with its stop token; the others go on as before.
  stop = int(greedy[0, 2])
  first = [list(row).index(stop) if stop in row else 12 for row in greedy]
  want = greedy.copy()
  for row, n in zip(want, first):
    row[n + 1:] = 1
  before = _run._cache_size()
  np.testing.assert_array_equal(run(stop_tokens=(stop,), pad=1), want)
  assert (want == 1).any()

  sample = lambda seed, **kwargs: np.asarray(run(
      rng=jax.random.key(seed), **{'temperature': 1., 'top_p': 0.9, **kwargs}))
  a = sample(0)
  np.testing.assert_array_equal(sample(0), a)
  assert (sample(1) != a).any()
  np.testing.assert_array_equal(sample(2, temperature=1e-4), greedy)
  np.testing.assert_array_equal(sample(3, top_p=1e-6), greedy)
  # With a stop token, and with sampling.
  assert _run._cache_size() == before + 2


def test_padding_on_the_right_is_padding_on_the_left():
  model = Decoder(**SIZES, scan=True)
  params = filled(model.init, jax.random.key(0), IDS)['params']
  right = IDS.copy()
  for row, mask in zip(right, MASK):
    row[:mask.sum()], row[mask.sum():] = row[mask], row[~mask]
  left = generate(model, params, IDS, MASK, 6)
  np.testing.assert_array_equal(
      generate(model, params, right, np.sort(~MASK) == 0, 6), left)


def test_nucleus():
  logits = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))
  kept = lambda p: np.isfinite(nucleus(logits, p)).tolist()
  assert kept(0.45) == [False, True, False, False]
  assert kept(0.7) == [False, True, False, True]
  assert kept(0.8) == [False, True, True, True]
  assert kept(1.) == [True] * 4


@pytest.mark.parametrize('kwargs, message', [
    (dict(temperature=-1.), 'temperature=-1.0'),
    (dict(temperature=1.), 'give rng'),
    (dict(top_p=0.), 'top_p=0.0'),
    (dict(mask=MASK & (np.arange(3) != 1)[:, None]), r'rows \[1\]'),
])
def test_bad_settings(kwargs, message):
  with pytest.raises(ValueError, match=message):
    generate(Decoder(**SIZES), {}, IDS, **kwargs)
