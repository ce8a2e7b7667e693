"""ViT, DeiT and DINOv2 against transformers, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.interop import huggingface
from peftjax.interop import vit
from peftjax.models.vit import bicubic

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
             image_size=16, patch_size=4, layer_norm_eps=1e-3)
VIT = ('ViT', dict(SIZES, intermediate_size=20))
BARE = ('ViT', dict(SIZES, intermediate_size=20, qkv_bias=False,
                    hidden_act='gelu_new'))
DEIT = ('DeiT', dict(SIZES, intermediate_size=20, hidden_act='relu'))
DINO = ('Dinov2', dict(SIZES, mlp_ratio=2))
GATED = ('Dinov2', dict(SIZES, mlp_ratio=3, use_swiglu_ffn=True))
REGISTERS = ('Dinov2WithRegisters', dict(
    SIZES, mlp_ratio=2, num_register_tokens=3))
BODY, HEAD = 'Model', 'ForImageClassification'
CASES = [(VIT, BODY), (VIT, HEAD), (BARE, HEAD), (DEIT, BODY), (DEIT, HEAD),
         (DEIT, HEAD + 'WithTeacher'), (DINO, BODY), (DINO, HEAD),
         (GATED, HEAD), (REGISTERS, BODY), (REGISTERS, HEAD)]


@pytest.fixture(scope='module')
def torch():
  module = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  module.set_num_threads(1)
  return module


def theirs(torch, family, ending):
  """A random transformers model; nothing of it at zero or one."""
  import transformers  # an extra: only these tests need it
  name, sizes = family
  labels = dict(num_labels=3) if ending != BODY else {}
  config = getattr(transformers, f'{name}Config')(**sizes, **labels)
  cls = getattr(transformers, name + ending)
  # Nothing here reads the pooler.
  pooler = ending == BODY and name in ('ViT', 'DeiT')
  options = dict(add_pooling_layer=False) if pooler else {}
  torch.manual_seed(0)
  model = cls(config, **options).eval()
  with torch.no_grad():
    for p in model.parameters():
      p += 0.3 * torch.randn_like(p)
  return model, lambda path: cls.from_pretrained(
      path, output_loading_info=True, **options)


def images(high, wide=None):
  rng = np.random.default_rng(0)
  return rng.normal(size=(2, high, wide or high, 3)).astype(np.float32)


def run(torch, model, x, **options):
  with torch.no_grad():
    out = model(torch.tensor(x.transpose(0, 3, 1, 2).copy()), **options)
  return (out.logits if hasattr(out, 'logits') else out[0]).numpy()


def near(got, want):
  assert got.shape == want.shape and np.abs(want).max() > 0.3
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize('family, ending', CASES,
                         ids=[f'{f[0]}{e}' for f, e in CASES])
def test_equals_transformers_both_ways(torch, tmp_path, family, ending):
  source, reload = theirs(torch, family, ending)
  source.save_pretrained(tmp_path / 'a')
  model, params, config = huggingface.load(tmp_path / 'a')
  assert model.head == (None if ending == BODY else 'classify')
  x = images(16)
  want = run(torch, source, x)
  got = jax.jit(model.apply)({'params': params}, x)
  assert got.dtype == jnp.float32
  near(got, want)

  # With what this family's module says alone, not with `like`.
  huggingface.save(tmp_path / 'b', model, params,
                   model_type=config['model_type'])
  again, info = reload(tmp_path / 'b')
  assert not any(info.values()), info
  near(run(torch, again.eval(), x), want)
  assert type(again).__name__ == json.loads(
      (tmp_path / 'b' / 'config.json').read_text())['architectures'][0]


def test_features_scanned_as_transformers(torch, tmp_path):
  """What a head reads, from a file whose own head is left out."""
  source, _ = theirs(torch, DINO, HEAD)
  source.save_pretrained(tmp_path)
  model, params, _ = huggingface.load(
      tmp_path, head='pool', scan=True, remat=True)
  assert 'head' not in params and 'blocks' in params
  x = images(16)
  h = run(torch, source.dinov2, x)
  near(jax.jit(model.apply)({'params': params}, x),
       np.concatenate([h[:, 0], h[:, 1:].mean(1)], axis=-1))


@pytest.mark.parametrize('family', [VIT, DEIT, DINO],
                         ids=['ViT', 'DeiT', 'DINOv2'])
def test_other_image_sizes_interpolate_the_positions(torch, tmp_path, family):
  source, _ = theirs(torch, family, BODY)
  source.save_pretrained(tmp_path)
  model, params, _ = huggingface.load(tmp_path)
  options = {} if family is DINO else dict(interpolate_pos_encoding=True)
  x = images(28, 12)
  near(jax.jit(model.apply)({'params': params}, x),
       run(torch, source, x, **options))


def test_bicubic_is_torchs(torch):
  x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
  want = torch.nn.functional.interpolate(
      torch.tensor(x)[None, None], size=(8, 2), mode='bicubic')[0, 0].numpy()
  np.testing.assert_allclose(bicubic(5, 8) @ x @ bicubic(3, 2).T, want,
                             atol=1e-5)


@pytest.mark.parametrize('changes, match', [
    (dict(hidden_act='mish'), "hidden_act is 'mish'.*gelu"),
    (dict(num_channels=1), 'num_channels is 1: only 3'),
    (dict(patch_size=[4, 8]), r'patch_size is \[4, 8\]: expected one number'),
    (dict(head_dim=3), 'head_dim is 3: expected .*= 64'),
])
def test_settings_that_are_not_supported(changes, match):
  with pytest.raises(ValueError, match=match):
    vit.build(dict(model_type='vit', **changes))


def test_settings_that_files_leave_out_are_transformers_defaults():
  transformers = pytest.importorskip('transformers')
  for model_type in vit.MODEL_TYPES:
    whole = transformers.AutoConfig.for_model(model_type).to_dict()
    assert vit.build(dict(model_type=model_type)) == vit.build(whole)


def test_sizes_of_two_sides():
  config = dict(model_type='vit', image_size=[32, 48], patch_size=[16, 16])
  model = vit.build(config)
  assert (model.image, model.patch) == ((32, 48), 16)
  assert vit.export(model, 'vit')['image_size'] == [32, 48]
  shape = jax.eval_shape(model.init, jax.random.key(0),
                         jnp.zeros((1, 32, 48, 3)))['params']['pos'].shape
  assert shape == (1, 1 + 2 * 3, 768)


def test_models_that_have_no_config():
  model = vit.build(dict(model_type='dinov2', hidden_size=8))
  for bad, match in [(dict(mlp_dim=13), 'mlp_dim 13: dinov2 .* 8, alone'),
                     (dict(image=None), 'image is None')]:
    with pytest.raises(ValueError, match=match):
      vit.export(model.clone(**bad), 'dinov2')
