"""One config on 1, 2, 4 and 8 devices ends in one theta; so does moving it."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from experiments import common
import peftjax
from peftjax import sharding
from peftjax import step as step_lib
from peftjax import train as train_lib
from peftjax import trees
from peftjax.models.weights import load_weights

LORA = dict(name='lowrank.lora', rank=2, dropout=0.1,
            sites=dict(roles=('q', 'v', 'up', 'down')))
# Every leaf of the base in pieces, one a device, but for the new head, whose
# 10 classes do not divide: tensor parallel over 'model', the rest over 'data'.
RULES = ((r'head', ()),
         (r'(query|key|value|up)/kernel', ('data', 'model')),
         (r'(out|down)/kernel', ('model', 'data')),
         (r'patch/kernel', ('model', None, None, 'data')),
         (r'pos', (None, 'model', 'data')),
         (r'.', ('data',)))


def make_config(weights, data=1, model=1):
  config = common.kmnist(
      (LORA, common.HEAD), 1e-2, 'data.train=64,data.test=40', batch=16,
      eval_batch=16, steps=20, log_every=10, checkpoint_every=10, keep=9,
      eval_before=False, mesh=dict(data=data, model=model))
  config.data.name, config.model.weights = 'digits', weights
  config.optim.weight_decay, config.optim.ema = 0.1, 0.5
  config.shard_rules = RULES if data * model > 1 else ()
  return config


def theta(workdir):
  return peftjax.load_adapter(os.path.join(workdir, 'adapter')).theta


def assert_close(a, b):
  """To 1e-5 of the largest entry of each leaf."""
  a, b = trees.flatten(a), trees.flatten(b)
  assert set(a) == set(b)
  for path in a:
    x, y = np.asarray(a[path]), np.asarray(b[path])
    np.testing.assert_allclose(
        x, y, rtol=0, atol=1e-5 * np.abs(y).max(), err_msg=path)


@pytest.fixture(scope='module')
def one(tiny_weights, tmp_path_factory):
  """The work folder of a run on one device."""
  workdir = str(tmp_path_factory.mktemp('one'))
  train_lib.train(make_config(tiny_weights), workdir, progress=False)
  moved = theta(workdir)['lora']['block_0/mlp/up']['b']
  assert np.abs(moved).max() > 0.01  # it starts at 0
  return workdir


@pytest.fixture(scope='module')
def eight(tiny_weights, tmp_path_factory):
  """The work folder of a run on 4 x 2 devices."""
  workdir = str(tmp_path_factory.mktemp('eight'))
  summary = train_lib.train(
      make_config(tiny_weights, 4, 2), workdir, progress=False)
  assert summary['devices'] == ['8 x cpu']
  return workdir


def test_rules_leave_no_device_a_whole_base(tiny_weights):
  _, params = load_weights(tiny_weights, classes=10)
  for data, model in ((4, 2), (2, 4), (8, 1), (2, 1), (1, 2)):
    mesh = sharding.make_mesh(dict(data=data, model=model))
    at = trees.flatten(sharding.params_sharding(mesh, RULES, params))
    for path, value in trees.flatten(params).items():
      if 'head' in path:
        continue
      parts = value.size // np.prod(at[path].shard_shape(value.shape))
      whole = data * model if value.ndim > 1 else data
      assert parts == whole, path


@pytest.mark.parametrize('data, model', [(2, 1), (1, 4)])
def test_devices_train_as_one(
    one, tiny_weights, tmp_path, monkeypatch, data, model):
  seen, start = [], step_lib.start
  monkeypatch.setattr(step_lib, 'start', lambda run, *args: seen.append(
      run.params) or start(run, *args))
  train_lib.train(make_config(tiny_weights, data, model), str(tmp_path),
                  progress=False)
  kernel = seen[0]['block_0']['mlp']['up']['kernel']
  assert len({str(s.index) for s in kernel.addressable_shards}
            ) == data * model
  assert_close(theta(tmp_path), theta(one))


def test_eight_devices_train_as_one(one, eight):
  assert_close(theta(eight), theta(one))
  a, b = (json.loads(pathlib.Path(w, 'summary.json').read_text())['after']
          for w in (eight, one))
  assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize('data, model', [(2, 1), (1, 2)])
def test_checkpoint_of_eight_devices_goes_on_on_fewer(
    one, eight, tiny_weights, tmp_path, data, model):
  workdir = tmp_path / 'run'
  shutil.copytree(eight, workdir)
  for path in ('checkpoints/20', 'adapter'):  # as if it had stopped at 10
    shutil.rmtree(workdir / path)
  os.remove(workdir / 'summary.json')
  summary = train_lib.train(
      make_config(tiny_weights, data, model), str(workdir), progress=False)
  assert summary['devices'] == [f'{data * model} x cpu']
  assert_close(theta(workdir), theta(one))
