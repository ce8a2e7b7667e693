"""Prefix tuning: closed forms of attention, positions, and PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from peftjax.conformance.models import jit
from peftjax.methods.prompts.prefix_tuning import prefix_tuning
from peftjax.models import layers
from peftjax.models.decoder import Decoder
from peftjax.models.encdec import EncDec
from peftjax.models.encoder import Encoder
from peftjax.models.vit import ViT

SIZES = dict(vocab=31, width=8, depth=2, heads=2, mlp_dim=12)
IDS = np.random.default_rng(0).integers(3, 31, (3, 7)).astype(np.int32)
MASK = np.arange(7) < np.array([[7], [4], [2]])
BERT = Encoder(**SIZES, positions=10)
GPT2 = Decoder(**SIZES, position='learned', max_positions=14, norm='layer')
LLAMA = Decoder(**SIZES, kv_heads=1)
T5 = EncDec(**SIZES, head_dim=4, buckets=8, furthest=12)


def made(method, model, params, *args, seed=5):
  """Theta with large numbers in it."""
  theta = peftjax.init(method, jax.random.key(0), peftjax.describe(
      model, *args), params)
  rng = np.random.default_rng(seed)
  trained, frozen = peftjax.partition(method, theta)
  return peftjax.combine(jax.tree.map(
      lambda v: jnp.asarray(rng.normal(0, .7, v.shape), v.dtype), trained),
                         frozen)


def test_attention_is_a_mixture_of_two():
  """(1 - s) attn(q, K, V) + s attn(q, k, v), s the prefix's share of weight."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(3, 7, 2, 4)).astype(np.float32)
             for _ in range(3))
  mask = MASK[:, None, None]
  method = prefix_tuning(length=3)
  t = {n: rng.normal(size=(3, 2, 4)).astype(np.float32) for n in 'kv'}
  f = lambda q, k, v, mask: layers.attention(q, k, v, mask)
  got = method.layer(f, q, t, peftjax.Context('attn', rest=(k, v, mask)))
  alone = [np.broadcast_to(t[n], (3, 3, 2, 4)) for n in 'kv']
  scores = lambda k: np.exp(np.einsum('bthd,bshd->bths', q, k) / 2)
  ours = scores(alone[0]).sum(-1)
  s = ours / (ours + (scores(k) * MASK[:, None, None]).sum(-1))
  want = (1 - s)[..., None] * f(q, k, v, mask) + s[..., None] * f(
      q, *alone, None)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_keys_of_tokens_are_a_longer_text(random_params):
  """A prefix of a text's own keys and values is that text put in front.

  So positions, rotations, biases by distance and masks are right: one layer,
  where what stands in front depends on nothing behind it.
  """
  for model in (GPT2, LLAMA, T5):
    model = model.clone(depth=1, head=None)
    two = isinstance(model, EncDec)
    front = np.random.default_rng(1).integers(3, 31, 3)
    ids = np.concatenate([np.broadcast_to(front, (3, 3)), IDS], 1)
    # An encoder-decoder's targets stand behind the prefix.
    args = (lambda x: (IDS, x)) if two else (lambda x: (x,))
    params = random_params(model, *args(IDS))
    method = prefix_tuning(length=3, sites=peftjax.select(
        path='decoder/block_0/attn$' if two else 'attn$'))
    sites, seen = peftjax.describe(model, *args(IDS)), {}

    def keep(f, q, t, ctx):
      seen[ctx.path] = [a[0, :3] for a in ctx.rest[:2]]
      return f(q)

    spy = peftjax.Method('spy', method.sites, lambda *a: dict(
        s=jnp.zeros(())), layer=keep, on='attend')
    peftjax.apply(model, spy, params, peftjax.init(
        spy, jax.random.key(0), sites, params), *args(ids))
    theta = peftjax.init(method, jax.random.key(0), sites, params)
    for path, (k, v) in seen.items():
      theta['prefix_tuning'][path] = dict(k=k, v=v)
    got, _ = peftjax.apply(model, method, params, theta, *args(IDS))
    want = model.apply({'params': params}, *args(ids))[:, 3:]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    still = method._replace(on='attend')
    moved, _ = peftjax.apply(model, still, params, {'prefix_tuning': {
        p: t for p, t in theta['prefix_tuning'].items() if 'k' in t}},
                             *args(IDS))
    assert np.abs(moved - want).max() > 1e-2  # Positions matter.


