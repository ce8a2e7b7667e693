"""ResNet and ConvNeXt against transformers; MobileNetV2 against torch."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax import trees
from peftjax.interop import convnet
from peftjax.interop import huggingface
from peftjax.models.mobilenet import MobileNetV2

SIZES = dict(embedding_size=6, hidden_sizes=[8, 16], depths=[2, 1])
BASIC = ('ResNet', dict(SIZES, layer_type='basic', hidden_act='gelu'))
BOTTLENECK = ('ResNet', dict(SIZES, layer_type='bottleneck'))
EARLY = ('ResNet', dict(SIZES, hidden_sizes=[8, 8],
                        downsample_in_bottleneck=True,
                        downsample_in_first_stage=True))
CONVNEXT = ('ConvNext', dict(
    hidden_sizes=[6, 8], depths=[1, 2], num_stages=2, layer_norm_eps=1e-3,
    layer_scale_init_value=0.5))
UNSCALED = ('ConvNext', dict(
    hidden_sizes=[6, 8], depths=[1, 1], num_stages=2, patch_size=2,
    hidden_act='relu', layer_scale_init_value=0.))
CASES = [(BASIC, 'pool'), (BASIC, 'classify'), (BOTTLENECK, None),
         (BOTTLENECK, 'classify'), (EARLY, 'classify'), (CONVNEXT, 'pool'),
         (CONVNEXT, 'classify'), (UNSCALED, 'classify')]


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
  config = getattr(transformers, f'{name}Config')(**sizes, num_labels=3)
  cls = getattr(transformers, name + ending)
  torch.manual_seed(0)
  model = cls(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      # Kernels by their fan in, or the outputs grow with every layer.
      fan_in = max(p[0].numel(), 1) if p.ndim > 1 else 1
      p += 0.3 * torch.randn_like(p) / fan_in ** 0.5
    for n, b in model.named_buffers():
      if n.endswith('running_mean'):
        b.normal_()
      elif n.endswith('running_var'):
        b.uniform_(0.2, 3.)
  return model, lambda path: cls.from_pretrained(
      path, output_loading_info=True)


def run(torch, model, x, head):
  """What our model of that head returns, from transformers'."""
  with torch.no_grad():
    out = model(torch.tensor(x.transpose(0, 3, 1, 2).copy()))
  if head == 'classify':
    return out.logits.numpy()
  if head == 'pool':
    return out.pooler_output.numpy().reshape(len(x), -1)
  return out.last_hidden_state.numpy().transpose(0, 2, 3, 1)


def images(size):
  rng = np.random.default_rng(0)
  return rng.normal(size=(2, size, size + 4, 3)).astype(np.float32)


def near(got, want):
  assert got.shape == want.shape and np.abs(want).max() > 0.3
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize('family, head', CASES,
                         ids=[f'{f[0]}-{h}' for f, h in CASES])
def test_equals_transformers_both_ways(torch, tmp_path, family, head):
  ending = 'ForImageClassification' if head == 'classify' else 'Model'
  source, reload = theirs(torch, family, ending)
  source.save_pretrained(tmp_path / 'a')
  model, params, config = huggingface.load(
      tmp_path / 'a', **{} if head == 'classify' else dict(head=head))
  assert model.head == head
  x = images(21)  # an odd size shows how the sides are padded
  want = run(torch, source, x, head)
  got = jax.jit(model.apply)({'params': params}, x)
  assert got.dtype == jnp.float32
  near(got, want)

  # With what this family's module says alone, not with `like`.
  huggingface.save(tmp_path / 'b', model, params,
                   model_type=config['model_type'])
  again, info = reload(tmp_path / 'b')
  assert not any(info.values()), info
  near(run(torch, again.eval(), x, head), want)
  assert type(again).__name__ == json.loads(
      (tmp_path / 'b' / 'config.json').read_text())['architectures'][0]


