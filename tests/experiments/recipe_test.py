"""The recipe of LoRA: rank and scale at every kernel, and that it runs."""

import jax
import pytest

from experiments.lowrank import recipe
from experiments.samples.tiny import tiny
import peftjax
from peftjax import bases
from peftjax import config as config_lib
from peftjax import models
from peftjax.train import train


def methods(config):
  return tuple(peftjax.load(**m) for m in config.method)


def test_the_config_is_whole():
  config = recipe.get_config()
  config_lib.check(config)
  assert config.model.weights == recipe.DEC_S
  (method,) = config.method
  # dec_s has no kernel whose smaller side is below 256.
  assert (method['rank'], method['alpha']) == (256, 512)
  assert method['rank_pattern'] == method['alpha_pattern'] == []
  assert 'sites' not in method  # every kernel
  optim = config.optim
  assert (optim.schedule, optim.warmup, optim.clip, optim.lr) == (
      'cosine', 0.1, 1.0, 5e-4)
  assert '--config=experiments/lowrank/recipe.py' in recipe.__doc__
  assert ':runlocal' in recipe.__doc__
  lower = recipe.get_config('lr=5e-5,seed=1')
  assert (lower.optim.lr, lower.seed) == (5e-5, 1)


@pytest.mark.parametrize('weights', ['gpt2', 'stories260k'])
def test_rank_is_what_a_kernel_allows_and_the_scale_two(weights):
  weights = tiny(weights) if weights == 'gpt2' else weights
  config = recipe.get_config(f'backbone={weights}')
  base = bases.shapes(weights)
  sites = peftjax.describe(
      base.model, *models.example(base.model, base.config))
  (method,) = methods(config)
  theta = jax.eval_shape(
      lambda p: peftjax.init(method, jax.random.key(0), sites, p), base.params)
  assert set(theta['lora']) == {
      p for p, s in sites.items() if peftjax.sites.kernels(s)}
  ranks = set()
  for path, t in theta['lora'].items():
    d_in, d_out = sites[path].params['kernel'].shape
    assert t['a'].shape[-1] == min(d_in, d_out, 256)
    assert method.prepare({}, peftjax.Context(path))['scale'] == 2
    ranks.add(t['a'].shape[-1])
  assert weights != 'stories260k' or len(ranks) > 1


def test_runs_locally(tmp_path):
  config = recipe.get_config('runlocal')
  assert config.steps == 2
  summary = train(config, str(tmp_path / 'run'), progress=False)
  assert summary['steps'] == 2 and summary['trained'] > 0
  assert summary['main'] in summary['after'] and summary['after']['n'] > 0
  adapter = peftjax.load_adapter(tmp_path / 'run' / 'adapter')
  assert adapter.methods[0].name == 'lora'


def test_a_bad_argument():
  with pytest.raises(ValueError, match='backbone=.no_such.: expected a folder'):
    recipe.get_config('backbone=no_such')
