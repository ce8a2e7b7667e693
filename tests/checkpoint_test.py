"""Checkpoints: what is read is what was saved, or it is not used."""

import glob
import os

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax import checkpoint
from peftjax import config as config_lib

CONFIG = {'steps': 30, 'log_every': 1, 'optim': {'lr': 0.1}}


def state(seed=0):
  rng = np.random.default_rng(seed)
  return dict(
      step=jnp.int32(seed), empty=jnp.zeros((0, 3)),
      trained={'lora': {'block_0/qkv[0:8]': dict(
          a=jnp.asarray(rng.normal(size=(40, 50)), jnp.float32),
          b=jnp.asarray(rng.normal(size=(3,)), jnp.bfloat16))}},
      opt=(jnp.int32(seed), {'mu': jnp.asarray(rng.normal(size=4))}))


def shapes(meta):
  del meta
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda v: jax.ShapeDtypeStruct(
      v.shape, v.dtype, sharding=one), state())


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save(path, *steps):
  with checkpoint.manager(path, keep=2) as found:
    for step in steps:
      checkpoint.save(found, step, state(step), dict(
          config=CONFIG, base='abc', data={'next_index': step}))


def restore(path, config=None, base='abc', abstract=shapes):
  with checkpoint.manager(path, keep=2) as found:
    return checkpoint.restore(found, abstract, config or CONFIG, base)


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(
      logging, 'warning', lambda text, *a: said.append(text % a))
  return said


def test_round_trip_to_the_bit_and_only_the_newest_are_kept(tmp_path):
  assert restore(tmp_path) is None
  save(tmp_path, 5, 10, 15)
  found, meta = restore(tmp_path)
  same(found, state(15))
  assert (meta['step'], meta['data']) == (15, {'next_index': 15})
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['10', '15']


def test_what_is_saved_is_not_what_its_buffers_become(tmp_path):
  """The next step reuses the buffers while they are still being written."""
  s = state(1)
  bump = jax.jit(
      lambda s: jax.tree.map(lambda v: v + 1, s), donate_argnums=0)
  with checkpoint.manager(tmp_path, keep=2) as found:
    checkpoint.save(found, 1, s, dict(config=CONFIG, base='abc'))
    for _ in range(20):
      s = bump(s)
  same(restore(tmp_path)[0], state(1))


def newest(tmp_path, pattern, n=10):
  files = [p for p in glob.glob(
      str(tmp_path / f'checkpoints/{n}/{pattern}'), recursive=True)
           if os.path.isfile(p)]
  return max(files, key=os.path.getsize)


def truncate(path):
  with open(path, 'r+b') as f:
    f.truncate(os.path.getsize(path) // 2)


def flip(path):
  data = bytearray(open(path, 'rb').read())
  data[len(data) // 2] ^= 1
  with open(path, 'wb') as f:
    f.write(data)


@pytest.mark.parametrize('pattern, damage', [
    ('state/**/d/*', truncate), ('state/**/d/*', flip),
    ('state/**/d/*', os.remove), ('state/manifest.ocdbt', truncate),
    ('state/_METADATA', truncate), ('meta/metadata', truncate),
    ('meta/metadata', flip), ('meta/metadata', os.remove)])
def test_damaged_checkpoint_falls_back_with_a_warning(
    tmp_path, warnings, pattern, damage):
  save(tmp_path, 5, 10)
  damage(newest(tmp_path, pattern))
  found, meta = restore(tmp_path)
  same(found, state(5))
  assert meta['step'] == 5
  assert len(warnings) == 1
  assert 'checkpoint 10 cannot be read' in warnings[0]
  # Out of the way, so that step 10 can be saved again, and not lost.
  assert len(os.listdir(tmp_path / 'unreadable')) == 1
  save(tmp_path, 10)
  same(restore(tmp_path)[0], state(10))


def test_when_all_are_damaged_there_is_none(tmp_path, warnings):
  save(tmp_path, 5, 10)
  truncate(newest(tmp_path, 'state/**/d/*', 5))
  truncate(newest(tmp_path, 'state/**/d/*', 10))
  assert restore(tmp_path) is None
  assert len(warnings) == 2


def test_half_written_checkpoint_is_not_taken_for_one(tmp_path, warnings):
  save(tmp_path, 5)
  part = tmp_path / 'checkpoints' / '10.orbax-checkpoint-tmp'
  (part / 'state').mkdir(parents=True)
  (part / 'state' / 'manifest.ocdbt').write_bytes(b'half')
  same(restore(tmp_path)[0], state(5))
  assert not part.exists() and not warnings


def test_other_config_is_refused_with_the_keys(tmp_path):
  save(tmp_path, 5)
  with pytest.raises(ValueError, match='another config') as e:
    restore(tmp_path, {'steps': 40, 'log_every': 1, 'optim': {'lr': 0.2}})
  assert 'optim.lr: 0.1 in the checkpoint, 0.2 now' in str(e.value)
  assert 'steps: 30 in the checkpoint, 40 now' in str(e.value)
  # Only what is written changes with log_every.
  assert restore(tmp_path, dict(CONFIG, log_every=7))


def test_other_base_and_other_state_are_refused(tmp_path, warnings):
  save(tmp_path, 5)
  with pytest.raises(ValueError, match='another base: fingerprint abc'):
    restore(tmp_path, base='xyz')

  def other(meta):
    return dict(shapes(meta), step=jax.ShapeDtypeStruct((2,), jnp.int32))

  with pytest.raises(ValueError, match=r"\['step'\].*version of the code"):
    restore(tmp_path, abstract=other)
  assert not warnings and restore(tmp_path)


def test_workdir_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='file/below.*cannot be written'):
    with checkpoint.workdir(str(tmp_path / 'file' / 'below')):
      pass


def test_workdir_in_use_is_refused(tmp_path):
  with checkpoint.workdir(str(tmp_path)):
    with pytest.raises(ValueError, match='in use by another process'):
      with checkpoint.workdir(str(tmp_path)):
        pass
  with checkpoint.workdir(str(tmp_path)):
    pass


def test_differences_of_configs():
  a = config_lib.to_json(config_lib.defaults())
  c = config_lib.defaults()
  c.keep, c.data.name, c.optim.groups.head.lr = 9, 'digits', 2.0
  assert config_lib.differences(a, config_lib.to_json(c)) == [
      "data.name: 'kmnist' in the checkpoint, 'digits' now",
      'optim.groups.head.lr: None in the checkpoint, 2.0 now']
