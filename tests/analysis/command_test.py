"""`python -m peftjax.analysis`: what it prints, writes and refuses."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax import analysis
from peftjax.analysis import effective_rank, intruder_dimensions
from peftjax.models import weights
import pytest


def save(folder, base, model, params, *methods):
  """An adapter away from its start."""
  sites = peftjax.describe(model, jnp.zeros((1, 8, 8, 3)))
  theta = peftjax.init(methods, jax.random.key(0), sites, params)
  trained, frozen = peftjax.partition(methods, theta)
  rng = np.random.default_rng(0)
  trained = jax.tree.map(
      lambda v: v + np.float32(rng.normal(size=v.shape)), trained)
  theta = peftjax.combine(trained, frozen)
  peftjax.save_adapter(folder, methods, theta, sites, params, base)
  return sites, theta


@pytest.fixture
def base(tiny_weights):
  model, params = weights.load_weights(tiny_weights, classes=3, scan=True)
  return dict(weights=tiny_weights, classes=3, scan=True), model, params


HEAD = dict(name='selective.full', sites=dict(roles='head'))


def test_prints_every_kernel_that_changed(base, tmp_path):
  lora = peftjax.load('lowrank.lora', rank=2, sites=dict(roles=['q', 'up']))
  methods = lora, peftjax.load(**HEAD)
  said, model, params = base
  sites, theta = save(tmp_path / 'a', *base, *methods)
  out = tmp_path / 'report.json'
  done = subprocess.run(
      [sys.executable, '-m', 'peftjax.analysis', f'--adapter={tmp_path / "a"}',
       f'--out={out}', '--top=4', '--p=0.8'],
      capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  report = json.loads(out.read_text())
  names = ['blocks/attn/query (layer 0)', 'blocks/mlp/up (layer 0)']
  assert list(report['kernels']) == names
  assert report['methods'] == ['lora', 'full']
  assert report['settings'] == dict(top=4, eps=0.5, near=0.05, p=0.8)
  assert set(report['unchanged']) == {
      'patch', *(f'blocks/{n} (layer 0)' for n in (
          'attn/key', 'attn/value', 'attn/out', 'mlp/down'))}
  assert all(f'| {n} | ' in done.stdout for n in names)
  assert 'r(0.8) delta' in done.stdout and 'of 4' in done.stdout
  assert '2 kernels; 5 further kernels are' in done.stdout
  tuned = peftjax.fold(methods, params, theta, sites)
  found = intruder_dimensions.report(params, tuned, sites, 4)
  ranks = effective_rank.report(params, tuned, sites, 0.8)
  for name, row in report['kernels'].items():
    assert row['intruders']['intruders'] == found[name]['intruders']
    np.testing.assert_allclose(
        row['intruders']['cosines'], found[name]['cosines'], rtol=1e-4)
    assert row['rank'] == ranks[name]['rank'] and row['rank']['delta'] <= 2
    np.testing.assert_allclose(
        row['spectra']['base'], ranks[name]['spectra']['base'], rtol=1e-4)
    assert f'{row["norm"]["delta"] / row["norm"]["base"]:.2e}' in done.stdout


def test_refuses_what_it_cannot_analyse(base, tmp_path, monkeypatch):
  said, model, params = base
  save(tmp_path / 'a', *base, peftjax.load('lowrank.lora', rank=2))
  real = analysis.load_adapter
  monkeypatch.setattr(analysis, 'load_adapter', lambda *a: real(*a)._replace(
      methods=(real(*a).methods[0]._replace(fold=None),)))
  with pytest.raises(ValueError, match='lora has no fold: it changes activat'):
    analysis.analyse(tmp_path / 'a')
  monkeypatch.undo()
  save(tmp_path / 'b', *base, peftjax.load(**HEAD))
  with pytest.raises(ValueError, match='full changed no kernel but those of h'):
    analysis.analyse(tmp_path / 'b')
  save(tmp_path / 'c', '', model, params, peftjax.load('lowrank.lora', rank=2))
  with pytest.raises(ValueError, match='does not name its base; give --weigh'):
    analysis.analyse(tmp_path / 'c')
  other = jax.tree.map(lambda v: v + 1, params)
  save(tmp_path / 'd', said, model, other,
       peftjax.load('lowrank.lora', rank=2))
  with pytest.raises(ValueError, match='trained on another base'):
    analysis.analyse(tmp_path / 'd')


def test_the_command_says_why(base, tmp_path):
  save(tmp_path / 'a', *base, peftjax.load(**HEAD))
  done = subprocess.run(
      [sys.executable, '-m', 'peftjax.analysis', f'--adapter={tmp_path / "a"}'],
      capture_output=True, text=True, check=False)
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  assert 'analysis: ' in done.stderr and 'nothing to analyse' in done.stderr
