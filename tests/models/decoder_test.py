"""Decoders: forms that must agree, caches, packing, prompts, mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax
from peftjax import trees
from peftjax.method import Method
from peftjax.models import moe
from peftjax.models.decoder import Decoder
from peftjax.models.decoder_block import frequencies

SMALL = dict(vocab=31, width=16, heads=4, mlp_dim=24)
GPT2 = dict(SMALL, norm='layer', position='learned', fused_qkv=True,
            qkv_bias=True, out_bias=True, mlp_bias=True, gated=False,
            activation='gelu_new', max_positions=16)
LLAMA = dict(SMALL, kv_heads=2, tied=False)
GEMMA = dict(SMALL, kv_heads=2, head_dim=8, windows=(3, 0), post_norms=True,
             norm_offset=1., softcap=5., logit_softcap=3., scale=0.3,
             embed_scale=4., activation='gelu_pytorch_tanh')
MOE = dict(SMALL, experts=4, shared_dim=8, qk_norm=True)
ALL = dict(gpt2=GPT2, llama=LLAMA, gemma=GEMMA, moe=MOE)

IDS = np.random.default_rng(0).integers(1, 31, (2, 7)).astype(np.int32)
LEFT = np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7], bool)


def start(model, seed=0):
  """Parameters larger than at the start, norms and biases too."""
  params = jax.eval_shape(model.init, jax.random.key(0), IDS)['params']
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), params)


def close(a, b, atol=2e-5):
  np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize('name', ALL)
def test_forms_agree(name):
  """Scanned, rematerialised, and token by token with a cache."""
  plain = Decoder(**ALL[name])
  scanned = Decoder(**ALL[name], scan=True, remat=True)
  params = start(plain)

  def stepwise(model, params):
    run = lambda *a, **k: model.apply({'params': params}, *a, **k)
    out, cache = run(IDS[:, :3], LEFT[:, :3], cache=4)
    outs = [out]
    for part in (slice(3, 4), slice(4, 7)):
      out, cache = run(IDS[:, part], cache=cache)
      outs.append(out)
    return jnp.concatenate(outs, axis=1)

  @jax.jit
  def run(params):
    stacked = trees.stack(params)
    outs = [plain.apply({'params': params}, IDS, LEFT),
            scanned.apply({'params': stacked}, IDS, LEFT),
            stepwise(scanned, stacked)]
    # Caches of a list of layers: once, where the layers differ.
    return outs + ([stepwise(plain, params)] if name == 'gemma' else [])

  want, *others = run(params)
  assert want.dtype == jnp.float32 and np.abs(want).max() > 0.1
  for other in others:
    close(other[LEFT], want[LEFT])


@pytest.mark.parametrize('name', ('gpt2', 'gemma'))
def test_padding_and_neighbours_change_nothing(name):
  """Padded on either side, and packed with another example: the same."""
  model = Decoder(**ALL[name])
  segments = np.array([[4, 4, 4, 9, 9, 9, 9]])
  positions = np.array([[0, 1, 2, 0, 1, 2, 3]])
  masks = [LEFT[:1], LEFT[:1, ::-1]]
  padded = [np.full((1, 7), 30) for _ in masks]
  for ids, mask in zip(padded, masks):
    ids[mask] = IDS[0, :5]

  @jax.jit
  def run(params):
    run = lambda *a, **k: model.apply({'params': params}, *a, **k)[0]
    return (run(IDS[:1, :5]), [run(*a) for a in zip(padded, masks)],
            jnp.concatenate([run(IDS[:1, :3]), run(IDS[:1, 3:])]),
            run(IDS[:1], segments=segments, positions=positions),
            run(IDS[:1], segments=segments), run(IDS[:1]))

  alone, others, want, packed, counted, joined = run(start(model))
  for other, mask in zip(others, masks):
    close(other[mask[0]], alone)
  close(packed, want)
  close(counted, want)
  assert np.abs(want - joined)[3:].max() > 1e-2


def prompt(rows):
  """Puts the token vectors `rows` in front."""
  def layer(f, x, t, ctx):
    del ctx
    u = f(x)
    p = jnp.broadcast_to(t['p'], (len(u), *t['p'].shape))
    return jnp.concatenate([p.astype(u.dtype), u], axis=1)
  return Method('prompt', peftjax.select(path='^$'),
                lambda key, site, p, stats: dict(p=rows), layer=layer,
                on='embed')


@pytest.mark.parametrize('name', ('gpt2', 'gemma'))
def test_tokens_that_a_prompt_adds_are_tokens(name):
  """A prompt of the vectors of two tokens is those two tokens."""
  model = Decoder(**ALL[name], scan=True)
  params = start(model)
  two = np.array([5, 6])
  rows = params['tokens']['embedding'][two] * model.embed_scale
  segments = np.array([[1, 1, 1, 2, 2, 2, 2]])
  front = lambda ids: np.concatenate(
      [np.broadcast_to(two, (len(ids), 2)), ids], axis=1)
  mask = np.concatenate([np.ones((2, 2), bool), LEFT], axis=1)

  @jax.jit
  def run(params):
    theta = {'prompt': {'': dict(p=rows)}}
    ours = lambda *a, **k: peftjax.apply(
        model, prompt(rows), params, theta, *a, **k)[0]
    plain = lambda ids, mask=None: model.apply(
        {'params': params}, front(ids), mask)[:, 2:]
    return (ours(IDS, LEFT), plain(IDS, mask), ours(IDS[:1], segments=segments),
            [plain(IDS[:1, :3]), plain(IDS[:1, 3:])])

  got, want, packed, parts = run(params)
  close(got[LEFT], want[LEFT])
  # Packed examples each have the prompt.
  close(packed, jnp.concatenate(parts, axis=1))


def test_window_limits_what_is_seen():
  model = Decoder(**GEMMA | dict(windows=(3, 2)))
  params = start(model)
  ids = np.tile(IDS[:1], (2, 1))
  ids[1, 1] += 1
  a, b = jax.jit(model.apply)({'params': params}, ids)
  # Two layers look 2 and 1 back.
  reached = np.abs(a - b).max(axis=-1) > 1e-6
  np.testing.assert_array_equal(
      reached, [False, True, True, True, True, False, False])


@pytest.mark.parametrize('name', ALL)
def test_roles(name):
  model = Decoder(**ALL[name], head='classify', classes=3)
  sites = peftjax.describe(model, IDS)
  assert {s.role for s in sites.values()} - {''} == {
      'q', 'k', 'v', 'o', 'up', 'down', 'norm', 'embed', 'head'} | (
          {'gate'} if model.gated else set())


def test_training():
  """LoRA on queries, values and experts, and a new head."""
  model = Decoder(**MOE, head='classify', classes=3, scan=True)
  sites = peftjax.describe(model, IDS)
  methods = (peftjax.load('lowrank.lora', rank=2,
                          sites=dict(roles=('q', 'v', 'gate'))),
             peftjax.load('selective.full', sites=dict(roles='head')))
  params = start(model)
  theta = peftjax.init(methods, jax.random.key(1), sites, params)
  labels = np.array([0, 2])

  def loss(theta):
    logits, _ = peftjax.apply(model, methods, params, theta, IDS, LEFT)
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels).mean()

  tx = optax.adam(3e-2)

  @jax.jit
  def steps(theta):
    def one(carry, _):
      theta, state = carry
      value, grad = jax.value_and_grad(loss)(theta)
      update, state = tx.update(grad, state)
      return (optax.apply_updates(theta, update), state), value
    (theta, _), values = jax.lax.scan(one, (theta, tx.init(theta)), None, 8)
    return theta, values

  after, values = steps(theta)
  assert values[-1] < 0.5 * values[0]
  for leaf, before in zip(*map(jax.tree.leaves, (after, theta))):
    assert np.abs(leaf - before).max() > 0


def test_experts_are_layers_that_methods_see():
  model = Decoder(**MOE, scan=True)
  sites = peftjax.describe(model, IDS)
  assert sites['blocks/mlp/experts/up'].stack == (2, 4)
  lora = peftjax.load('lowrank.lora', rank=2, sites=dict(roles=('up',)))
  params = start(model)
  theta = peftjax.init(lora, jax.random.key(0), sites, params)
  theta = jax.tree.map(lambda x: x + 0.1, theta)
  plain = jax.jit(lambda p: model.apply({'params': p}, IDS))
  got = jax.jit(lambda p: peftjax.apply(model, lora, p, theta, IDS)[0])(params)
  close(got, plain(peftjax.fold(lora, params, theta, sites)))
  assert np.abs(got - plain(params)).max() > 1e-2


def test_gates():
  scores = jnp.log(jnp.array([0.1, 0.4, 0.3, 0.2]))
  close(moe.gates(scores, 2, False), [0, 0.4, 0.3, 0], 1e-6)
  close(moe.gates(scores, 2, True), [0, 4 / 7, 3 / 7, 0], 1e-6)


def test_mixture_is_the_weighted_sum_of_its_experts():
  sizes = dict(mlp_dim=6, activation='silu')
  model = moe.Mixture(**sizes, experts=3, experts_per_token=2)
  x = jax.random.normal(jax.random.key(0), (2, 5, 4))
  params = jax.jit(model.init)(jax.random.key(1), x)['params']
  w = moe.gates(x @ params['router']['kernel'], 2, True)
  assert ((w > 0).sum(axis=-1) == 2).all()
  want = 0
  for e in range(3):
    one = jax.tree.map(lambda a, e=e: a[e], params['experts'])
    want += w[..., e:e + 1] * moe.Mlp(**sizes).apply({'params': one}, x)
  close(model.apply({'params': params}, x), want)


def test_frequencies():
  close(frequencies(6, 1000.), [1, 0.1, 0.01], 1e-7)
  close(frequencies(6, 1000., dict(rope_type='linear', factor=4.)),
        [0.25, 0.025, 0.0025], 1e-7)
  llama3 = dict(rope_type='llama3', factor=8., low_freq_factor=1.,
                high_freq_factor=3.,
                original_max_position_embeddings=40 * np.pi)
  # 20, 2 and 0.2 turns in the first context: kept, half way, divided.
  close(frequencies(6, 1000., llama3), [1, 0.1 * (1 + 1 / 8) / 2, 0.01 / 8],
        1e-7)


def test_computation_in_bfloat16():
  model = Decoder(**LLAMA, dtype=jnp.bfloat16)
  params = start(model)
  out, cache = jax.jit(
      lambda p: model.apply({'params': p}, IDS, cache=2))(params)
  assert out.dtype == jnp.float32 and cache.k.dtype == jnp.bfloat16
  want = jax.jit(Decoder(**LLAMA).apply)({'params': params}, IDS)
  close(out, want, 0.1)


def test_a_full_cache_gives_no_numbers():
  model = Decoder(**LLAMA)

  @jax.jit
  def run(params):
    run = lambda n, cache: model.apply({'params': params}, IDS[:, :n],
                                       cache=cache)
    _, cache = run(3, 1)
    last, cache = run(1, cache)
    return last, run(1, cache)[0]

  last, over = run(start(model))
  assert np.isfinite(last).all()
  assert np.isnan(over).all()


@pytest.mark.parametrize('change, kwargs, message', [
    (dict(head='lmm'), {}, "head='lmm'; did you mean 'lm'"),
    (dict(heads=3), {}, 'width 16 does not divide into 3 heads'),
    (dict(kv_heads=3), {}, 'kv_heads=3 does not divide heads=4'),
    (dict(windows=(1,)), {}, 'one for each of 2 layers'),
    (dict(activation='mish'), {}, "unknown activation 'mish'"),
    (dict(rope_scaling=dict(rope_type='yarn')), {}, "rope_type 'yarn'"),
    ({}, dict(mask=LEFT[:, :5]), r'mask of shape \(2, 5\)'),
    ({}, dict(segments=LEFT.astype(int), cache=1), 'segments with a cache'),
    (dict(GPT2, max_positions=8), dict(cache=2), '9 tokens.*8 learned'),
])
def test_bad_input_is_named(change, kwargs, message):
  model = Decoder(**{**SMALL, **change})
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: model.init_with_output(
        jax.random.key(0), IDS, **kwargs))
