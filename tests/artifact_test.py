"""Adapter files: bit-exact, whole or absent, and refused where they misfit."""

import json
import os
import pickle
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax import artifact
from peftjax import trees
import pytest
import safetensors.numpy


class Net(nn.Module):
  """A fused kernel, a convolution, a scanned stack and a head."""

  width: int = 8

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(24, name='qkv')(x)[..., :self.width]
    x = nn.Conv(self.width, (3,), name='conv')(x)
    layer = nn.scan(Layer, variable_axes={'params': 0},
                    split_rngs={'params': True}, length=3)
    x, _ = layer(name='blocks')(x, None)
    return nn.Dense(5, name='head')(x)


class Layer(nn.Module):

  @nn.compact
  def __call__(self, x, _):
    return nn.gelu(nn.Dense(x.shape[-1], name='up')(x)), None


X = np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 3, 8)


def filled(function, *args):
  """What a function returns, in shape only, with random numbers in it."""
  rng = np.random.RandomState(0)
  return jax.tree.map(
      lambda v: jnp.asarray(rng.normal(0, 0.3, v.shape), v.dtype)
      if jnp.issubdtype(v.dtype, jnp.floating)
      else jnp.arange(v.size, dtype=v.dtype).reshape(v.shape),
      jax.eval_shape(function, *args))


def random_theta(methods, sites, params):
  return filled(
      lambda p: peftjax.init(methods, jax.random.key(0), sites, p), params)


@pytest.fixture(scope='module')
def base():
  net = Net()
  params = filled(net.init, jax.random.key(0), X)['params']
  return net, params, peftjax.describe(net, X)


@pytest.fixture(scope='module')
def lora(base):
  _, params, sites = base
  method = peftjax.load('lowrank.lora', rank=2)
  return method, random_theta(method, sites, params)


@pytest.fixture
def saved(base, lora, tmp_path):
  _, params, sites = base
  path = tmp_path / 'adapter'
  peftjax.save_adapter(path, *lora, sites, params, 'some_base')
  return path


def edit(path, **changes):
  """Rewrites entries of adapter.json."""
  meta = json.loads((path / artifact.META).read_text())
  (path / artifact.META).write_text(json.dumps({**meta, **changes}))


def same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(
      np.asarray(x), np.asarray(y), strict=True), a, b)


# -------------------------------------------------------------- round trip
def test_tuple_of_methods_comes_back_bit_for_bit(base, tmp_path):
  net, params, sites = base
  methods = (
      peftjax.load('selective.full', sites=dict(roles='head')),
      peftjax.load('lowrank.lora', rank=2, alpha=1 / 3, rank_pattern=(
          ('qkv', 1), (r'up$', 3)), scaling='rslora',
          sites=peftjax.select(leaf='kernel', exclude=['head'])),
      peftjax.load('lowrank.lora', rank=np.int64(1),
                   sites=peftjax.select(roles='qv')))
  theta = random_theta(methods, sites, params)
  peftjax.save_adapter(tmp_path / 'a', methods, theta, sites, params, 'b')
  got = peftjax.load_adapter(tmp_path / 'a', sites, params)
  same(got.theta, theta)
  assert 'qkv[0:8]' in got.theta['lora_2']
  old = jax.jit(lambda t: peftjax.apply(net, methods, params, t, X)[0])(theta)
  new = jax.jit(
      lambda t: peftjax.apply(net, got.methods, params, t, X)[0])(got.theta)
  np.testing.assert_array_equal(old, new)
  assert got.meta['stored'] == got.meta['trained'] == peftjax.count(theta)
  assert got.meta['base'] == dict(
      weights='b', fingerprint=trees.fingerprint(params))
  # What was read can be written again, and is the same file.
  peftjax.save_adapter(
      tmp_path / 'b', got.methods, got.theta, sites, params, 'b')
  for name in (artifact.META, artifact.TENSORS):
    assert (tmp_path / 'a' / name).read_bytes() == (
        tmp_path / 'b' / name).read_bytes()