def test_features_of_a_file_with_a_head(torch, tmp_path):
  source, _ = theirs(torch, CONVNEXT, 'ForImageClassification')
  source.save_pretrained(tmp_path)
  model, params, _ = huggingface.load(tmp_path, head=None, remat=True)
  x = images(16)
  near(jax.jit(model.apply)({'params': params}, x),
       run(torch, source.convnext, x, None))
  with pytest.raises(ValueError, match='no scanned form; use scan=False'):
    huggingface.load(tmp_path, scan=True)


def test_a_batch_norm_is_an_affine_map():
  stored = {'a.weight': 3., 'a.bias': 5., 'a.running_mean': 2.,
            'a.running_var': 9e-5, 'a.num_batches_tracked': 7, 'b.weight': 1.}
  got, used = convnet.before_load(stored.__getitem__, set(stored), {})
  assert used == {'a.running_mean', 'a.running_var', 'a.num_batches_tracked'}
  assert set(got) == {'a.weight', 'a.bias'}  # 1e-5 is added to the variance
  np.testing.assert_allclose(got['a.weight'], 300, rtol=1e-6)
  np.testing.assert_allclose(got['a.bias'], 5 - 600, rtol=1e-6)


def test_a_batch_norm_without_its_mean():
  stored = dict.fromkeys(('a.weight', 'a.bias', 'a.running_var'), np.ones(2))
  with pytest.raises(ValueError, match="'a' lacks .*'a.running_mean'"):
    convnet.before_load(stored.__getitem__, set(stored), {})


@pytest.mark.parametrize('changes, match', [
    (dict(hidden_act='mish'), "hidden_act is 'mish'.*gelu"),
    (dict(num_channels=1), 'num_channels is 1: only 3'),
    (dict(layer_type='wide'), "layer_type is 'wide': expected 'basic'"),
    (dict(depths=[1]), r'depths \[1\]: expected as many'),
    (dict(model_type='convnext', num_stages=3), 'num_stages is 3: .* 4'),
    (dict(model_type='convnext', patch_size=[4, 4]), r'patch_size is \[4, 4\]'),
])
def test_settings_that_are_not_supported(changes, match):
  with pytest.raises(ValueError, match=match):
    convnet.build(dict(dict(model_type='resnet'), **changes))


def test_settings_that_files_leave_out_are_transformers_defaults():
  transformers = pytest.importorskip('transformers')
  for model_type in convnet.MODEL_TYPES:
    whole = transformers.AutoConfig.for_model(model_type).to_dict()
    assert convnet.build(dict(model_type=model_type)) == convnet.build(whole)


# ------------------------------------------------------------ MobileNetV2

BLOCKS = [(t if j == 0 else 6, c, s if j == 0 else 1)
          for t, c, n, s in [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2),
                             (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
                             (6, 320, 1, 1)] for j in range(n)]


@pytest.fixture(scope='module')
def arrays():
  """An int8 file's arrays with random weights, by the paper's table."""
  rng, out = np.random.default_rng(0), {}

  def layer(name, size, c_in, c_out):
    out[f'{name}.w_int8'] = rng.integers(
        -127, 128, (size, size, c_in, c_out)).astype(np.int8)
    out[f'{name}.scale'] = (
        rng.uniform(1, 2, c_out) / 73 / np.sqrt(size * size * c_in)
    ).astype(np.float32)
    out[f'{name}.b'] = rng.normal(size=c_out).astype(np.float32)

  layer('stem', 3, 3, 32)
  c = 32
  for i, (t, width, _) in enumerate(BLOCKS):
    if t != 1:
      layer(f'block{i}.expand', 1, c, t * c)
    layer(f'block{i}.dw', 3, 1, t * c)
    layer(f'block{i}.project', 1, t * c, width)
    c = width
  layer('head', 1, 320, 1280)
  layer('classifier', 1, 1280, 1001)
  return out


