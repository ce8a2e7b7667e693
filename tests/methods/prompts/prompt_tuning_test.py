"""Prompt tuning: the base model on longer text, and PEFT."""

import jax
import numpy as np
import pytest

import peftjax
from peftjax.conformance.models import jit
from peftjax.methods.prompts.prompt_tuning import prompt_tuning
from peftjax.models.decoder import Decoder
from peftjax.models.encdec import EncDec
from peftjax.models.encoder import Encoder
from peftjax.models.vit import ViT

SIZES = dict(vocab=31, width=8, depth=2, heads=2, mlp_dim=12)
IDS = np.random.default_rng(0).integers(3, 31, (3, 7)).astype(np.int32)
MASK = np.arange(7) < np.array([[7], [4], [2]])
FRONT = (5, 9, 4)
MODELS = {
    'bert': Encoder(**SIZES, positions=10),
    'roberta': Encoder(**SIZES, positions=12, types=1, padding=1),
    'electra': Encoder(**SIZES, positions=10, embed_dim=4),
    'gpt2': Decoder(**SIZES, position='learned', norm='layer', head=None),
    'gemma': Decoder(**SIZES, embed_scale=8 ** .5, windows=(3, 0), head=None),
    't5': EncDec(**SIZES, head_dim=4, head=None),
}


def longer(ids, mask):
  front = np.broadcast_to(FRONT, (len(ids), 3))
  return (np.concatenate([front, ids], 1).astype(np.int32),
          np.concatenate([np.ones((len(ids), 3), bool), mask], 1))


@pytest.mark.parametrize('name', MODELS)
def test_rows_of_the_table_are_a_longer_text(name, random_params):
  """A prompt E[ids'] on ids is the base on ids' || ids, to the bit."""
  model = MODELS[name]
  if name == 't5':
    args = lambda ids, mask: (ids, IDS[:, :4], mask)
  else:
    args = lambda ids, mask: (ids, mask)
  params = random_params(model, *args(IDS, MASK))
  sites = peftjax.describe(model, *args(IDS, MASK))
  method = prompt_tuning(length=3, init='ids', ids=FRONT)
  theta = peftjax.init(method, jax.random.key(0), sites, params)
  got, _ = peftjax.apply(model, method, params, theta, *args(IDS, MASK))
  want = model.apply({'params': params}, *args(*longer(IDS, MASK)))
  np.testing.assert_array_equal(got, want[:, want.shape[1] - got.shape[1]:])
  base = model.apply({'params': params}, *args(IDS, MASK))
  assert np.abs(got - base).max() > 0.03


@pytest.mark.parametrize('head', ['classify', 'pool', 'mean', 'tag', 'mlm'])
def test_what_the_heads_of_an_encoder_read(head, random_params):
  """'classify' the first token of all, the others the text's alone."""
  model = Encoder(**SIZES, positions=10, head=head, classes=3)
  params = random_params(model, IDS)
  method = prompt_tuning(length=3, init='ids', ids=FRONT)
  theta = peftjax.init(method, jax.random.key(0), peftjax.describe(
      model, IDS), params)
  ids, mask = longer(IDS, MASK)
  got, _ = jit(lambda p, t: peftjax.apply(model, method, p, t, IDS, MASK))(
      params, theta)
  if head in ('pool', 'mean'):
    body = {n: v for n, v in params.items() if n != 'head'}
    h = MODELS['bert'].apply({'params': body}, ids, mask)[:, 3:]
    want = (h * MASK[..., None]).sum(1) / MASK.sum(1, keepdims=True)
    if head == 'mean':
      out = params['head']['out']
      want = want @ out['kernel'] + out['bias']
  else:
    want = model.apply({'params': params}, ids, mask)
    want = want if head == 'classify' else want[:, 3:]
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ['bert', 'gpt2'])
def test_padding_is_not_seen(name, random_params):
  model = MODELS[name]
  params = random_params(model, IDS)
  method = prompt_tuning(length=2)
  theta = peftjax.init(method, jax.random.key(0), peftjax.describe(
      model, IDS), params)
  run = lambda ids, mask: peftjax.apply(
      model, method, params, theta, ids, mask)[0]
  got = run(IDS, MASK)
  np.testing.assert_allclose(got[MASK], run(np.where(MASK, IDS, 0), MASK)[MASK],
                             rtol=0, atol=1e-6)
  np.testing.assert_allclose(got[1, :4], run(IDS[1:2, :4], None)[0], rtol=0,
                             atol=1e-5)