def test_positions_stay_without_shift(random_params):
  """A prefix that no query weighs is the base, to rounding, without shift."""
  for model, args in ((BERT, (IDS, MASK)), (GPT2, (IDS, MASK)),
                      (T5, (IDS, IDS[:, :4], MASK))):
    params = random_params(model, *args)
    base = model.apply({'params': params}, *args)
    sites = peftjax.describe(model, *args)
    for shift in (False, True):
      method = prefix_tuning(length=3, shift=shift)
      theta = peftjax.init(method, jax.random.key(0), sites, params)
      assert any('shift' in t for t in theta['prefix_tuning'].values()) == shift

      def silent(f, q, t, ctx, method=method):
        if ctx.hook != 'attend':
          return method.layer(f, q, t, ctx)
        k, v, mask = ctx.rest
        n = k.shape[1] + 3
        pads = jnp.arange(n) >= 3
        mask = pads if mask is None else layers.for_keys(mask, n, False) & pads
        t = {n: t[n] for n in 'kv'}
        return method.layer(f, q, t, ctx._replace(rest=(k, v, mask)))

      got, _ = peftjax.apply(model, method._replace(layer=silent), params,
                             theta, *args)
      # T5's positions are distances, which do not change.
      same = not shift or isinstance(model, EncDec)
      far = np.abs(got - base)[:, :2].max()
      assert (far < 1e-4) == same, (type(model), shift, far)


@pytest.mark.parametrize('model', [BERT, LLAMA], ids=['bert', 'llama'])
def test_padding_is_not_seen(model, random_params):
  params = random_params(model, IDS)
  method = prefix_tuning(length=2)
  theta = made(method, model, params, IDS)
  run = lambda ids, mask: peftjax.apply(
      model, method, params, theta, ids, mask)[0]
  got = run(IDS, MASK)
  np.testing.assert_allclose(got[MASK], run(np.where(MASK, IDS, 0), MASK)[MASK],
                             rtol=0, atol=1e-5)
  np.testing.assert_allclose(got[1, :4], run(IDS[1:2, :4], None)[0], rtol=0,
                             atol=1e-4)