def test_size_on_disk_is_the_count_of_the_card(base, lora, saved):
  _, _, sites = base
  method, theta = lora
  data = (saved / artifact.TENSORS).read_bytes()
  payload = len(data) - 8 - struct.unpack('<Q', data[:8])[0]
  card = sum(method.count(s) * int(np.prod(s.stack)) for s in sites.values()
             if method.sites(s))
  assert payload == 4 * card == 4 * peftjax.count(theta)
  meta = peftjax.load_adapter(saved).meta
  assert (meta['trained'], meta['stored']) == (card, card)


def test_theta_of_a_later_phase_is_loaded_with_its_own_method(base, tmp_path):
  _, params, sites = base
  first = peftjax.load(
      'sparse.diff_pruning', density=0.1, sites=peftjax.select(
          path='blocks', leaf='kernel'))
  (phase,) = first.phases
  last = random_theta(phase.method, sites, params)
  peftjax.save_adapter(tmp_path / 'a', phase.method, last, sites, params)
  got = peftjax.load_adapter(tmp_path / 'a', sites, params)
  same(got.theta, last)
  assert got.methods[0].spec == dict(
      name='sparse.diff_pruning', density=0.1, phase=1,
      sites=dict(path=['blocks'], leaf=['kernel']))
  assert got.meta['trained'] < got.meta['stored']
  trained, _ = peftjax.partition(got.methods, got.theta)
  assert set(trained['diff_pruning']['blocks/up']) == {'value.kernel'}
  with pytest.raises(ValueError, match='no phase 2; choose from 0 to 1'):
    peftjax.load('sparse.diff_pruning', phase=2)


def test_low_precision_empty_and_root_entries_keep_their_bits(tmp_path):
  model = nn.Dense(8)
  params = filled(model.init, jax.random.key(0), X)['params']
  sites = peftjax.describe(model, X)
  method = peftjax.load(
      'lowrank.lora', rank=1, sites=peftjax.select(kind='Dense'))
  theta = random_theta(method, sites, params)
  theta = {'lora': {'': {
      'a': theta['lora']['']['a'].astype(jnp.bfloat16),
      'b': theta['lora']['']['b'].astype(jnp.float8_e4m3fn)}}}
  peftjax.save_adapter(tmp_path / 'a', method, theta, sites, params)
  same(peftjax.load_adapter(tmp_path / 'a', sites, params).theta, theta)
  peftjax.save_adapter(tmp_path / 'a', method, {'lora': {}}, sites, params)
  assert peftjax.load_adapter(tmp_path / 'a').theta == {'lora': {}}


# ------------------------------------------------------- what save refuses
def test_methods_that_cannot_be_made_again_are_refused(base, lora, tmp_path):
  _, params, sites = base
  method, theta = lora
  save = lambda m: peftjax.save_adapter(
      tmp_path / 'a', m, theta, sites, params)
  with pytest.raises(ValueError, match="'lora' was not made by peftjax.load"):
    save(method._replace(spec=None))
  plain = lambda site: 'kernel' in site.params and not site.role
  with pytest.raises(ValueError, match=r'sites of .*peftjax\.select\('):
    save(peftjax.load('lowrank.lora', rank=2, sites=plain))
  for alpha, message in ((float('inf'), 'expected a finite number'),
                         (2j, 'expected numbers, strings')):
    with pytest.raises(ValueError, match=f"alpha of method 'lora'.*{message}"):
      save(method._replace(spec={**method.spec, 'alpha': alpha}))
  assert not list(tmp_path.iterdir())
  default = peftjax.load('lowrank.lora', rank=2, sites=method.sites)
  save(default)  # the default predicate is left out, and comes back as it
  assert peftjax.load_adapter(tmp_path / 'a').methods[0].sites is method.sites