def test_starts(random_params):
  model = MODELS['gpt2']
  params = random_params(model, IDS)
  sites, table = peftjax.describe(model, IDS), params['tokens']['embedding']
  def start(key=0, **kwargs):
    theta = peftjax.init(prompt_tuning(**kwargs), jax.random.key(key), sites,
                         params)
    return np.asarray(theta['prompt_tuning']['']['prompt'])
  drawn = start(length=2000)
  assert drawn.shape == (2000, 8) and drawn.min() >= 0 and drawn.max() < 0.01
  np.testing.assert_allclose(drawn.mean(), 0.005, rtol=0.02)
  for frequent, rows in ((0, 31), (4, 4), (5000, 31)):
    rows_of = start(length=300, init='sample_vocab', frequent=frequent)
    found = {int(np.flatnonzero((table == r).all(1))[0]) for r in rows_of}
    assert found == set(range(rows))
  assert (start(length=9, init='sample_vocab')
          != start(1, length=9, init='sample_vocab')).any()
  ids = dict(init='ids', ids=[7, 8, 9])
  np.testing.assert_array_equal(
      start(length=5, **ids), table[np.array([7, 8, 9, 7, 8])])
  np.testing.assert_array_equal(start(length=2, **ids), table[7:9])


def test_a_checkpoint_of_words_is_not_needed_for_random_starts():
  assert prompt_tuning().reads is None
  with pytest.raises(ValueError, match="no nn.Embed.*init='random'"):
    prompt_tuning(init='sample_vocab').reads({})


@pytest.mark.parametrize('kwargs, match', [
    (dict(length=0), 'length=0: expected a whole number from 1'),
    (dict(length=2.5), 'length=2.5'),
    (dict(init='text'), "init='text'; choose from ids, random, sample_vocab"),
    (dict(init='ids'), "ids=None with init='ids'"),
    (dict(ids=[3]), r"ids=\[3\] with init='random'"),
    (dict(init='ids', ids=['a']), "ids=\\('a',\\)"),
    (dict(frequent=-1), 'frequent=-1'),
])
def test_bad_hyperparameters(kwargs, match):
  with pytest.raises(ValueError, match=match):
    prompt_tuning(**kwargs)


def start(model, method, *args):
  params = jax.eval_shape(model.init, jax.random.key(0), *args)['params']
  return jax.eval_shape(lambda p: peftjax.init(
      method, jax.random.key(0), peftjax.describe(model, *args), p), params)


def test_bad_places():
  images = np.zeros((1, 8, 8, 3), np.float32)
  vit = ViT(width=8, depth=1, heads=2, mlp_dim=8)
  with pytest.raises(ValueError, match='model_of_text matches no site'):
    start(vit, prompt_tuning(), images)
  with pytest.raises(ValueError, match=r"'' \(ViT\) has no hook embed\(ids\)"):
    start(vit, prompt_tuning(sites=peftjax.select(path='^$')), images)
  with pytest.raises(ValueError, match=r'ids \[31, -2\] .*vocabulary, 0 to 30'):
    start(MODELS['gpt2'], prompt_tuning(init='ids', ids=[3, 31, -2]), IDS)


@pytest.mark.parametrize('name, match', [
    ('bert', '11 tokens, 4 of them of a prompt: expected at most 10'),
    ('roberta', '14 tokens, 7 of them of a prompt.* at most 10'),
    ('gpt2', '1025 tokens, .*prompts.* 1024 learned positions')])
def test_positions_run_out(name, match):
  model, method = MODELS[name], prompt_tuning(
      length=dict(bert=4, roberta=7, gpt2=1018)[name])
  params = jax.eval_shape(model.init, jax.random.key(0), IDS)['params']
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(
        lambda p, t: peftjax.apply(model, method, p, t, IDS)[0], params,
        start(model, method, IDS))


@pytest.mark.parametrize('position', ['learned', 'rotary'])
def test_generation_puts_it_in_front_once(position, random_params, generated):
  model = Decoder(**SIZES, position=position, max_positions=14, scan=True,
                  tied=False)
  params = random_params(model, IDS)
  method = prompt_tuning(length=3, init='sample_vocab')
  theta = peftjax.init(method, jax.random.key(0), peftjax.describe(
      model, IDS), params)
  generated(model, params, method, theta)


CASES = [('bert', 'SEQ_CLS'), ('bert', 'TOKEN_CLS'), ('roberta', 'SEQ_CLS'),
         ('gpt2', 'CAUSAL_LM'), ('llama', 'CAUSAL_LM'), ('t5', 'SEQ_2_SEQ_LM')]


@pytest.mark.parametrize('name, task', CASES)
def test_equals_peft(name, task, pair, under_peft, agree, greedy):
  peft = pytest.importorskip('peft')
  pair = pair(name, task)
  theirs = under_peft(pair, peft.PromptTuningConfig(
      task_type=task, num_virtual_tokens=4, num_transformer_submodules=1))
  method = prompt_tuning(length=4)
  theta = agree(pair, theirs, method, lambda encoder, get: {
      '': dict(prompt=get(encoder.embedding.weight))})
  if task == 'CAUSAL_LM':
    greedy(pair, theirs, method, theta)