def in_torch(torch, arrays, x):
  """The network's logits by the paper's table, TensorFlow's padding."""
  def layer(x, name, stride=1, groups=1):
    w = torch.tensor(
        arrays[f'{name}.w_int8'] * arrays[f'{name}.scale']).permute(3, 2, 0, 1)
    k, pads = w.shape[-1], []
    for side in (x.shape[3], x.shape[2]):
      total = max((-(-side // stride) - 1) * stride + k - side, 0)
      pads += [total // 2, total - total // 2]
    return torch.nn.functional.conv2d(
        torch.nn.functional.pad(x, pads), w, torch.tensor(arrays[f'{name}.b']),
        stride, groups=groups)

  relu6 = lambda v: v.clamp(0, 6)
  x = relu6(layer(torch.tensor(x.transpose(0, 3, 1, 2).copy()), 'stem', 2))
  for i, (t, width, stride) in enumerate(BLOCKS):
    a = relu6(layer(x, f'block{i}.expand')) if t != 1 else x
    a = relu6(layer(a, f'block{i}.dw', stride, a.shape[1]))
    a = layer(a, f'block{i}.project')
    x = x + a if stride == 1 and x.shape[1] == width else a
  x = relu6(layer(x, 'head')).mean((2, 3), keepdim=True)
  return layer(x, 'classifier')[:, :, 0, 0].numpy()


def checkpoint():
  """The real file, where it is."""
  folder = os.environ.get('PEFTJAX_DATA') or (
      pathlib.Path(__file__).parents[2].parent / 'shared' / 'data')
  return (pathlib.Path(folder) / 'checkpoints' /
          'mobilenet_v2_imagenet_int8.npz')


@pytest.mark.parametrize('real', [False, True], ids=['random', 'real'])
def test_mobilenet_equals_torch(torch, tmp_path, arrays, real):
  path = checkpoint() if real else tmp_path / 'a.npz'
  if not real:
    np.savez(path, **arrays)
  elif not path.is_file():
    pytest.skip(f'{path} is not there; PEFTJAX_DATA names the folder')
  model, params = convnet.load_mobilenet(path)
  if real:
    assert trees.count(params) == 3_489_097 and model.classes == 1001
    with np.load(path) as z:
      arrays = {n: z[n] for n in z.files}
  x = np.random.default_rng(1).uniform(-1, 1, (2, 56, 43, 3)).astype(np.float32)
  near(jax.jit(model.apply)({'params': params}, x), in_torch(torch, arrays, x))


def test_mobilenet_files_that_do_not_fit(tmp_path, arrays):
  path = tmp_path / 'a.npz'
  with pytest.raises(FileNotFoundError, match='a.npz'):
    convnet.load_mobilenet(path)
  path.write_bytes(b'x' * 9)
  with pytest.raises(ValueError, match='a.npz .9 bytes. is no npz file'):
    convnet.load_mobilenet(path)
  bad = dict(arrays)
  bad['block3.dv.b'] = bad.pop('block3.dw.b')
  bad['stem.b'] = bad['stem.b'][:5]
  np.savez(path, **bad)
  with pytest.raises(ValueError) as e:
    convnet.load_mobilenet(path)
  assert sorted(line.strip() for line in str(e.value).splitlines()[1:]) == [
      'left over block3.dv.b (144,)', 'missing block3.dw.b',
      'stem.b (5,), expected (32,)']


def test_mobilenet_heads(tmp_path, arrays):
  path = tmp_path / 'a.npz'
  np.savez(path, **arrays)
  model, params = convnet.load_mobilenet(path, classes=7)
  assert params['head']['kernel'].shape == (1280, 7)
  assert not np.any(params['head']['kernel'])
  model, params = convnet.load_mobilenet(path, head='pool')
  assert isinstance(model, MobileNetV2) and 'head' not in params
  x = jnp.zeros((1, 32, 32, 3))
  assert jax.eval_shape(model.apply, {'params': params}, x).shape == (1, 1280)
