"""T5 and Flan-T5 checkpoints against transformers, both ways."""

import json

import jax
import numpy as np
import peftjax
from peftjax.generate import generate
from peftjax.interop import encdec as interop
from peftjax.interop import huggingface
from peftjax.models import encdec_block
import pytest
import safetensors.numpy

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

SMALL = dict(vocab_size=50, d_model=16, d_kv=6, d_ff=20, num_layers=2,
             num_heads=2, decoder_start_token_id=0, eos_token_id=36)
CASES = {
    't5': dict(num_decoder_layers=1),
    'flan': dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False),
    'silu': dict(feed_forward_proj='gated-silu', num_layers=1,
                 relative_attention_num_buckets=9,
                 relative_attention_max_distance=11),
}
RNG = np.random.RandomState(0)
IDS = RNG.randint(2, 50, (3, 20))
MASK = np.ones((3, 20), bool)
MASK[0, 12:] = MASK[1, :3] = False  # padding on either side
TARGETS = RNG.randint(2, 50, (3, 9))
TARGET_MASK = np.ones((3, 9), bool)
TARGET_MASK[1, 6:] = False


def make(case, folder, seed=0):
  torch.manual_seed(seed)
  torch.set_num_threads(1)
  config = transformers.T5Config(**SMALL | CASES[case])
  model = transformers.T5ForConditionalGeneration(config).eval()
  if not config.scale_decoder_outputs:
    model.lm_head.weight = torch.nn.Parameter(0.5 * torch.randn(50, 16))
  for name, p in model.named_parameters():
    if 'norm' in name:  # A scale that is left out must change the output.
      p.data += 0.3 * torch.randn_like(p)
  model.save_pretrained(folder)
  return model


def run_torch(model):
  with torch.no_grad():
    out = model(
        input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK),
        decoder_input_ids=torch.tensor(TARGETS),
        decoder_attention_mask=torch.tensor(TARGET_MASK),
        output_hidden_states=True)
  return [x.numpy() for x in (out.logits, out.decoder_hidden_states[-1],
                              out.encoder_last_hidden_state)]


@pytest.mark.parametrize('case', CASES)
def test_equals_transformers_and_back(case, tmp_path):
  theirs = make(case, tmp_path / 'theirs')
  want = run_torch(theirs)
  scan = case == 'flan'
  model, params, config = huggingface.load(
      tmp_path / 'theirs', scan=scan, remat=scan)
  body, kept, _ = huggingface.load(tmp_path / 'theirs', head=None, scan=scan)
  assert ('lm_head' in params) == (case == 'flan') and 'lm_head' not in kept

  @jax.jit
  def run(params, kept):
    encoded = model.apply({'params': params}, IDS, MASK, method='encode')
    logits = model.apply({'params': params}, TARGETS, encoded, MASK,
                         TARGET_MASK, method='decode')
    hidden = body.apply({'params': kept}, IDS, TARGETS, MASK, TARGET_MASK)
    return logits, hidden, encoded

  for got, wanted, real in zip(
      run(params, kept), want, (TARGET_MASK, TARGET_MASK, MASK)):
    assert np.abs(wanted[real]).max() > 1
    np.testing.assert_allclose(got[real], wanted[real], rtol=0, atol=1e-4)

  huggingface.save(tmp_path / 'ours', model, params, model_type='t5')
  again, info = transformers.T5ForConditionalGeneration.from_pretrained(
      tmp_path / 'ours', output_loading_info=True)
  assert not any(info.values()), info
  np.testing.assert_allclose(
      run_torch(again.eval())[0], want[0], rtol=0, atol=1e-4)
  assert again.config.decoder_start_token_id == 0
  huggingface.save(tmp_path / 'like', model, params, like=config)
  assert json.loads((tmp_path / 'like' / 'config.json').read_text())[
      'eos_token_id'] == 36

  huggingface.save(tmp_path / 'body', body, kept, model_type='t5')
  again, info = transformers.T5Model.from_pretrained(
      tmp_path / 'body', output_loading_info=True)
  assert not any(info.values()), info


