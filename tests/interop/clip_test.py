"""CLIP checkpoints against transformers, both ways."""

import jax
import numpy as np
from peftjax.interop import clip as interop
from peftjax.interop import huggingface
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TEXT = dict(vocab_size=50, hidden_size=16, intermediate_size=20,
            num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=12, bos_token_id=0, pad_token_id=1)
IMAGE = dict(hidden_size=24, intermediate_size=20, num_hidden_layers=3,
             num_attention_heads=3, image_size=14, patch_size=4)
# Older checkpoints name a wrong end-of-text token, 2; theirs has the largest
# id. Later ones may have larger ids.
CASES = {
    'older': (dict(eos_token_id=2), dict(), 49),
    'newer': (dict(eos_token_id=30, hidden_act='gelu'),
              dict(hidden_act='gelu', layer_norm_eps=1e-4), 30),
}
RNG = np.random.RandomState(0)
LENGTHS = (9, 5, 7, 3)
IMAGES = RNG.normal(size=(3, 14, 14, 3)).astype(np.float32)


def texts(end):
  ids, mask = RNG.randint(3, 29, (4, 9)), np.ones((4, 9), bool)
  if end != 49:
    ids[:, 1] = 40  # larger than the end, and not it
  for row, n in enumerate(LENGTHS):
    ids[row, n - 1], ids[row, n:], mask[row, n:] = end, 1, False
  return ids, mask


def make(case, folder):
  text, image, _ = CASES[case]
  torch.manual_seed(0)
  torch.set_num_threads(1)
  model = transformers.CLIPModel(transformers.CLIPConfig(
      text_config=TEXT | text, vision_config=IMAGE | image,
      projection_dim=10)).eval()
  for name, p in model.named_parameters():
    if p.ndim < 2:  # Biases and scales: left out, they must change the output.
      p.data += 0.3 * torch.randn_like(p)
    elif 'proj' in name:
      p.data *= 3
  model.save_pretrained(folder)
  return model


def run_torch(model, ids, mask):
  with torch.no_grad():
    out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
                pixel_values=torch.tensor(IMAGES.transpose(0, 3, 1, 2)))
  return [x.numpy() for x in (
      out.logits_per_image, out.text_embeds, out.image_embeds,
      out.text_model_output.last_hidden_state,
      out.vision_model_output.last_hidden_state)]


@pytest.mark.parametrize('case', CASES)
def test_equals_transformers_and_back(case, tmp_path):
  theirs = make(case, tmp_path / 'theirs')
  ids, mask = texts(CASES[case][-1])
  want = run_torch(theirs, ids, mask)
  scan = case == 'newer'
  model, params, _ = huggingface.load(
      tmp_path / 'theirs', scan=scan, remat=scan)
  assert model.end == (30 if case == 'newer' else None)

  @jax.jit
  def run(params):
    call = lambda *args, method=None: model.apply(
        {'params': params}, *args, method=method)
    return (call(ids, IMAGES, mask), call(ids, mask, method='text'),
            call(IMAGES, method='image'),
            call(method=lambda m: m.text_tower.hidden(ids, mask)),
            call(method=lambda m: m.image_tower.hidden(IMAGES)))

  got = [np.array(x) for x in run(params)]
  for x in (got, want):
    x[3] = x[3][mask]
  for a, b in zip(got, want, strict=True):
    assert np.abs(b).max() > 0.3
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
  assert np.ptp(want[0]) > 0.5

  huggingface.save(tmp_path / 'ours', model, params, model_type='clip')
  again, info = transformers.CLIPModel.from_pretrained(
      tmp_path / 'ours', output_loading_info=True)
  assert not any(info.values()), info
  np.testing.assert_allclose(
      run_torch(again.eval(), ids, mask)[0], want[0], rtol=0, atol=1e-4)


def test_older_settings_replace_the_newer():
  config = dict(text_config=dict(hidden_size=16), vision_config=None,
                text_config_dict=dict(hidden_size=24, num_attention_heads=3),
                vision_config_dict=dict(patch_size=16))
  model = interop.build(config)
  assert model.text_sizes.width == 24 and model.text_sizes.heads == 3
  assert model.image_sizes.width == 768 and model.patch == 16
  config |= dict(text_config_dict=None)
  assert interop.build(config).text_sizes.width == 16


@pytest.mark.parametrize('kwargs, message', [
    (dict(text_config=dict(hidden_act='gelo')), "text_config.hidden_act is 'g"),
    (dict(vision_config=dict(num_channels=1)), 'num_channels is 1'),
    (dict(vision_config=dict(patch_size=[4, 8])), r'patch_size is \[4, 8\]'),
    (dict(text_config=dict(eos_token_id=[1, 2])), r'eos_token_id is \[1, 2\]'),
])
def test_settings_that_are_not_supported(kwargs, message):
  with pytest.raises(ValueError, match=message):
    interop.build(kwargs)


def test_heads_that_clip_has_not():
  with pytest.raises(ValueError, match="head='classify', classes=3"):
    interop.build({}, head='classify', classes=3)
