"""Decoders against transformers: outputs, both ways through files."""

import functools

import jax
import numpy as np
import pytest

from peftjax.generate import generate
from peftjax.interop import decoder
from peftjax.interop import huggingface
from peftjax.models.decoder import Decoder

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

_SIZES = dict(
    vocab_size=89, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2)
_LLAMA3 = dict(rope_type='llama3', factor=8., low_freq_factor=1.,
               high_freq_factor=4., original_max_position_embeddings=16,
               rope_theta=1000.)
_EXPERTS = dict(num_experts_per_tok=2)

CONFIGS = {
    'gpt2': lambda: transformers.GPT2Config(
        vocab_size=89, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2),
    'llama2': lambda: transformers.LlamaConfig(
        **_SIZES | dict(num_key_value_heads=4), attention_bias=True,
        mlp_bias=True),
    'llama3': lambda: transformers.LlamaConfig(
        **_SIZES, rope_parameters=_LLAMA3, tie_word_embeddings=True,
        rms_norm_eps=1e-5),
    'mistral': lambda: transformers.MistralConfig(
        **_SIZES, sliding_window=4, head_dim=16),
    'qwen2': lambda: transformers.Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=4,
        max_window_layers=1),
    'qwen3': lambda: transformers.Qwen3Config(
        **_SIZES, head_dim=16, tie_word_embeddings=True),
    'gemma2': lambda: transformers.Gemma2Config(
        **_SIZES, head_dim=16, sliding_window=4, query_pre_attn_scalar=24,
        attn_logit_softcapping=2., final_logit_softcapping=1.5),
    'mixtral': lambda: transformers.MixtralConfig(
        **_SIZES, **_EXPERTS, num_local_experts=4),
    'qwen2_moe': lambda: transformers.Qwen2MoeConfig(
        **_SIZES, **_EXPERTS, num_experts=4, moe_intermediate_size=24,
        shared_expert_intermediate_size=20),
    'qwen3_moe': lambda: transformers.Qwen3MoeConfig(
        **_SIZES, **_EXPERTS, num_experts=4, moe_intermediate_size=24,
        norm_topk_prob=True),
}


@pytest.fixture(autouse=True)
def _one_thread():
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


def randomise(model, seed=0):
  """Larger weights than at the start, so that every part shows."""
  rng = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      width = 0.3 if p.ndim == 1 else 0.25
      if 'embed' in name or 'wte' in name:
        width = 0.05  # A larger tied table repeats the last token for ever.
      p.add_(width * torch.randn(p.shape, generator=rng))
  return model.eval()


def batch():
  rng = np.random.default_rng(0)
  ids = rng.integers(3, 89, (2, 11)).astype(np.int32)
  mask = np.ones_like(ids)
  mask[1, 7:] = 0
  ids[1, 7:] = 0
  return ids, mask


def theirs(model, ids, mask):
  out = model(input_ids=torch.tensor(ids, dtype=torch.long),
              attention_mask=torch.tensor(mask), output_hidden_states=True)
  return out.logits.detach().numpy(), out.hidden_states[-1].detach().numpy()


@pytest.fixture(scope='module', params=CONFIGS)
def checkpoint(request, tmp_path_factory):
  """(their model, its folder) of each configuration."""
  torch.manual_seed(0)
  there = randomise(transformers.AutoModelForCausalLM.from_config(
      CONFIGS[request.param](), attn_implementation='eager'))
  folder = tmp_path_factory.mktemp(request.param)
  there.save_pretrained(folder)
  return there, folder


def test_language_model(checkpoint, tmp_path):
  there, folder = checkpoint
  ids, mask = batch()
  logits, hidden = theirs(there, ids, mask)
  model, params, read = huggingface.load(folder)
  body = model.clone(head=None)

  @jax.jit
  def ours(params):  # The layers are compiled once.
    inner = {n: v for n, v in params.items() if n != 'head'}
    return (model.apply({'params': params}, ids, mask),
            body.apply({'params': inner}, ids, mask))

  real = mask.astype(bool)
  for mine, want in zip(ours(params), (logits, hidden)):
    assert np.abs(want[real]).max() > 0.1
    np.testing.assert_allclose(mine[real], want[real], atol=1e-4, rtol=0)

  huggingface.save(tmp_path / 'ours', model, params, like=read)
  again, info = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'ours', output_loading_info=True, attn_implementation='eager')
  assert not any(info.values()), info
  assert type(again) is type(there)
  np.testing.assert_array_equal(
      theirs(again.eval(), ids, mask)[0][real], logits[real])
  # Nothing of the settings hangs on `like`.
  alone = decoder.export(model, read['model_type'])
  assert decoder.build(alone, head='lm') == decoder.build(read, head='lm')


def test_greedy_generation(checkpoint):
  there, folder = checkpoint
  ids, mask = batch()
  # Theirs needs padding on the left.
  ids[1], mask[1] = np.roll(ids[1], 4), np.roll(mask[1], 4)
  there.generation_config.eos_token_id = None  # Random models stop anywhere.
  want = there.generate(
      torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask),
      max_new_tokens=12, do_sample=False).numpy()[:, ids.shape[1]:]
  model, params, _ = huggingface.load(folder, scan=True)
  ours = generate(model, params, ids, mask, 12)
  np.testing.assert_array_equal(ours, want)
  assert len(np.unique(want)) > 4