@pytest.mark.parametrize('case', ['t5', 'flan'])
def test_greedy_generation_token_by_token(case, tmp_path):
  seed = dict(t5=1, flan=3)[case]
  theirs = make(case, tmp_path, seed)
  ids, mask = np.tile(IDS, (2, 1)), np.ones((6, 20), bool)
  ids[3:] = RNG.permutation(50)[:20]
  ids[4:, 0] = (2, 3)
  mask[0, 12:] = mask[1, 5:] = False
  want = theirs.generate(
      input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long(),
      max_new_tokens=24, do_sample=False, num_beams=1).numpy()[:, 1:]
  model, params, _ = huggingface.load(tmp_path, scan=True)
  got = np.asarray(generate(model, params, ids, mask, 24, stop_tokens=(36,)))
  np.testing.assert_array_equal(got[:, :want.shape[1]], want)
  assert (got[:, want.shape[1]:] == 0).all()
  assert len({tuple(row) for row in want}) > 2
  if case == 'flan':  # Some texts end, some do not.
    assert 0 < (want == 36).any(axis=1).sum() < 6


@pytest.mark.parametrize('count, furthest', [
    (32, 128), (9, 11), (32, 20), (64, 1000)])
@pytest.mark.parametrize('both', [True, False])
def test_buckets_of_distances(count, furthest, both):
  there = transformers.models.t5.modeling_t5.T5Attention
  distance = np.arange(-2 * furthest, 2 * furthest + 1)
  want = there._relative_position_bucket(  # pylint: disable=protected-access
      torch.tensor(distance), both, count, furthest).numpy()
  got = np.asarray(encdec_block.buckets(distance, count, furthest, both))
  np.testing.assert_array_equal(got, want)
  assert len(set(got)) > count // 2 - 2


# ------------------------------------------------------------- tied tensors
def rewrite(folder, change, **config):
  """Changes a saved folder: its tensors by `change`, and keys of its config."""
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_a_copy_of_the_table_as_head_is_left_out(tmp_path):
  make('t5', tmp_path)
  rewrite(tmp_path, lambda t: t.update(
      {'lm_head.weight': t['shared.weight'].copy()}))
  _, params, _ = huggingface.load(tmp_path)
  assert 'lm_head' not in params


def test_another_head_than_the_config_says(tmp_path):
  make('t5', tmp_path)
  rewrite(tmp_path, lambda t: t.update(
      {'lm_head.weight': t['shared.weight'] + 1}))
  with pytest.raises(ValueError, match='lm_head.weight and shared.weight diff'):
    huggingface.load(tmp_path)


def test_an_older_config_has_its_head_untied(tmp_path):
  theirs = make('flan', tmp_path)
  path = tmp_path / 'config.json'
  config = json.loads(path.read_text())
  del config['scale_decoder_outputs']
  path.write_text(json.dumps(config | dict(tie_word_embeddings=False)))
  model, params, _ = huggingface.load(tmp_path)
  assert not model.tied
  np.testing.assert_array_equal(
      params['lm_head']['kernel'].T, theirs.lm_head.weight.detach().numpy())


def test_an_untied_head_that_was_written_while_tied(tmp_path):
  make('flan', tmp_path)
  rewrite(tmp_path, lambda t: t.pop('lm_head.weight'))
  _, params, _ = huggingface.load(tmp_path)
  np.testing.assert_array_equal(
      params['lm_head']['kernel'].T, params['tokens']['embedding'])
  rewrite(tmp_path, lambda t: None, architectures=['T5Model'])
  with pytest.raises(ValueError, match='missing lm_head.weight'):
    huggingface.load(tmp_path, head='lm')


def test_the_table_under_its_other_name(tmp_path):
  theirs = make('t5', tmp_path)
  rewrite(tmp_path, lambda t: t.update(
      {'encoder.embed_tokens.weight': t.pop('shared.weight')}))
  _, params, _ = huggingface.load(tmp_path)
  np.testing.assert_array_equal(
      params['tokens']['embedding'], theirs.shared.weight.detach().numpy())


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize('kwargs, message', [
    (dict(feed_forward_proj='gated-gelo'), "did you mean 'gated-gelu'"),
    (dict(feed_forward_proj='double-relu'), "feed_forward_proj is 'double-re"),
    (dict(relative_attention_num_buckets=2), 'buckets=2'),
])
def test_settings_that_are_not_supported(kwargs, message):
  with pytest.raises(ValueError, match=message):
    model = interop.build(dict(model_type='t5') | kwargs)
    peftjax.describe(model, IDS, TARGETS)


def test_heads_that_an_encoder_decoder_has_not():
  with pytest.raises(ValueError, match="head 'classify'"):
    interop.build(dict(model_type='t5'), head='classify')
  with pytest.raises(ValueError, match='classes=3'):
    interop.build(dict(model_type='t5'), classes=3)


def test_an_activation_without_a_name_in_config():
  model = interop.build(dict(model_type='t5', feed_forward_proj='gated-gelu'))
  with pytest.raises(ValueError, match="'gated-gelu' means 'gelu_new'"):
    interop.export(model.clone(act='gelu'), 't5')
