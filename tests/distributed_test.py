"""Two processes train as one; when one ends, so does the other."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

import peftjax
from peftjax import checkpoint
from peftjax import distributed
from peftjax import metrics
from peftjax import sharding
from peftjax import train as train_lib
from peftjax import trees

STEPS = 24
# No subprocess lives longer, whatever happens.
LIMIT = 300

CONFIG = '''
import os
import signal

from experiments import common
from peftjax.data import pipeline

LORA = dict(name='lowrank.lora', rank=2, dropout=0.1,
            sites=dict(roles=('q', 'v', 'up', 'down')))
RULES = ((r'(query|key|value|up)/kernel', ('data', 'model')),
         (r'(out|down)/kernel', ('model', 'data')))


def fail(action, at):
  """What train_iterator is replaced by: does `action` at that batch."""
  make = pipeline.train_iterator

  def iterator(*args):
    inner = make(*args)

    class Batches:
      get_state, set_state = inner.get_state, inner.set_state

      def __next__(self):
        if inner.get_state()['next_index'] == at:
          if action == 'error':
            raise ValueError('example 7 is broken')
          os.kill(os.getpid(), getattr(signal, action))
        return next(inner)

    return Batches()

  pipeline.train_iterator = iterator


def get_config(arg=None):
  if 'TEST_FAIL' in os.environ:
    action, at = os.environ['TEST_FAIL'].split()
    fail(action, int(at))
  config = common.kmnist(
      (LORA, common.HEAD), 1e-2, 'data.train=64,data.test=40', batch=16,
      eval_batch=16, steps={steps}, log_every=1, checkpoint_every=5,
      eval_before=False, mesh=dict(data=-1, model=1))
  config.data.name, config.model.weights = 'digits', {weights!r}
  config.optim.weight_decay, config.optim.ema = 0.1, 0.5
  config.shard_rules = RULES
  for key, value in common.parse_arg(arg).items():
    common.put(config, key, value)
  return config
'''


def launch(config, workdir, devices=1, fail=None, slurm=False):
  """[(exit code, output)] of two processes.

  fail: what the second one does; slurm: as srun starts them, without addresses.
  """
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  started = []
  for i in (0, 1):
    env = dict(os.environ, XLA_FLAGS=(
        f'--xla_force_host_platform_device_count={devices}'))
    if i and fail:
      env['TEST_FAIL'] = fail
    how = [f'--coordinator=localhost:{port}', '--num_processes=2',
           f'--process_id={i}']
    if slurm:
      how = ['--distributed']
      env |= dict(SLURM_JOB_ID=str(port), SLURM_STEP_NODELIST='localhost',
                  SLURM_NTASKS='2', SLURM_PROCID=str(i), SLURM_LOCALID=str(i),
                  SLURM_STEP_NUM_NODES='1')
    started.append(subprocess.Popen(
        [sys.executable, '-m', 'peftjax.train', f'--config={config}',
         f'--workdir={workdir}', '--heartbeat_timeout=20', *how],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
  end, out = time.monotonic() + LIMIT, []
  try:
    for p in started:
      out.append((p, p.communicate(timeout=max(1, end - time.monotonic()))[0]))
  finally:
    for p in started:
      p.kill()
  return [(p.returncode, text) for p, text in out]


def saved(workdir):
  return sorted(int(n) for n in os.listdir(f'{workdir}/checkpoints')
                if n.isdigit())


def test_two_processes_fail_stop_and_go_on_as_one(tiny_weights, tmp_path):
  file = tmp_path / 'config.py'
  file.write_text(CONFIG.replace('{steps}', str(STEPS)).replace(
      '{weights!r}', repr(tiny_weights)))
  workdir = str(tmp_path / 'run')

  # What is wrong with one process ends both, with code 1.
  (code, text), (other, said) = launch(file, workdir, fail='error 3')
  assert (code, other) == (1, 1), text + said
  assert 'train: example 7 is broken' in said and 'step 3/' not in said
  assert saved(workdir) == []

  # So does the death of one.
  (code, text), (other, said) = launch(file, workdir, fail='SIGKILL 13')
  assert other == -signal.SIGKILL, said
  assert code not in (0, -signal.SIGKILL), text
  assert saved(workdir) in ([5], [5, 10])  # the last may have been cut off

  # SIGTERM to one: both stop at the same step, and the chief saves.
  (code, text), (other, said) = launch(file, workdir, fail='SIGTERM 11')
  assert (code, other) == (0, 0), text + said
  stop = 12 + train_lib.LAG
  assert 'going on from step 5 ' in text or 'going on from step 10 ' in text
  assert f'SIGTERM: saved at step {stop}' in text
  assert saved(workdir)[-1] == stop

  # The same command goes on; here with four devices that are one model axis.
  (code, text), (other, said) = launch(
      f'{file}:mesh.data=1,mesh.model=4', workdir, devices=2, slurm=True)
  assert (code, other) == (0, 0), text + said
  assert f'going on from step {stop}' in text and 'accuracy' not in said
  lines = [v['step'] for v in metrics.read(workdir) if 'loss' in v]
  assert lines == list(range(1, STEPS + 1))

  # One process on one device, which nothing interrupts, ends where they did.
  spec = importlib.util.spec_from_file_location('config', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  whole = train_lib.train(module.get_config('mesh.data=1'),
                          str(tmp_path / 'whole'), progress=False)
  a, b = (trees.flatten(peftjax.load_adapter(f'{w}/adapter').theta)
          for w in (workdir, tmp_path / 'whole'))
  assert set(a) == set(b)
  for path in a:
    x, y = np.asarray(a[path]), np.asarray(b[path])
    np.testing.assert_allclose(
        x, y, rtol=0, atol=1e-5 * np.abs(y).max(), err_msg=path)
  with open(f'{workdir}/summary.json', encoding='utf-8') as f:
    summary = json.load(f)
  assert summary['devices'] == ['4 x cpu']
  for key in ('trained', 'stored', 'base', 'steps', 'main', 'fingerprint'):
    assert summary[key] == whole[key]
  assert summary['after'] == pytest.approx(whole['after'], rel=1e-4)


# -------------------------------------------------------------------- refused
@pytest.mark.parametrize('flags, words', [
    (dict(num_processes=2), '--num_processes=2 needs --coordinator=HOST:PORT'),
    (dict(process_id=0), '--process_id=0 needs --coordinator'),
    (dict(distributed=True, num_processes=2), '--num_processes=2 needs'),
    (dict(distributed=True, coordinator='a:1'), 'expected no --coordinator'),
    (dict(coordinator='a:1'), 'needs --num_processes and --process_id'),
    (dict(coordinator='a', num_processes=2, process_id=0),
     "--coordinator='a': expected HOST:PORT"),
    (dict(coordinator='a:1', num_processes=0, process_id=0),
     '--num_processes=0: expected 1 or more'),
    (dict(coordinator='a:1', num_processes=2, process_id=2),
     '--process_id=2 with 2 processes: expected 0 to 1'),
    (dict(coordinator='a:1', num_processes=2, process_id=-1),
     'expected 0 to 1')])
def test_flags_that_do_not_go_together_are_refused(flags, words):
  with pytest.raises(ValueError, match=words):
    distributed.start(**flags)


def test_one_process_needs_no_flags():
  distributed.start()
  assert not jax.distributed.is_initialized()
  assert distributed.is_chief() and distributed.all_of(True)
  asked = lambda: True
  assert distributed.together(asked, None, 8) is asked


def test_devices_must_be_met_before_they_are_used():
  jax.devices()
  with pytest.raises(ValueError, match='cannot meet: .*before any JAX calls'):
    distributed.start('localhost:1', 2, 0)


def fake(data, model, own, monkeypatch, process):
  """A mesh over processes of `own` devices each, as one of them has it."""
  devices = [types.SimpleNamespace(process_index=i // own)
             for i in range(data * model)]
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  monkeypatch.setattr(jax, 'local_device_count', lambda: own)
  return types.SimpleNamespace(
      devices=np.array(devices).reshape(data, model), size=data * model,
      shape=dict(data=data, model=model))


@pytest.mark.parametrize('data, model, own, process, count, part', [
    (4, 1, 2, 1, 2, (1, 2)), (2, 2, 2, 1, 2, (1, 2)), (1, 4, 2, 1, 2, (0, 1)),
    (2, 4, 2, 2, 4, (1, 2)), (2, 4, 2, 3, 4, (1, 2)), (8, 1, 8, 0, 1, (0, 1)),
    (8, 2, 4, 3, 4, (3, 4))])
def test_part_of_a_batch_that_a_process_reads(
    monkeypatch, data, model, own, process, count, part):
  mesh = fake(data, model, own, monkeypatch, process)
  monkeypatch.setattr(jax, 'process_count', lambda: count)
  assert sharding.data_shard(mesh) == part


@pytest.mark.parametrize('data, model, words', [
    (2, 1, 'data=2 x model=1: process 1 has none of its 2 devices'),
    (2, 3, 'do not hold whole rows'), (3, 1, 'do not hold whole rows')])
def test_mesh_that_leaves_processes_out_is_refused(
    monkeypatch, data, model, words):
  mesh = fake(data, model, 2, monkeypatch, 0)
  count = 3 if model == 3 else 2
  monkeypatch.setattr(jax, 'process_count', lambda: count)
  with pytest.raises(ValueError, match=words):
    sharding.data_shard(mesh)


def test_bucket_is_refused_as_a_workdir(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="'gs://b/run': expected a folder"):
    with checkpoint.workdir('gs://b/run'):
      pass
  assert not os.listdir(tmp_path)