def test_starts_and_network(random_params):
  params = random_params(LLAMA, IDS)
  sites = peftjax.describe(LLAMA, IDS)
  method = prefix_tuning(length=500, std=0.3)
  theta = peftjax.init(method, jax.random.key(0), sites, params)
  t = theta['prefix_tuning']
  assert {p: {n: v.shape for n, v in x.items()} for p, x in t.items()} == {
      '': dict(shift=()), **{f'block_{i}/attn': dict.fromkeys(
          'kv', (500, 1, 4)) for i in range(2)}}
  assert t['']['shift'] == 500 and t['']['shift'].dtype == jnp.int32
  for n in 'kv':
    np.testing.assert_allclose(t['block_0/attn'][n].std(), 0.3, rtol=0.05)
  assert peftjax.count(peftjax.partition(method, theta)[0]) == 2 * 2 * 500 * 4

  method = prefix_tuning(length=3, project=5)
  theta = peftjax.init(method, jax.random.key(0), sites, params)
  trained, _ = peftjax.partition(method, theta)
  assert peftjax.count(trained) == 3 * 4 + 5 * 5 + 2 * 6 * 2 * 4
  theta = made(method, LLAMA, params, IDS)
  t = theta['prefix_tuning']
  z, here = t['*'], t['block_1/attn']
  h = np.tanh(z['embedding'] @ z['w1'] + z['b1'])
  got = method.prepare({**z, **here}, peftjax.Context('attn'))
  for i, n in enumerate('kv'):
    want = h @ here['w2'].reshape(5, 8)[:, 4 * i:4 * i + 4] + here['b2'][i]
    np.testing.assert_allclose(got[n].reshape(3, 4), want, rtol=0, atol=1e-5)
  flat = prefix_tuning(length=3)
  ejected = {'prefix_tuning': {
      p: method.prepare({**z, **x}, peftjax.Context(p)) if p else x
      for p, x in t.items() if p != '*'}}
  np.testing.assert_allclose(
      peftjax.apply(LLAMA, flat, params, ejected, IDS)[0],
      peftjax.apply(LLAMA, method, params, theta, IDS)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize('kwargs, match', [
    (dict(length=0), 'length=0: expected a whole number from 1'),
    (dict(std=-1.), 'std=-1.0: expected 0 or more'),
    (dict(project=-1), 'project=-1: expected a whole number from 0')])
def test_bad_hyperparameters(kwargs, match):
  with pytest.raises(ValueError, match=match):
    prefix_tuning(**kwargs)


def test_bad_places(random_params):
  params = jax.eval_shape(BERT.init, jax.random.key(0), IDS)['params']
  sites = peftjax.describe(BERT, IDS)
  with pytest.raises(ValueError, match=r"'block_0' \(Block\) has no hook att"):
    peftjax.sites.matched(prefix_tuning(sites=peftjax.select(
        kind='Block')), sites)
  method = prefix_tuning(length=4)
  theta = peftjax.init(method, jax.random.key(0), sites, random_params(
      BERT, IDS))
  run = lambda model, p, theta: jax.eval_shape(lambda p, t: peftjax.apply(
      model, method, p, t, IDS)[0], p, theta)
  with pytest.raises(ValueError, match='length=4 moves .*: 3 are left over'):
    run(BERT, params, theta)
  run(BERT.clone(positions=11), params | dict(position_embed=dict(
      embedding=jnp.zeros((11, 8)))), theta)
  # An image has no place to move; its positions are in its tokens.
  vit = ViT(width=8, depth=1, heads=2, mlp_dim=8)
  sites = peftjax.describe(vit, np.zeros((1, 8, 8, 3), np.float32))
  assert list(peftjax.sites.matched(method, sites)) == ['block_0/attn']


@pytest.mark.parametrize('model', [GPT2, LLAMA], ids=['gpt2', 'llama'])
def test_generation_reads_it_at_every_step(model, random_params, generated):
  model = model.clone(tied=False)  # A tied table repeats the last token.
  params = random_params(model, IDS)
  for method in (prefix_tuning(length=4),
                 prefix_tuning(length=4, shift=False)):
    generated(model, params, method, made(method, model, params, IDS))


CASES = [('bert', 'SEQ_CLS'), ('bert', 'TOKEN_CLS'), ('roberta', 'SEQ_CLS'),
         ('gpt2', 'CAUSAL_LM'), ('llama', 'CAUSAL_LM')]


def split(table, heads):
  """[P, 2 L e], keys and values in turn -> [L, 2, P, heads, h]."""
  table = table.reshape(len(table), 2, 2, heads, -1)
  return table.transpose(1, 2, 0, 3, 4)


@pytest.mark.parametrize('name, task', CASES)
def test_equals_peft(name, task, pair, under_peft, agree, greedy):
  peft = pytest.importorskip('peft')
  pair = pair(name, task)
  theirs = under_peft(pair, peft.PrefixTuningConfig(
      task_type=task, num_virtual_tokens=4))
  heads = 2 if name == 'llama' else 4
  method = prefix_tuning(length=4)

  def convert(encoder, get):
    table = split(get(encoder.embedding.weight), heads)
    return {'': {}, **{f'block_{i}/attn': dict(k=table[i, 0], v=table[i, 1])
                       for i in range(2)}}

  theta = agree(pair, theirs, method, convert)
  if task == 'CAUSAL_LM':
    greedy(pair, theirs, method, theta)


def test_equals_peft_on_t5(pair, under_peft, agree):
  """PEFT's decoder layer l of L reads block 2 l mod L of its table."""
  peft = pytest.importorskip('peft')
  pair = pair('t5', 'SEQ_2_SEQ_LM')
  theirs = under_peft(pair, peft.PrefixTuningConfig(
      task_type='SEQ_2_SEQ_LM', num_virtual_tokens=4))
  method = prefix_tuning(length=4, sites=peftjax.select(
      path='decoder/.*/attn$'))

  def convert(encoder, get):
    k, v = split(get(encoder.embedding.weight), 4)[0]
    return {'encoder/distance': {}, 'decoder/distance': {}, **{
        f'decoder/block_{i}/attn': dict(k=k, v=v) for i in range(2)}}

  def tied(grads):
    both = jax.tree.map(jnp.add, *(
        grads[f'decoder/block_{i}/attn'] for i in range(2)))
    return {p: both if t else t for p, t in grads.items()}

  agree(pair, theirs, method, convert, tied)


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_equals_peft_with_its_projection(name, pair, under_peft, agree):
  peft = pytest.importorskip('peft')
  pair = pair(name, 'CAUSAL_LM')
  theirs = under_peft(pair, peft.PrefixTuningConfig(
      task_type='CAUSAL_LM', num_virtual_tokens=4, prefix_projection=True,
      encoder_hidden_size=6))
  heads = 2 if name == 'llama' else 4

  def convert(encoder, get):
    first, _, last = encoder.transform
    w2 = split(get(last.weight).T, heads)  # [L, 2, m, heads, h]
    b2 = split(get(last.bias)[None], heads)[:, :, 0]
    return {'': {}, '*': dict(
        embedding=get(encoder.embedding.weight), w1=get(first.weight).T,
        b1=get(first.bias)), **{f'block_{i}/attn': dict(
            w2=w2[i].swapaxes(0, 1), b2=b2[i]) for i in range(2)}}

  agree(pair, theirs, prefix_tuning(length=4, project=6), convert)
