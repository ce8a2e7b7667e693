"""A checkpoint folder goes straight into its shards, and trains the same."""

import os

import jax
from jax.sharding import NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from peftjax import bases
from peftjax import evaluate
from peftjax import sharding
from peftjax import train as train_lib
from peftjax import trees
from peftjax.interop import files

RULES = ((r'(query|key|value|up|gate)/kernel', (None, None, 'model')),
         (r'(out|down)/kernel', (None, 'model', None)),
         (r'embedding', (None, 'model')))
ROWS = [dict(text=t) for t in (
    'one two three four a b', 'red cat red dog', 'good film', 'a b c d e')] * 4
METHODS = (dict(name='lowrank.lora', rank=2, sites=dict(roles='qv')),
           dict(name='selective.full', sites=dict(roles='norm')))


def theta(path):
  return peftjax.load_adapter(os.path.join(path, 'adapter')).theta


@pytest.fixture
def spy(monkeypatch):
  """{stored name: [shape read, ...]}."""
  read, real = {}, files.Files.read

  def reading(self, name, index=None):
    value = real(self, name, index)
    read.setdefault(name, []).append((value.shape, self.shape(name)))
    return value

  monkeypatch.setattr(files.Files, 'read', reading)
  return read


def test_no_kernel_is_whole_on_the_host_and_theta_is_the_same(
    make_config, folders, write, tmp_path, spy, monkeypatch):
  config = make_config(folders['llama'], 'lm', write(ROWS), steps=4, batch=4)
  config.method = METHODS
  one = train_lib.train(config, str(tmp_path / 'one'), False)
  spy.clear()
  config.mesh, config.shard_rules = dict(data=2, model=4), RULES
  cache = {}
  eight = train_lib.train(config, str(tmp_path / 'eight'), False, cache)
  kernels = {n: s for n, s in spy.items() if len(s[0][1]) > 1}
  assert len(kernels) == 8
  for name, shapes in kernels.items():
    for part, whole in shapes:
      assert np.prod(part) * 4 == np.prod(whole), name
  kernel = trees.flatten(cache['base'][1].params)['blocks/mlp/up/kernel']
  assert {s.data.shape for s in kernel.addressable_shards} == {(1, 16, 8)}

  # Same digest, so that adapters fit; the same theta.
  assert eight['fingerprint'] == one['fingerprint'] == bases.load(
      folders['llama'], 'lm', None, True).fingerprint
  for a, b in zip(*(jax.tree.leaves(theta(tmp_path / n))
                    for n in ('one', 'eight')), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
  assert eight['after']['loss'] == pytest.approx(one['after']['loss'], rel=1e-5)
  assert abs(one['after']['loss'] - one['before']['loss']) > 1e-3
  found = evaluate.evaluate_adapter(str(tmp_path / 'eight' / 'adapter'))
  assert found['adapted']['loss'] == pytest.approx(
      eight['after']['loss'], rel=1e-5)

  # The next run of a grid finds the base where it lies; another mesh does not.
  spy.clear()
  config.seed, config.steps = 1, 1
  train_lib.train(config, str(tmp_path / 'next'), False, cache)
  assert not spy
  monkeypatch.setattr(train_lib.step_lib, 'compile_step', None)
  config.mesh = dict(data=1, model=4)
  with pytest.raises(TypeError):  # it has got as far as the step
    train_lib.train(config, str(tmp_path / 'other'), False, cache)
  assert spy


def test_several_processes_read_a_base_whole(
    make_config, folders, write, tmp_path, monkeypatch):
  config = make_config(folders['llama'], 'lm', write(ROWS))
  meshes, real = [], train_lib.case_lib.load

  def load(*args, mesh, **kwargs):
    meshes.append(mesh)
    real(*args, mesh=mesh, **kwargs)
    raise ValueError('enough')

  monkeypatch.setattr(train_lib.case_lib, 'load', load)
  for count in (1, 2):
    monkeypatch.setattr(jax, 'process_count', lambda count=count: count)
    with pytest.raises(ValueError, match='enough'):
      train_lib._train(config, str(tmp_path), False, None, None, None)
  assert meshes[0] is not None and meshes[1] is None


@pytest.mark.parametrize('axes', [
    (None, 'model'), ('model', None), ('data', 'model'), ()])
def test_fingerprint_by_rows_is_that_of_the_whole(axes):
  mesh = sharding.make_mesh(dict(data=2, model=4))
  host = dict(a=dict(w=np.random.default_rng(0).normal(
      size=(24, 8, 2)).astype(np.float32)), b=np.float32(3),
              c=np.arange(8, dtype=jnp.bfloat16))
  at = NamedSharding(mesh, PartitionSpec(*axes))
  there = dict(host, a=dict(w=jax.device_put(host['a']['w'], at)),
               c=jax.device_put(host['c'], sharding.replicated(mesh)))
  whole = trees.fingerprint(host)
  for most in (1, 200, 2 ** 26):
    assert trees.fingerprint(there, most) == whole
  there['a']['w'] = there['a']['w'].at[23, 7, 1].add(1)
  assert trees.fingerprint(there, 200) != whole


def test_rows_on_the_host_are_few():
  mesh = sharding.make_mesh(dict(data=2, model=4))
  value = jax.device_put(np.arange(96.).reshape(24, 4), NamedSharding(
      mesh, PartitionSpec('data', 'model')))
  parts = list(trees._rows(value, 3 * 16))
  assert {p.shape for p in parts} == {(3, 4)}
  np.testing.assert_array_equal(np.concatenate(parts), value)


def test_theta_starts_alike_wherever_the_base_lies(folders):
  base = bases.load(folders['bert'])
  sites = peftjax.describe(base.model, np.ones((1, 4), np.int32))
  method = peftjax.Method(
      'svd', peftjax.select(kind='Dense', path='mlp'),
      layer=lambda f, x, t, ctx: f(x), init=lambda key, site, p, stats: dict(
          u=jnp.linalg.svd(p['kernel'] @ p['kernel'].T)[0], w=p['kernel']))
  mesh = sharding.make_mesh(dict(data=2, model=4))
  at = sharding.params_sharding(
      mesh, (('mlp/up/kernel', (None, 'model')),), base.params)
  one, many = (peftjax.init(method, jax.random.key(0), sites, p) for p in (
      base.params, sharding.put_global(base.params, at)))
  jax.tree.map(np.testing.assert_array_equal, one, many)
  assert len(jax.tree.leaves(one)) == 4
