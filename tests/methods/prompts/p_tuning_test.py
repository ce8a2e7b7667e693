"""P-tuning: the prompt that its network makes, and PEFT."""

import jax
import numpy as np
import pytest

import peftjax
from peftjax.methods.prompts.p_tuning import p_tuning
from peftjax.methods.prompts.prompt_tuning import prompt_tuning
from peftjax.models.decoder import Decoder
from peftjax.models.vit import ViT

IDS = np.random.default_rng(0).integers(3, 31, (3, 7)).astype(np.int32)
MODEL = Decoder(vocab=31, width=8, depth=2, heads=2, mlp_dim=12, scan=True,
                tied=False)


def made(method, params):
  return peftjax.init(method, jax.random.key(0), peftjax.describe(MODEL, IDS),
                      params)


def test_is_prompt_tuning_with_what_the_network_makes(random_params):
  params = random_params(MODEL, IDS)
  theta = made(p_tuning(length=3, hidden=5), params)
  t = {n: np.asarray(v, np.float64) for n, v in theta['p_tuning'][''].items()}
  relu = lambda x: np.maximum(x, 0)
  z = relu(relu(t['embedding'] @ t['w1'] + t['b1']) @ t['w2'] + t['b2'])
  prompt = (z @ t['w3'] + t['b3']).astype(np.float32)
  got, _ = peftjax.apply(MODEL, p_tuning(length=3, hidden=5), params, theta,
                         IDS)
  want, _ = peftjax.apply(MODEL, prompt_tuning(length=3), params, {
      'prompt_tuning': {'': dict(prompt=prompt)}}, IDS)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  assert np.abs(got - MODEL.apply({'params': params}, IDS)).max() > 1e-2


def test_starts(random_params):
  params = random_params(MODEL, IDS)
  method = p_tuning(length=2000, hidden=50)
  t = made(method, params)['p_tuning']['']
  assert peftjax.count(t) == method.count(peftjax.describe(MODEL, IDS)['']) == (
      2000 * 8 + 9 * 50 + 51 * 50 + 51 * 8)
  np.testing.assert_allclose(t['embedding'].std(), 1, rtol=0.03)
  for n, fan in (('1', 8), ('2', 50), ('3', 50)):
    for v in (t[f'w{n}'], t[f'b{n}']):
      top = np.abs(v).max() * np.sqrt(fan)
      assert 0.6 < top < 1 + 1e-6
  assert made(p_tuning(length=1), params)['p_tuning']['']['w2'].shape == (8, 8)


def test_generation(random_params, generated):
  params = random_params(MODEL, IDS)
  method = p_tuning(length=3)
  generated(MODEL, params, method, made(method, params))


@pytest.mark.parametrize('kwargs, match', [
    (dict(length=0), 'p_tuning: length=0'), (dict(hidden=0), 'hidden=0'),
    (dict(encoder='lstm'), "encoder='lstm' is not implemented; use 'mlp'"),
    (dict(encoder='gru'), "encoder='gru'; choose from mlp")])
def test_bad_hyperparameters(kwargs, match):
  with pytest.raises(ValueError, match=match):
    p_tuning(**kwargs)


def test_images_are_refused():
  vit = ViT(width=8, depth=1, heads=2, mlp_dim=8)
  sites = peftjax.describe(vit, np.zeros((1, 8, 8, 3), np.float32))
  with pytest.raises(ValueError, match=r"p_tuning: '' \(ViT\) has no hook"):
    peftjax.sites.matched(p_tuning(sites=peftjax.select(path='^$')), sites)


CASES = [('bert', 'SEQ_CLS'), ('gpt2', 'CAUSAL_LM'), ('llama', 'CAUSAL_LM'),
         ('t5', 'SEQ_2_SEQ_LM')]


@pytest.mark.parametrize('name, task', CASES)
def test_equals_peft(name, task, pair, under_peft, agree, greedy):
  peft = pytest.importorskip('peft')
  pair = pair(name, task)
  theirs = under_peft(pair, peft.PromptEncoderConfig(
      task_type=task, num_virtual_tokens=4, num_transformer_submodules=1,
      encoder_hidden_size=6))
  method = p_tuning(length=4, hidden=6)

  def convert(encoder, get):
    t = dict(embedding=get(encoder.embedding.weight))
    for i, layer in enumerate(encoder.mlp_head[::2], 1):
      t |= {f'w{i}': get(layer.weight).T, f'b{i}': get(layer.bias)}
    return {'': t}

  theta = agree(pair, theirs, method, convert)
  if task == 'CAUSAL_LM':
    greedy(pair, theirs, method, theta)
