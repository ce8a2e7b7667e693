"""What all tests share; sets the environment before jax is imported."""

import os
import pathlib


def _cache():
  """Folder of compiled programs, kept between runs of the tests."""
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return str(pathlib.Path(home) / 'peftjax' / 'xla')


os.environ['JAX_PLATFORMS'] = 'cpu'
_FLAG = '--xla_force_host_platform_device_count'
if _FLAG not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}=8'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _cache())
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
if 'PYTEST_XDIST_WORKER' in os.environ:
  # The BLAS threads of several workers wait for each other.
  for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS'):
    os.environ.setdefault(name, '1')

# pylint: disable=wrong-import-position
import jax
import numpy as np
import pytest

from peftjax import taps
from peftjax.models.vit import ViT
from peftjax.models.weights import save_weights

TINY = dict(classes=10, width=16, depth=1, heads=2, mlp_dim=32, patch=4)


@pytest.fixture(scope='session')
def tiny_weights(tmp_path_factory):
  """Path of the weights of a tiny random ViT for images [B, 8, 8, 3]."""
  shape = (1, 8, 8, 3)
  params = jax.jit(ViT(**TINY).init)(
      jax.random.key(0), np.zeros(shape, np.float32))['params']
  params = {n: v for n, v in params.items() if n != 'head'}
  path = tmp_path_factory.mktemp('weights') / 'tiny.safetensors'
  args = {k: v for k, v in TINY.items() if k != 'classes'}
  save_weights(path, params, dict(module='vit.ViT', args=args, input=shape))
  return str(path)


@pytest.fixture
def steps(monkeypatch):
  """A function: how many batches were added to states since it was asked."""
  adding, calls = taps.adding, []

  def counted(*args):
    step = adding(*args)

    def call(*args):
      jax.debug.callback(lambda: calls.append(1))
      return step(*args)

    return call

  def since():
    jax.effects_barrier()
    n = len(calls)
    calls.clear()
    return n

  monkeypatch.setattr(taps, 'adding', counted)
  return since
