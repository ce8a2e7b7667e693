"""Evaluation: means over exactly the examples there are, and the command."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from peftjax import evaluate
from peftjax import sharding
from peftjax.models.weights import load_weights, read_config, save_weights

METHODS = (dict(name='lowrank.lora', rank=2, sites=dict(roles='q')),
           dict(name='selective.full', sites=dict(roles='head')))


@pytest.fixture(scope='module')
def case(tiny_weights, tmp_path_factory):
  """An adapter with random theta, in memory and as a folder."""
  model, params = load_weights(tiny_weights, classes=10)
  images = np.random.default_rng(0).normal(size=(10, 8, 8, 3))
  arrays = dict(image=images.astype(np.float32),
                label=np.arange(10, dtype=np.int32))
  sites = peftjax.describe(model, arrays['image'])
  methods = tuple(peftjax.load(**m) for m in METHODS)
  theta = peftjax.init(methods, jax.random.key(0), sites, params)
  leaves, tree = jax.tree.flatten(theta)
  theta = tree.unflatten([v + jax.random.normal(jax.random.key(i), v.shape)
                          for i, v in enumerate(leaves)])
  path = str(tmp_path_factory.mktemp('adapter') / 'adapter')
  peftjax.save_adapter(path, methods, theta, sites, params, base=dict(
      weights=tiny_weights, classes=10, data='digits'))
  return types.SimpleNamespace(
      model=model, params=params, arrays=arrays, methods=methods, theta=theta,
      path=path, weights=tiny_weights)


def by_hand(logits, labels):
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return dict(accuracy=(logits.argmax(-1) == labels).mean(),
              loss=-log_p[np.arange(len(labels)), labels].mean(),
              n=len(labels))


@pytest.mark.parametrize('batch, data', [(10, 1), (4, 1), (3, 8), (1000, 8)])
def test_metrics_do_not_depend_on_batch_or_devices(case, batch, data):
  logits, _ = peftjax.apply(case.model, case.methods, case.params, case.theta,
                            case.arrays['image'])
  mesh = sharding.make_mesh(dict(data=data, model=1))
  everywhere = sharding.replicated(mesh)
  params, theta = (sharding.put_global(v, everywhere)
                   for v in (case.params, case.theta))
  found = evaluate.evaluate(case.model, case.methods, params, theta,
                            case.arrays, batch, mesh)
  expected = by_hand(logits, case.arrays['label'])
  assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-5)


def test_base_alone_and_one_trace(case):
  traces = []

  class Spy(type(case.model)):

    def __call__(self, images):
      traces.append(images.shape)
      return super().__call__(images)

  args = {k: getattr(case.model, k) for k in (
      'classes', 'width', 'depth', 'heads', 'mlp_dim', 'patch')}
  run = evaluate.evaluator(Spy(**args), (), case.arrays, 4)
  found = run(case.params, {})
  assert found['loss'] == pytest.approx(np.log(10), rel=1e-5)  # a head of zeros
  assert run(jax.tree.map(lambda v: v + 1, case.params), {}) != found
  assert traces == [(4, 8, 8, 3)]


def test_nan_in_the_logits_is_not_hidden(case):
  params = dict(case.params, norm=jax.tree.map(
      lambda v: v * jnp.nan, case.params['norm']))
  found = evaluate.evaluate(case.model, (), params, {}, case.arrays, 4)
  assert np.isnan(found['loss'])


def test_command_prints_base_and_adapted(case, monkeypatch, capsys):
  for flag, value in dict(_ADAPTER=case.path, _WEIGHTS=None, _DATA=None,
                          _SPLIT='validation').items():
    monkeypatch.setattr(evaluate, flag, types.SimpleNamespace(value=value),
                        raising=False)
  evaluate.main(['evaluate'])
  found = json.loads(capsys.readouterr().out)
  assert found['base']['n'] == found['adapted']['n'] == 200
  assert found['base']['loss'] == pytest.approx(np.log(10), rel=1e-5)
  assert found['adapted']['loss'] != found['base']['loss']
  assert (found['data'], found['split']) == ('digits', 'validation')
  # 2 (16 + 16) of LoRA and the head.
  assert found['trained'] == found['stored'] == 64 + 170
  monkeypatch.setattr(evaluate, '_SPLIT', types.SimpleNamespace(value='tets'))
  with pytest.raises(SystemExit, match="evaluate: digits has no split 'tets'"):
    evaluate.main(['evaluate'])


def test_adapter_of_another_base_is_refused(case, tmp_path):
  other = str(tmp_path / 'other.safetensors')
  params = {k: v for k, v in case.params.items() if k != 'head'}
  save_weights(other, jax.tree.map(lambda v: v * 2, params),
               read_config(case.weights))
  with pytest.raises(ValueError, match='another base'):
    evaluate.evaluate_adapter(case.path, weights=other)
