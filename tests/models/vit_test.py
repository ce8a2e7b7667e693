"""The vision transformer and its weight files."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import peftjax as pj
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


# ------------------------------------------------------ further attributes

TOKENS = vit.ViT(
    classes=3, width=12, depth=2, heads=2, mlp_dim=8, patch=4,
    tokens=('cls',), registers=2, pool='class_mean', image=(8, 8),
    gated=True, qkv_bias=False, layer_scale=0.5)


@pytest.fixture(scope='module')
def with_tokens(images):
  shapes = jax.eval_shape(TOKENS.init, jax.random.key(0), images)['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda s: jnp.asarray(rng.normal(0.2, 0.3, s.shape), jnp.float32), shapes)


def test_parameters_of_tokens_gates_and_scales(with_tokens):
  flat = {n: a.shape for n, a in trees.flatten(with_tokens).items()}
  assert flat['cls'] == (1, 1, 12) and flat['registers'] == (1, 2, 12)
  assert flat['pos'] == (1, 1 + 4, 12) and flat['head/kernel'] == (24, 3)
  assert {n.removeprefix('block_1/') for n in flat if 'block_1/' in n} == {
      f'{m}/kernel' for m in ('attn/query', 'attn/key', 'attn/value',
                              'attn/out', 'mlp/gate_up', 'mlp/down')} | {
          f'{m}/bias' for m in ('attn/out', 'mlp/gate_up', 'mlp/down', 'norm1',
                                'norm2')} | {
              f'{m}/scale' for m in ('norm1', 'norm2', 'scale1', 'scale2')}


def test_roles(images):
  sites = pj.describe(TOKENS, images)
  assert {s.role for s in sites.values()} == {
      'q', 'k', 'v', 'o', 'gate', 'up', 'down', 'norm', 'head', ''}
  assert sites['block_0/mlp/gate_up[0:8]'].role == 'gate'
  assert sites['block_0/mlp/gate_up[8:16]'].role == 'up'
  assert {p for p, s in sites.items() if s.role == 'head'} == {'head'}


def test_scanned_tokens_equal_unrolled(images, with_tokens):
  y, grads = outputs(TOKENS, with_tokens, images)
  scanned = TOKENS.clone(scan=True, remat=True)
  y2, grads2 = outputs(scanned, trees.stack(with_tokens), images)
  np.testing.assert_allclose(y2, y, atol=1e-5, rtol=1e-5)
  assert np.abs(y).max() > 0.1
  for name, g in trees.flatten(grads).items():
    np.testing.assert_allclose(trees.flatten(trees.unstack(grads2))[name], g,
                               atol=1e-4, rtol=1e-4, err_msg=name)
    assert np.any(g), name


def test_pools_read_their_tokens():
  h = jnp.arange(2 * 7 * 3.).reshape(2, 7, 3)
  first, second, patches = h[:, 0], h[:, 1], h[:, 3:].mean(1)
  mask = jnp.ones((2, 7), bool).at[:, 5:].set(False)
  read = lambda mask=None, **k: np.asarray(
      vit.ViT(**k).apply({}, h, mask, method='readout'))
  np.testing.assert_allclose(read(), h.mean(1))
  one, two = ('cls',), ('cls', 'distilled')
  np.testing.assert_array_equal(read(tokens=one, pool='class'), first)
  np.testing.assert_array_equal(read(tokens=two, pool='class'), first)
  np.testing.assert_array_equal(read(tokens=two, pool='pair'),
                                np.concatenate([first, second], -1))
  dino = dict(tokens=one, registers=2, pool='class_mean')
  np.testing.assert_allclose(read(**dino),
                             np.concatenate([first, patches], -1))
  np.testing.assert_allclose(
      read(mask, **dino), np.concatenate([first, h[:, 3:5].mean(1)], -1))


def test_heads(images, with_tokens):
  body = {n: t for n, t in with_tokens.items() if n != 'head'}
  run = lambda head, p, **k: jax.eval_shape(
      TOKENS.clone(head=head, **k).apply, {'params': p}, images).shape
  assert run(None, body) == (2, 1 + 2 + 4, 12)
  assert run('pool', body) == (2, 24)
  with pytest.raises(ValueError, match="unknown head 'lm'.*'classify'"):
    run('lm', body)
  with pytest.raises(ValueError, match="unknown pool 'max'.*'class_mean'"):
    run(None, body, pool='max')
  with pytest.raises(ValueError, match="'pair' reads 2 learned tokens"):
    run(None, body, pool='pair')


def test_methods_train_on_class_tokens(images, with_tokens):
  methods = (pj.load('lowrank.lora', rank=2, sites=pj.select(roles='qv')),
             pj.load('selective.full', sites=pj.select(roles=('head',))))
  sites = pj.describe(TOKENS, images)
  theta = pj.init(methods, jax.random.key(0), sites, with_tokens)
  assert {m: set(t) for m, t in theta.items()} == {
      'lora': {f'block_{i}/attn/{n}' for i in '01' for n in ('query', 'value')},
      'full': {'head'}}

  @jax.jit
  @jax.grad
  def grads(theta):
    y, _ = pj.apply(TOKENS, methods, with_tokens, theta, images)
    return (y ** 2).sum()

  for name, g in trees.flatten(grads(theta)).items():
    assert np.isfinite(g).all()
    assert np.any(g) != name.endswith('/a'), name  # b is 0


def test_images_of_another_size(images, params, with_tokens):
  large = jnp.zeros((1, 12, 8, 3))
  with pytest.raises(ValueError, match='12 x 8 pixels have 6 patches.* 8 x 8'):
    vit.ViT(**SMALL).apply({'params': params}, large)
  assert TOKENS.apply({'params': with_tokens}, large).shape == (1, 3)


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