@pytest.mark.parametrize('head', ('classify', 'tag'))
@pytest.mark.parametrize('name', ('gpt2', 'mistral'))
def test_classifier(name, head, tmp_path):
  config = CONFIGS[name]()
  config.num_labels = 3
  torch.manual_seed(0)
  auto = dict(classify=transformers.AutoModelForSequenceClassification,
              tag=transformers.AutoModelForTokenClassification)[head]
  there = randomise(auto.from_config(config, attn_implementation='eager'))
  there.save_pretrained(tmp_path / 'theirs')
  ids, mask = batch()
  want = there(input_ids=torch.tensor(ids, dtype=torch.long),
               attention_mask=torch.tensor(mask)).logits.detach().numpy()
  model, params, read = huggingface.load(tmp_path / 'theirs')
  assert model.head == head and model.classes == 3
  run = jax.jit(lambda *a: model.apply({'params': params}, *a))
  compare = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=0)
  if head == 'tag':
    real = mask.astype(bool)
    compare(run(ids, mask)[real], want[real])
  else:  # On the left, too: the last real token is the same.
    shifted = ids.copy(), mask.copy()
    for a in shifted:
      a[1] = np.roll(a[1], 4)
    for inputs in ((ids, mask), shifted):
      compare(run(*inputs), want)
  huggingface.save(tmp_path / 'ours', model, params, like=read)
  out = 'classifier.weight' if (name, head) == ('gpt2', 'tag') else (
      'score.weight')
  again, info = auto.from_pretrained(
      tmp_path / 'ours', output_loading_info=True)
  assert not any(info.values()), info
  assert again.config.num_labels == 3
  np.testing.assert_array_equal(
      again.state_dict()[out], there.state_dict()[out])
  assert type(again) is type(there)


def test_new_head_on_a_language_model(tmp_path):
  there = transformers.AutoModelForCausalLM.from_config(CONFIGS['mistral']())
  there.save_pretrained(tmp_path)
  _, params, _ = huggingface.load(tmp_path, head='classify', classes=5)
  assert params['head']['kernel'].shape == (32, 5)
  assert not params['head']['kernel'].any()
  body = huggingface.load(tmp_path, head=None).params
  np.testing.assert_array_equal(
      body['tokens']['embedding'],
      there.model.embed_tokens.weight.detach().numpy())


def llama(**kwargs):
  return dict(_SIZES, model_type='llama', **kwargs)


def test_older_keys_of_rotary_positions():
  old = {'type': 'linear', 'factor': 4.}
  model = decoder.build(llama(rope_theta=5e5, rope_scaling=old))
  assert model.rope_theta == 5e5
  assert dict(model.rope_scaling) == {'rope_type': 'linear', 'factor': 4.}


@pytest.mark.parametrize('change, message', [
    (dict(hidden_act='mish'), "hidden_act is 'mish'"),
    (dict(rope_scaling={'rope_type': 'yarn', 'factor': 2.}), "'yarn'"),
    (dict(rope_scaling={'rope_type': 'llama3', 'factor': 2.}),
     'low_freq_factor'),
    (dict(partial_rotary_factor=0.5), 'partial_rotary_factor is 0.5'),
    (dict(hidden_size=None), 'hidden_size'),
    (dict(model_type='qwen3_moe', decoder_sparse_step=2),
     'decoder_sparse_step is 2'),
    (dict(model_type='gemma2', layer_types=['sliding_attention', 'chunked'],
          sliding_window=4), 'chunked'),
])
def test_unsupported_settings_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    decoder.build(llama() | change)


def test_export_refuses_what_a_type_cannot_say():
  for kwargs, name in ((dict(qk_norm=True), 'qk_norm=True'),
                       (dict(windows=(3, 3)), r'windows=\(3, 3\)'),
                       (dict(scale=0.5), 'scale=0.5'),
                       (dict(qkv_bias=True), 'qkv_bias=True')):
    with pytest.raises(ValueError, match=name):
      decoder.export(Decoder(**kwargs), 'llama')
  assert decoder.export(Decoder(), 'llama')['num_key_value_heads'] == 4


def test_windows_by_the_rule_of_each_type():
  sizes = dict(_SIZES, num_hidden_layers=4, sliding_window=7)
  windows = lambda **kwargs: decoder.build(sizes | kwargs).windows
  sliding = dict(use_sliding_window=True, max_window_layers=3)
  assert windows(model_type='mistral') == (7, 7, 7, 7)
  assert windows(model_type='gemma2') == (7, 0, 7, 0)
  assert windows(model_type='qwen2') is None
  assert windows(model_type='qwen2', **sliding) == (0, 0, 0, 7)
  for name, cls in (('mistral', 'Mistral'), ('gemma2', 'Gemma2'),
                    ('qwen2', 'Qwen2'), ('qwen2_moe', 'Qwen2Moe')):
    config = getattr(transformers, cls + 'Config')(
        **sizes, **(sliding if 'qwen' in name else {}))
    if not hasattr(config, 'layer_types'):
      continue
    ours = windows(model_type=name, **(sliding if 'qwen' in name else {}),
                   num_experts=2)
    assert [bool(w) for w in ours] == [
        t == 'sliding_attention' for t in config.layer_types], name
