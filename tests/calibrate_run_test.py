"""Calibration in training: broken off, resumed, other data, plans, banks."""

import functools
import os
import signal

import jax
import numpy as np
import pytest

import peftjax
from experiments import common
from peftjax import bank
from peftjax import calibrate
from peftjax import case as case_lib
from peftjax import compile as compile_lib
from peftjax import train as train_lib
from peftjax.data import pipeline

SITES = dict(path='mlp|attn', leaf='kernel')
GA = dict(name='lowrank.lora_ga', rank=2, sites=SITES)


def make_config(weights, arg='', method=GA, **more):
  """A run of seconds: a tiny ViT on 64 of scikit-learn's digits."""
  config = common.kmnist(
      (method, common.HEAD), 1e-2, f'data.train=64,data.test=40,{arg}',
      batch=16, eval_batch=16, steps=4, checkpoint_every=1, mesh=dict(data=1),
      eval_before=False, calibrate=dict(batches=3), **more)
  config.data.name = 'digits'
  config.model.weights = weights
  return config


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def broken(batches, after):
  """The batches, broken off after so many; None: all of them."""
  for i, batch in enumerate(batches):
    if i == after:
      raise KeyboardInterrupt
    yield batch


def theta_of(summary):
  return peftjax.load_adapter(summary['adapter']).theta


@pytest.fixture(scope='module')
def whole(tiny_weights, tmp_path_factory):
  return train_lib.train(make_config(tiny_weights), str(
      tmp_path_factory.mktemp('runs') / 'whole'), progress=False)


def test_a_run_collects_before_its_first_step(whole, tiny_weights):
  """A0 has the singular vectors of a gradient that is not 0, as its head is."""
  theta = theta_of(whole)['lora_ga']
  run, _, case = train_lib.prepare(make_config(tiny_weights))
  assert set(run.stats) == {'lora_ga'} and set(run.stats['lora_ga']) == {
      *theta}
  assert not np.any(case.base.params['head']['kernel'])  # as ever
  for path, t in theta.items():
    u = np.linalg.svd(run.stats['lora_ga'][path]['gradient'])[0][:, :2]
    size = np.linalg.norm(t['a0'], axis=0)
    np.testing.assert_allclose(np.abs((t['a0'] * u).sum(0)), size, rtol=1e-3)
    assert np.abs(t['a'] - t['a0']).max() > 1e-4


