"""The vision transformer and its weight files."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from peftjax import trees
from peftjax.models import vit
from peftjax.models.weights import load_weights
from peftjax.models.weights import save_weights

SMALL = dict(classes=5, width=12, depth=2, heads=2, mlp_dim=20, patch=4)
CONFIG = dict(module='vit.ViT', args=SMALL, input=[1, 8, 8, 3])


@pytest.fixture(scope='module')
def images():
  return jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


@pytest.fixture(scope='module')
def fresh(images):
  return jax.jit(vit.ViT(**SMALL).init)(jax.random.key(0), images)['params']


@pytest.fixture(scope='module')
def params(fresh):
  # Nothing at zero or one: a wrong path must change the output.
  flat = trees.flatten(fresh)
  keys = jax.random.split(jax.random.key(2), len(flat))
  return trees.unflatten({
      n: a + 0.3 * jax.random.normal(k, a.shape)
      for k, (n, a) in zip(keys, flat.items())})


def logits(model, params, images):
  return jax.jit(lambda p: model.apply({'params': p}, images))(params)


def outputs(model, params, images):
  """Logits and the gradient of their squares."""
  def loss(p):
    y = model.apply({'params': p}, images)
    return (y ** 2).sum(), y
  (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return y, grads


def test_parameters_and_output_shape():
  model = vit.ViT()
  shapes = jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
  flat = trees.flatten(shapes)
  assert set(shapes) == {'patch', 'pos', 'norm', 'head',
                         *(f'block_{i}' for i in range(6))}
  d, m = 192, 768
  block = 4 * (d * d + d) + 2 * 2 * d + (d * m + m) + (m * d + d)
  assert trees.count(shapes) == (
      (48 * d + d) + 64 * d + 6 * block + 2 * d + (d * 10 + 10))
  assert flat['pos'].shape == (1, 64, d)
  assert {n.removeprefix('block_3/') for n in flat if 'block_3' in n} == {
      f'{m}/{leaf}' for m in
      ('attn/query', 'attn/key', 'attn/value', 'attn/out', 'mlp/up',
       'mlp/down') for leaf in ('kernel', 'bias')} | {
           f'norm{i}/{leaf}' for i in (1, 2) for leaf in ('scale', 'bias')}
  logits = jax.eval_shape(model.apply, {'params': shapes},
                          jnp.zeros((7, 32, 32, 3)))
  assert logits.shape == (7, 10) and logits.dtype == jnp.float32


def test_head_starts_at_zero(fresh):
  assert not np.any(fresh['head']['kernel'])
  assert not np.any(fresh['head']['bias'])


def test_positions_start_as_sines(fresh):
  # Width 12: three frequencies, each with two sines and two cosines.
  f = 10_000. ** (-np.arange(3) / 3)
  for token, (y, x) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
    want = [np.sin(x * f), np.cos(x * f), np.sin(y * f), np.cos(y * f)]
    np.testing.assert_allclose(
        fresh['pos'][0, token], np.concatenate(want), atol=1e-6)
  assert vit.sine_positions(2, 3, 10).shape == (1, 6, 10)


@pytest.mark.parametrize('scan, remat',
                         [(True, False), (False, True), (True, True)])
def test_scan_and_remat_equal_plain(images, params, scan, remat):
  y, grads = outputs(vit.ViT(**SMALL), params, images)
  model = vit.ViT(**SMALL, scan=scan, remat=remat)
  other = trees.stack(params) if scan else params
  assert jax.tree.structure(other) == jax.tree.structure(
      jax.eval_shape(model.init, jax.random.key(0), images)['params'])
  y2, grads2 = outputs(model, other, images)
  grads2 = trees.unstack(grads2)
  np.testing.assert_allclose(y2, y, atol=1e-5, rtol=1e-5)
  assert np.abs(y).max() > 0.1
  for name, g in trees.flatten(grads).items():
    np.testing.assert_allclose(
        trees.flatten(grads2)[name], g, atol=1e-4, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize('scan', [False, True])
def test_hooks_are_seen_by_interceptors(images, params, scan):
  seen = []
  def watch(f, args, kwargs, context):
    if context.method_name in ('embed', 'attend', 'join', 'readout'):
      shapes = [a.shape for a in args if hasattr(a, 'shape')]
      which = [a for a in args if isinstance(a, str)]
      seen.append((context.method_name, *which, *shapes))
    return f(*args, **kwargs)
  model = vit.ViT(**SMALL, scan=scan)
  params = trees.stack(params) if scan else params
  with nn.intercept_methods(watch):
    jax.eval_shape(model.apply, {'params': params}, images)
  u, q = (2, 4, 12), (2, 4, 2, 6)
  block = {('attend', q, q, q), ('join', 'attn', u, u, u),
           ('join', 'mlp', u, u, u)}
  assert set(seen) == block | {('embed', images.shape), ('readout', u)}
  if not scan:
    assert len(seen) == 2 + 3 * SMALL['depth']


def test_interceptor_changes_the_output(images, params):
  """An extra token from `embed` reaches every block and the readout."""
  model = vit.ViT(**SMALL)
  lengths = []
  def lengthen(f, args, kwargs, context):
    y = f(*args, **kwargs)
    if context.method_name == 'embed':
      return jnp.concatenate([jnp.ones_like(y[:, :1]), y], axis=1)
    if context.method_name == 'join':
      lengths.append(y.shape[1])
    return y
  plain = logits(model, params, images)
  with nn.intercept_methods(lengthen):
    longer = logits(model, params, images)
  assert lengths == [5] * 4
  assert np.abs(longer - plain).max() > 1e-3


def test_attention_against_numpy():
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 2, 4, 2, 6)).astype(np.float32)
  mask = np.tril(np.ones((4, 4), bool))[None, None]
  for m in (None, mask):
    want = np.zeros_like(q)
    for b in range(2):
      for h in range(2):
        s = q[b, :, h] @ k[b, :, h].T / np.sqrt(6)
        s = s if m is None else np.where(m[0, 0], s, -np.inf)
        w = np.exp(s - s.max(-1, keepdims=True))
        want[b, :, h] = w / w.sum(-1, keepdims=True) @ v[b, :, h]
    got = vit.Attention(2).apply({}, q, k, v, m, method='attend')
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_masked_tokens_do_not_matter(images, params):
  model = vit.ViT(**SMALL)
  mask = jnp.array([[True, True, True, False]] * 2)
  run = jax.jit(lambda x, mask=mask: model.apply(
      {'params': params}, x, mask, method='features'))
  # The last of the four patches is the lower right one.
  other = images.at[:, 4:, 4:].add(1.)
  np.testing.assert_allclose(run(other), run(images), atol=1e-6)
  full = run(images, jnp.ones_like(mask))
  assert np.abs(run(images) - full).max() > 1e-2


def test_bfloat16_is_close(images, params):
  y = logits(vit.ViT(**SMALL), params, images)
  half = logits(vit.ViT(**SMALL, dtype=jnp.bfloat16), params, images)
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, y, atol=0.1 * np.abs(y).max())


@pytest.mark.parametrize('changes, shape, match', [
    (dict(heads=5), (1, 8, 8, 3), r'width 12 .* 5 heads.*1, 2, 3, 4, 6, 12'),
    ({}, (1, 10, 8, 3), 'side 10 .* patch 4; nearest: 8 or 12'),
    ({}, (1, 8, 8, 1), r'\(1, 8, 8, 1\).*B, H, W, 3'),
])
def test_bad_shapes(changes, shape, match):
  model = vit.ViT(**{**SMALL, **changes})
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


# ------------------------------------------------------------ weight files


@pytest.mark.parametrize('scan', [False, True])
def test_weights_round_trip(tmp_path, images, params, scan):
  path = tmp_path / 'a.safetensors'
  save_weights(path, trees.stack(params) if scan else params, CONFIG,
               jnp.float32)
  model, loaded = load_weights(path, scan=not scan)
  assert model.scan == (not scan) == ('blocks' in loaded)
  got = trees.flatten(trees.unstack(loaded))
  assert set(got) == set(trees.flatten(params))
  for name, a in trees.flatten(params).items():
    np.testing.assert_array_equal(got[name], a, err_msg=name)
  shape = jax.eval_shape(model.apply, {'params': loaded}, images).shape
  assert shape == (2, SMALL['classes'])


def test_weights_are_float16_on_disk_and_float32_in_memory(tmp_path, params):
  path = tmp_path / 'a.safetensors'
  save_weights(path, params, CONFIG)
  on_disk = safetensors.numpy.load_file(path)
  assert {a.dtype for a in on_disk.values()} == {np.dtype(np.float16)}
  _, got = load_weights(path)
  for name, a in trees.flatten(got).items():
    assert a.dtype == jnp.float32
    np.testing.assert_array_equal(a, on_disk[name].astype(np.float32))


def test_new_head(tmp_path, images, params):
  path = tmp_path / 'a.safetensors'
  headless = {n: t for n, t in params.items() if n != 'head'}
  save_weights(path, headless, {**CONFIG, 'args': {
      k: v for k, v in SMALL.items() if k != 'classes'}})
  model, got = load_weights(path)
  assert model.classes == 10 and got['head']['kernel'].shape == (12, 10)
  save_weights(path, params, CONFIG)
  model, got = load_weights(path, classes=7)
  assert not np.any(got['head']['kernel'])
  assert logits(model, got, images).shape == (2, 7)
  draws = [load_weights(path, classes=7, key=jax.random.key(i))[1]['head']
           for i in (0, 0, 1)]
  assert not np.any(draws[0]['bias'])
  assert 0.01 < np.std(draws[0]['kernel']) < 0.03
  np.testing.assert_array_equal(draws[0]['kernel'], draws[1]['kernel'])
  assert np.any(draws[0]['kernel'] != draws[2]['kernel'])
  _, kept = load_weights(path)
  np.testing.assert_allclose(kept['head']['kernel'], params['head']['kernel'],
                             rtol=1e-3)


def test_missing_files_and_names(tmp_path, params):
  save_weights(tmp_path / 'small.safetensors', params, CONFIG)
  with pytest.raises(FileNotFoundError, match='nearest: small.safetensors'):
    load_weights(tmp_path / 'smal.safetensors')
  with pytest.raises(ValueError, match="unknown weights 'vit_z'.*vit_s"):
    load_weights('vit_z')


def test_broken_files(tmp_path, params):
  path = tmp_path / 'a.safetensors'
  save_weights(path, params, CONFIG)
  data = path.read_bytes()
  for part in (b'', data[:5], data[:len(data) // 2], b'x' * 100):
    path.write_bytes(part)
    with pytest.raises(ValueError, match='a.safetensors.*no complete'):
      load_weights(path)
  safetensors.numpy.save_file({'a': np.zeros(2)}, path)
  with pytest.raises(ValueError, match="no metadata entry 'config'"):
    load_weights(path)


def test_tensors_that_do_not_fit_are_listed(tmp_path, params):
  path = tmp_path / 'a.safetensors'
  flat = {n: np.asarray(a) for n, a in trees.flatten(params).items()}
  flat['block_0/mlp/upp/bias'] = flat.pop('block_0/mlp/up/bias')
  flat['pos'] = flat['pos'][:, :3].copy()
  safetensors.numpy.save_file(flat, path, {'config': json.dumps(CONFIG)})
  with pytest.raises(ValueError) as e:
    load_weights(path)
  lines = [line.strip() for line in str(e.value).splitlines()[1:]]
  assert lines == [
      'missing block_0/mlp/up/bias (20,)',
      'left over block_0/mlp/upp/bias (20,), nearest: ' +
      lines[1].split('nearest: ')[1],
      'pos (1, 3, 12), expected (1, 4, 12)']
  assert 'block_0/mlp/up/bias' in lines[1].split('nearest: ')[1]


def test_bad_saves(tmp_path, params):
  path = tmp_path / 'a.safetensors'
  big = {**params, 'pos': params['pos'].at[0, 0, 0].set(1e5)}
  with pytest.raises(ValueError, match='pos.*1e[+]05.*float16'):
    save_weights(path, big, CONFIG)
  with pytest.raises(ValueError, match="no entry 'input'"):
    save_weights(path, params, dict(module='vit.ViT', args=SMALL))
  assert not list(tmp_path.iterdir())