def test_bad_theta_is_refused_and_leaves_the_old_adapter(base, lora, saved):
  _, params, sites = base
  method, theta = lora
  old = (saved / artifact.TENSORS).read_bytes()
  save = lambda t: peftjax.save_adapter(saved, method, t, sites, params)
  bad = jax.tree.map(lambda v: v, theta)
  bad['lora']['conv']['a'] = bad['lora']['conv']['a'].at[0, 0].set(jnp.nan)
  with pytest.raises(ValueError, match='NaN or infinity in lora/conv/a'):
    save(bad)
  with pytest.raises(ValueError, match=r"no site 'cov'; did you mean 'conv'"):
    save({'lora': {'cov': theta['lora']['conv']}})
  with pytest.raises(ValueError, match=r"holds \['oft'\], the methods are"):
    save({'oft': theta['lora']})
  with pytest.raises(ValueError, match="params has no 'qkv/kernel'"):
    peftjax.save_adapter(saved, method, theta, sites, {'head': params['head']})
  assert (saved / artifact.TENSORS).read_bytes() == old


def test_foreign_content_is_never_overwritten(base, lora, saved, tmp_path):
  _, params, sites = base
  save = lambda path: peftjax.save_adapter(path, *lora, sites, params)
  notes = saved / 'notes.txt'
  notes.write_text('mine')
  with pytest.raises(ValueError, match=r'no adapter.s \(notes.txt\); choose'):
    save(saved)
  with pytest.raises(ValueError, match='exists and is no folder'):
    save(notes)
  assert notes.read_text() == 'mine'
  (tmp_path / 'empty').mkdir()
  save(tmp_path / 'empty')
  save(tmp_path / 'new' / 'folders')
  peftjax.load_adapter(tmp_path / 'empty')
  peftjax.load_adapter(tmp_path / 'new' / 'folders')


def test_unwritable_place_is_refused(base, lora, tmp_path):
  _, params, sites = base
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot write an adapter to .*file/a'):
    peftjax.save_adapter(tmp_path / 'file' / 'a', *lora, sites, params)


@pytest.mark.parametrize('call, at', [('fsync', 2), ('rename', 2)])
def test_a_write_that_fails_leaves_the_old_adapter_and_no_rest(
    base, lora, saved, monkeypatch, call, at):
  _, params, sites = base
  method, theta = lora
  real, calls = getattr(os, call), []

  def fail(*args):
    calls.append(args)
    if len(calls) == at:
      raise OSError(28, 'No space left on device')
    return real(*args)

  monkeypatch.setattr(os, call, fail)
  with pytest.raises(ValueError, match='No space left on device'):
    peftjax.save_adapter(saved, method, jax.tree.map(jnp.zeros_like, theta),
                         sites, params)
  monkeypatch.undo()
  assert os.listdir(saved.parent) == [saved.name]
  same(peftjax.load_adapter(saved).theta, theta)


def test_replacing_leaves_the_new_adapter_alone(base, lora, saved):
  _, params, sites = base
  method, theta = lora
  zeros = jax.tree.map(jnp.zeros_like, theta)
  peftjax.save_adapter(saved, method, zeros, sites, params)
  assert os.listdir(saved.parent) == [saved.name]
  same(peftjax.load_adapter(saved).theta, zeros)


# ------------------------------------------------------- what load refuses
def test_another_base_is_refused(base, saved):
  _, params, sites = base
  other = jax.tree.map(lambda v: v, params)
  other['head']['bias'] = other['head']['bias'].at[0].add(1e-6)
  old, new = (trees.fingerprint(p)[:12] for p in (params, other))
  with pytest.raises(ValueError, match=(
      f"another base: on {old}.*{new}.*weights='some_base'")):
    peftjax.load_adapter(saved, sites, other)


def test_another_shape_is_refused(base, saved):
  sites = peftjax.describe(Net(width=16), X)
  with pytest.raises(ValueError, match=(
      r"another shape at 'blocks/up': .*'kernel': \[8, 8\].*"
      r"'kernel': \[16, 16\]")):
    peftjax.load_adapter(saved, sites)
  up = base[2]['blocks/up']
  with pytest.raises(ValueError, match=r'made for stack \[3\], .* has \[4\]'):
    peftjax.load_adapter(saved, {**base[2], 'blocks/up': up._replace(
        stack=(4,))})
  with pytest.raises(ValueError, match="no site 'conv'; choose from blocks/"):
    peftjax.load_adapter(saved, {'blocks/up': up})