def test_killed_in_calibration_and_stopped_in_training_it_ends_the_same(
    whole, tiny_weights, tmp_path, monkeypatch, steps):
  config, make = make_config(tiny_weights), pipeline.train_iterator
  monkeypatch.setattr(
      calibrate, 'collect', functools.partial(calibrate.collect, every=1))
  made = []

  def killed(*args):
    made.append(1)  # for the head, and for the method
    return broken(make(*args), 2 if len(made) == 2 else None)

  with monkeypatch.context() as patch:
    patch.setattr(pipeline, 'train_iterator', killed)
    with pytest.raises(KeyboardInterrupt):
      train_lib.train(config, str(tmp_path), False)
  assert steps() == 3 + 2

  def stopped(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return make(*args)

  with monkeypatch.context() as patch:
    patch.setattr(pipeline, 'train_iterator', stopped)
    assert train_lib.train(config, str(tmp_path), False) == dict(stopped_at=1)
  assert steps() == 1
  summary = train_lib.train(config, str(tmp_path), False)
  assert not steps()
  same(theta_of(summary), theta_of(whole))
  config.calibrate.batches = 2
  with pytest.raises(ValueError, match=(
      "was collected with calibrate={.*'batches': 3")):
    train_lib.train(config, str(tmp_path), False)


def test_an_adapter_to_start_from_needs_no_calibration(
    whole, tiny_weights, tmp_path, monkeypatch):
  config = make_config(tiny_weights, 'steps=1,lr=0')
  config.start, config.optim.groups.head.lr_abs = whole['adapter'], 0.0
  monkeypatch.setattr(calibrate, 'collect', None)
  run, _, _ = train_lib.prepare(config)
  for v in jax.tree.leaves(run.stats):  # shapes alone: one number each
    assert isinstance(v, np.ndarray) and not any(v.strides)
  same(theta_of(train_lib.train(config, str(tmp_path), False)), theta_of(whole))


def test_gradients_are_those_of_the_loss_that_is_trained_on(
    tiny_weights, monkeypatch):
  collect, tasks = calibrate.collect, []

  def seen(model, params, sites, task, *args, **kwargs):
    tasks.append(task)
    return collect(model, params, sites, task, *args, **kwargs)

  monkeypatch.setattr(calibrate, 'collect', seen)
  config = make_config(tiny_weights, loss=dict(label_smoothing=0.3))
  _, _, case = train_lib.prepare(config)
  logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
  batch = dict(label=np.arange(4))
  assert len(tasks) == 2  # for the head, and for the method
  for task in tasks:
    got, _ = task.loss(logits, batch, None)
    for smoothing in (0.3, None):
      want, _ = case.task.loss(logits, batch, smoothing)
      assert np.allclose(got, want, rtol=1e-6) == bool(smoothing)


def test_two_devices_start_from_the_same_theta(tiny_weights):
  found = []
  for devices in (1, 2):
    config = make_config(tiny_weights)
    config.mesh.data = devices
    run, stages, case = train_lib.prepare(config)
    found.append(train_lib.first_theta(run, stages[0], case.base.params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *found)


@pytest.mark.parametrize('words, rows', [
    (dict(), 16), (dict(batch=5), 5),
    (dict(split='test[:20]', batch=5), 5),
    (dict(name='digits', split='test[:20]', batches=2, batch=10), 10)])
def test_batches_are_those_the_config_says(
    tiny_weights, monkeypatch, words, rows):
  seen = []

  def collect(model, params, sites, task, batches, *args, **kwargs):
    seen.append([[b['image'] for b in batches()] for _ in range(2)])
    return {}

  monkeypatch.setattr(calibrate, 'collect', collect)
  config = make_config(tiny_weights, method=dict(
      name='lowrank.corda', rank=2, sites=SITES))
  config.calibrate.update(words)
  train_lib.prepare(config)
  (first, again), = seen
  same(first, again)
  assert [len(b) for b in first] == [rows] * config.calibrate.batches
  split = 'test' if 'split' in words else 'train'
  known = {v.tobytes() for v in pipeline.load_split(
      'digits', split, size=8)['image'][:20 if 'split' in words else 64]}
  assert {v.tobytes() for b in first for v in b} <= known


def test_another_set_has_its_own_options(tiny_weights, monkeypatch):
  seen, load = [], case_lib.load

  def spy(config, splits, *args, **kwargs):
    seen.append((config.data.to_dict(), splits))
    if len(seen) > 1:
      raise KeyboardInterrupt
    found = load(config, splits, *args, **kwargs)
    config.data.options = dict(labelled=True)  # none of the other set's
    return found

  monkeypatch.setattr(case_lib, 'load', spy)
  config = make_config(tiny_weights)
  config.calibrate.update(name='file:a.csv', split='dev', options=dict(
      columns=dict(text='review')))
  with pytest.raises(KeyboardInterrupt):
    train_lib.prepare(config)
  own, splits = seen[1]
  assert (own['name'], own['train'], splits) == ('file:a.csv', 0, ('train',))
  assert own['options'] == dict(columns=dict(text='review'))
  assert own['splits']['train'] == 'dev'
  assert config.data.name == 'digits'


def test_sets_that_the_task_cannot_read_are_refused(tiny_weights, tmp_path):
  for words, message in (
      (dict(name='digit'), "'digit'"),
      (dict(path='/nowhere'), "path='/nowhere': digits has no folder"),
      (dict(options=dict(columns={})), "digits takes no option 'columns'"),
      (dict(batches=0), 'calibrate.batches=0: expected at least 1')):
    config = make_config(tiny_weights)
    config.calibrate.update(words)
    with pytest.raises(ValueError, match=message):
      train_lib.train(config, str(tmp_path), False)


def test_a_plan_needs_no_statistics(tiny_weights):
  config = make_config(tiny_weights)
  config.mesh.data = 8
  found = compile_lib.setup(config, jax.devices())
  shapes = jax.tree.map(lambda v: v.shape, found.state['trained']['lora_ga'])
  assert {t['a'][1] for t in shapes.values()} == {2}
  assert compile_lib.compile_step(found)['batch'] == 16


def test_a_bank_refuses(tiny_weights, tmp_path):
  with pytest.raises(ValueError, match=(
      "a bank cannot train 'lowrank.lora_ga', which starts from statistics")):
    bank.train(make_config(tiny_weights), [{}, dict(seed=1)], str(tmp_path))
