"""The fold command: weights that equal the adapted model, or a reason."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
import peftjax.fold
from peftjax.models import vit
from peftjax.models import weights
import pytest


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
def vit_adapter(tmp_path_factory):
  """An adapter of a small transformer, scanned, with a new head."""
  folder = tmp_path_factory.mktemp('fold')
  args = dict(classes=5, width=8, depth=1, heads=2, mlp_dim=16, patch=4)
  config = dict(module='vit.ViT', args=args, input=[1, 8, 8, 3])
  x = jnp.zeros(config['input'])
  params = filled(vit.ViT(**args).init, jax.random.key(0), x)['params']
  file = str(folder / 'base.safetensors')
  weights.save_weights(file, params, config)
  model, params = weights.load_weights(file, classes=3, scan=True)
  methods = (peftjax.load('selective.full', sites=dict(roles='head')),
             peftjax.load('lowrank.lora', rank=2))
  sites = peftjax.describe(model, x)
  theta = random_theta(methods, sites, params)
  peftjax.save_adapter(folder / 'a', methods, theta, sites, params, dict(
      weights=file, classes=3, scan=True))
  return folder, model, methods, params, theta


def test_fold_command_writes_weights_that_equal_the_adapted_model(vit_adapter):
  folder, model, methods, params, theta = vit_adapter
  out = folder / 'out' / 'plain.safetensors'
  done = subprocess.run(
      [sys.executable, '-m', 'peftjax.fold', f'--adapter={folder / "a"}',
       f'--out={out}'], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert 'folded full, lora' in done.stdout
  assert 'units in the last place' in done.stdout
  assert 'RuntimeWarning' not in done.stderr
  plain, folded = weights.load_weights(out)
  assert plain.classes == 3 and not plain.scan
  assert callable(peftjax.fold)  # the command's name does not hide it
  x = jax.random.normal(jax.random.key(5), (4, 8, 8, 3))
  adapted, _ = jax.jit(lambda t: peftjax.apply(
      model, methods, params, t, x))(theta)
  got = jax.jit(plain.apply)({'params': folded}, x)
  np.testing.assert_allclose(got, adapted, rtol=0, atol=1e-5)
  assert np.abs(adapted).max() > 0.1


def test_fold_report_shows_a_wrong_fold(vit_adapter, monkeypatch):
  folder, *_ = vit_adapter
  module = sys.modules['peftjax.fold']
  real = module.fold

  def wrong(*args):
    folded = real(*args)
    folded['head']['bias'] += 0.01
    return folded

  monkeypatch.setattr(module, 'fold', wrong)
  off = module.fold_adapter(folder / 'a', folder / 'b.safetensors')
  assert off['max_abs'] == pytest.approx(0.01, rel=1e-3)
  ulp = np.spacing(np.float32(off['largest']))
  assert off['max_ulp'] == pytest.approx(off['max_abs'] / ulp, rel=0.51)
  assert off['max_ulp'] > 1e4


def test_fold_refuses(vit_adapter, tmp_path, monkeypatch):
  folder, model, methods, params, theta = vit_adapter
  out = tmp_path / 'out.safetensors'
  module = sys.modules['peftjax.fold']
  fold_adapter, real = module.fold_adapter, module.load_adapter
  monkeypatch.setattr(module, 'load_adapter', lambda *a: real(*a)._replace(
      methods=(methods[0], methods[1]._replace(fold=None))))
  with pytest.raises(ValueError, match='lora has no fold: it changes activat'):
    fold_adapter(folder / 'a', out)
  monkeypatch.undo()
  with pytest.raises(ValueError, match="expected a file named '.*safetensors'"):
    fold_adapter(folder / 'a', tmp_path / 'out.bin')
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot write'):
    fold_adapter(folder / 'a', tmp_path / 'file' / 'out.safetensors')
  sites = peftjax.describe(model, jnp.zeros((1, 8, 8, 3)))
  peftjax.save_adapter(tmp_path / 'a', methods, theta, sites, params)
  with pytest.raises(ValueError, match='does not name its base; give --weigh'):
    fold_adapter(tmp_path / 'a', out)
  other = jax.tree.map(lambda v: v + 1, params)
  peftjax.save_adapter(tmp_path / 'a', methods, theta, sites, other, dict(
      peftjax.load_adapter(folder / 'a').meta['base']))
  with pytest.raises(ValueError, match='trained on another base'):
    fold_adapter(tmp_path / 'a', out)
  assert not out.exists()