@pytest.mark.parametrize('version', [2, '1', None])
def test_another_format_is_refused(saved, version):
  edit(saved, format=version, peftjax='7.0')
  with pytest.raises(ValueError, match=(
      f'format {version!r}, written by peftjax 7.0; .*reads format 1')):
    peftjax.load_adapter(saved)


def test_unknown_methods_and_arguments_are_refused(saved):
  for spec, message in (
      (dict(name='lowrank.lara'), "did you mean 'lowrank.lora'"),
      (dict(name='lowrank.lora', rnak=2), "did you mean 'rank'"),
      (dict(rank=2), 'cannot make the method'), ('lora', 'cannot make')):
    edit(saved, methods=[spec])
    with pytest.raises(ValueError, match=message):
      peftjax.load_adapter(saved)


def test_an_edited_description_is_refused(saved):
  # Rank 4 would silently halve the scale of a theta of rank 2.
  edit(saved, methods=[dict(name='lowrank.lora', rank=4)])
  with pytest.raises(ValueError, match='was changed after it was written'):
    peftjax.load_adapter(saved)


@pytest.mark.parametrize('text, message', [
    (b'{"format": 1,', 'is no JSON: Expecting'),
    (b'\x80\x04\x95', 'is no JSON'), (b'[]', "no entry 'format'"),
    (b'{"format": 1, "peftjax": "0"}', "no entry 'methods'")])
def test_broken_json_is_refused(saved, text, message):
  (saved / artifact.META).write_bytes(text)
  with pytest.raises(ValueError, match=message):
    peftjax.load_adapter(saved)


@pytest.mark.parametrize('name', [artifact.META, artifact.TENSORS])
def test_a_missing_file_is_refused(saved, name):
  (saved / name).unlink()
  with pytest.raises(ValueError, match=f'has no {name}, only'):
    peftjax.load_adapter(saved)


def test_paths_that_are_no_adapter_are_refused(saved, tmp_path):
  with pytest.raises(ValueError, match='not there: expected an adapter folder'):
    peftjax.load_adapter(tmp_path / 'nothing')
  with pytest.raises(ValueError, match='is a file.*pickles are not read'):
    peftjax.load_adapter(saved / artifact.META)


def test_damaged_tensors_are_refused(saved):
  file = saved / artifact.TENSORS
  data = file.read_bytes()
  middle = len(data) - 5
  flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]
  for bad, message in (
      (data[:-7], f'{len(data) - 7} bytes.* is no complete safetensors'),
      (data[:4], 'no complete safetensors'), (b'', 'no complete safetensors'),
      (pickle.dumps(dict(a=1)), 'no complete safetensors'),
      (flipped, 'SHA-256 does not fit')):
    file.write_bytes(bad)
    with pytest.raises(ValueError, match=message):
      peftjax.load_adapter(saved)


def test_other_tensors_than_described_are_refused(saved):
  file = saved / artifact.TENSORS
  tensors = safetensors.numpy.load_file(file)
  name = 'lora/conv/b'
  changes = (
      ({k: v for k, v in tensors.items() if k != name}, f"misses .*'{name}'"),
      ({**tensors, 'lora/conv/c': tensors[name]}, "tensor 'lora/conv/c'"),
      ({**tensors, name: tensors[name].T.copy()},
       r'shape \[8, 2\], .* \[2, 8\]'),
      ({**tensors, name: tensors[name] * np.nan}, f'NaN or infinity in {name}'))
  for new, message in changes:
    safetensors.numpy.save_file(new, file)
    with pytest.raises(ValueError, match=message):
      peftjax.load_adapter(saved)
