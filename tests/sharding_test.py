"""Meshes, rules, theta beside its kernel; eight devices train as one."""

import types

import jax
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from peftjax import config as config_lib
from peftjax import phases
from peftjax import sharding
from peftjax import step as step_lib
from peftjax.models.vit import ViT
from peftjax.tasks import classification, images

RULES = ((r'(query|key|value|up)/kernel', (None, 'model')),
         (r'(out|down)/kernel', ('model', None)),
         (r'patch/kernel', (None, None, None, 'data')))


@pytest.fixture(scope='module')
def tiny():
  model = ViT(width=16, depth=1, heads=2, mlp_dim=32, patch=4, scan=True)
  x = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
  params = jax.jit(model.init)(jax.random.key(0), x)['params']
  return types.SimpleNamespace(
      model=model, x=x, params=jax.tree.map(np.asarray, params),
      sites=peftjax.describe(model, x))


def test_mesh_takes_the_rest_of_the_devices():
  assert dict(sharding.make_mesh(dict(data=-1, model=2)).shape) == dict(
      data=4, model=2)
  assert dict(sharding.make_mesh(dict(data=2, model=-1)).shape) == dict(
      data=2, model=4)
  assert sharding.make_mesh(dict(data=1, model=1)).size == 1


@pytest.mark.parametrize('sizes, words', [
    (dict(data=-1, model=3), 'model=3.*are 8 devices.*nearest is 2'),
    (dict(data=16, model=1), 'needs 16 devices.*are 8 devices'),
    (dict(data=-1, model=-1), 'both -1.*8 devices'),
    (dict(data=0, model=1), 'data=0.*8 devices'),
    (dict(date=1), "'date'.*'data'")])
def test_mesh_that_does_not_fit_is_refused(sizes, words):
  with pytest.raises(ValueError, match=words):
    sharding.make_mesh(sizes)


def test_batch_that_does_not_divide_is_refused():
  mesh = sharding.make_mesh(dict(data=8, model=1))
  with pytest.raises(ValueError, match='batch=30.*nearest are 24 and 32'):
    sharding.check_batch(mesh, 30)
  sharding.check_batch(mesh, 32)


def test_params_by_rules(tiny):
  mesh = sharding.make_mesh(dict(data=4, model=2))
  rules = (('up/kernel', (None, None, 'model')), ('up', ()))
  at = sharding.params_sharding(mesh, rules, tiny.params)
  assert at['blocks']['mlp']['up']['kernel'].spec == P(None, None, 'model')
  assert at['blocks']['mlp']['up']['bias'].spec == P()
  assert at['head']['kernel'].spec == P()


@pytest.mark.parametrize('rules, words', [
    ((('up/kernal', ('model',)),), "'up/kernal' decides no parameter"),
    ((('up', ()), ('up/kernel', ())), "'up/kernel' decides no parameter"),
    ((('head/kernel', (None, 'modle')),), "'modle'.*'model'"),
    ((('head/kernel', (None, 'data')),), '10 does not divide over the 4'),
    ((('head/bias', (None, 'model')),), 'only the dimensions')])
def test_rules_that_do_not_fit_are_refused(tiny, rules, words):
  mesh = sharding.make_mesh(dict(data=4, model=2))
  with pytest.raises(ValueError, match=words):
    sharding.params_sharding(mesh, rules, tiny.params)


def test_theta_inherits_the_axes_of_its_kernel(tiny):
  mesh = sharding.make_mesh(dict(data=4, model=2))
  rules = tuple((p, (None, *axes)) for p, axes in RULES[:2]) + RULES[2:]
  at = sharding.params_sharding(mesh, rules, tiny.params)
  methods = (peftjax.load('selective.full', sites=dict(path='patch')),
             peftjax.load('lowrank.lora', rank=4, sites=dict(kind='Dense')))
  theta = peftjax.init(methods, jax.random.key(0), tiny.sites, tiny.params)
  found = sharding.theta_sharding(mesh, tiny.sites, at, theta)
  lora = {p: {n: s.spec for n, s in t.items()}
          for p, t in found['lora'].items()}
  assert lora['blocks/mlp/up'] == dict(a=P(None, None, None),
                                       b=P(None, None, 'model'))
  assert lora['blocks/mlp/down'] == dict(a=P(None, 'model', None),
                                         b=P(None, None, None))
  assert lora['blocks/attn/out']['a'] == P(None, 'model', None)
  assert lora['head']['b'] == P(None, None)
  assert found['full']['patch']['kernel'].spec == P(None, None, None, 'data')


def test_theta_dimension_that_does_not_divide_is_replicated(tiny):
  mesh = sharding.make_mesh(dict(data=1, model=8))
  at = sharding.params_sharding(
      mesh, (('up/kernel', (None, None, 'model')),), tiny.params)
  theta = {'m': {'blocks/mlp/up': dict(
      s=jax.ShapeDtypeStruct((1, 32), jnp.float32),
      r=jax.ShapeDtypeStruct((1, 4, 4), jnp.float32))}}
  found = sharding.theta_sharding(mesh, tiny.sites, at, theta)['m']
  assert found['blocks/mlp/up']['s'].spec == P(None, 'model')
  assert found['blocks/mlp/up']['r'].spec == P(None, None, None)


def test_eight_devices_train_as_one(tiny):
  """Five steps of the training loop's own step, on 4 x 2 devices and on one."""
  config = config_lib.defaults()
  config.batch, config.optim.ema, config.optim.weight_decay = 16, 0.9, 0.1
  config.optim.groups.head.lr = 3.0
  methods = (
      peftjax.load('lowrank.lora', rank=4,
                   sites=dict(roles=('q', 'o', 'up', 'down'))),
      peftjax.load('selective.full', sites=dict(roles='head'), group='head'))
  stage = phases.schedule(methods, 5)[0]
  theta = peftjax.init(methods, jax.random.key(1), tiny.sites, tiny.params)
  labels = np.arange(16, dtype=np.int32) % 10
  ends = []
  for sizes in (dict(data=1, model=1), dict(data=4, model=2)):
    mesh = sharding.make_mesh(sizes)
    rules = () if mesh.size == 1 else tuple(
        (p, (None, *axes)) for p, axes in RULES[:2]) + RULES[2:]
    at = sharding.params_sharding(mesh, rules, tiny.params)
    task = classification.classify(
        'image', images.inputs, classes=10)
    run = step_lib.Run(
        config, task, tiny.model, sharding.put_global(tiny.params, at),
        tiny.sites, mesh, at, jax.random.key(0))
    state = step_lib.start(run, stage, theta, 0)
    batch = dict(image=tiny.x, label=labels)
    step, _ = step_lib.compile_step(run, stage, state, batch)
    pace = step_lib.pace_of(run, stage)
    batch = sharding.put_batch(batch, sharding.batch_sharding(mesh))
    for _ in range(5):
      state, metrics = step(state, run.params, batch, pace)
    assert len(state['trained']['lora']['blocks/mlp/up']['b'].devices()
              ) == mesh.size
    ends.append(jax.tree.map(np.asarray, (
        state['trained'], state['ema'], metrics['loss'])))
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ends[0][0],
                       jax.tree.map(np.asarray, theta))
  assert min(jax.tree.leaves(moved)) > 1e-4
  for one, eight in zip(*map(jax.tree.leaves, ends)):
    np.testing.assert_allclose(one, eight, rtol=0, atol=1e-5)
