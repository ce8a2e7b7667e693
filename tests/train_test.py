"""The training loop: results, resuming, phases, numbers that are not finite."""

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from experiments import common
from peftjax import bases
from peftjax import config as config_lib
from peftjax import diagnose
from peftjax import evaluate
from peftjax import metrics
from peftjax import phases
from peftjax import sharding
from peftjax import step as step_lib
from peftjax import train as train_lib
from peftjax.data import pipeline
from peftjax.models.vit import ViT
from peftjax.models.weights import load_weights
from peftjax.tasks import classification, images

STEPS = 30
LORA = dict(name='lowrank.lora', rank=2, dropout=0.1, sites=dict(roles='qv'))


def make_config(weights, arg='', method=(LORA, common.HEAD)):
  """A run of seconds: a tiny ViT on 64 of scikit-learn's digits."""
  config = common.kmnist(
      method, 1e-2, f'data.train=64,data.test=40,{arg}', batch=16,
      eval_batch=16, steps=STEPS, log_every=1, checkpoint_every=5,
      mesh=dict(data=1))
  config.data.name = 'digits'
  config.model.weights = weights
  return config


@pytest.fixture
def config(tiny_weights):
  return make_config(tiny_weights)


@pytest.fixture(scope='module')
def tiny():
  """A scanned ViT, and `run(config, methods)` for the step alone."""
  model = ViT(width=8, depth=3, heads=1, mlp_dim=8, scan=True)
  x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
  params = jax.jit(model.init)(jax.random.key(0), x)['params']
  params['head']['kernel'] = jnp.ones_like(params['head']['kernel']).at[
      0].set(jnp.arange(10.0))  # zeros would let no gradient through
  sites = peftjax.describe(model, x)
  mesh = sharding.make_mesh(dict(data=1, model=1))

  def run(config, methods):
    stage = phases.schedule(methods, 10)[0]
    theta = peftjax.init(methods, jax.random.key(2), sites, params)
    task = classification.classify(
        'image', images.inputs, classes=10)
    return step_lib.Run(
        config, task, model, params, sites, mesh,
        sharding.params_sharding(mesh, (), params),
        jax.random.key(0)), stage, theta

  return types.SimpleNamespace(
      model=model, x=x, params=params, sites=sites, run=run)


class Counted:
  """Counts how often the step is traced."""

  def __init__(self):
    self.traces, self.make = 0, step_lib.make_step

  def __call__(self, *args):
    step = self.make(*args)

    def counted(*a):
      self.traces += 1
      return step(*a)

    return counted


@pytest.fixture(scope='module')
def whole(tiny_weights, tmp_path_factory):
  """A run that nothing interrupts."""
  workdir = str(tmp_path_factory.mktemp('runs') / 'whole')
  counted = Counted()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_lib, 'make_step', counted)
    summary = train_lib.train(
        make_config(tiny_weights, 'optim.ema=0.9'), workdir, progress=False)
  return types.SimpleNamespace(
      workdir=workdir, summary=summary, traces=counted.traces)


def adapter(workdir):
  return peftjax.load_adapter(os.path.join(workdir, 'adapter')).theta


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def at_batch(n, action):
  """A train_iterator that does `action` when batch n (from 0) is asked for."""
  make = pipeline.train_iterator

  def iterator(*args):
    inner = make(*args)

    class Batches:
      get_state, set_state = inner.get_state, inner.set_state

      def __next__(self):
        now = inner.get_state()['next_index']
        batch = next(inner)
        return (action(batch) or batch) if now == n else batch

    return Batches()

  return iterator


# ---------------------------------------------------------------- a whole run
def test_summary_says_what_was_done(whole):
  s = whole.summary
  assert s['after']['n'] == s['before']['n'] == 40
  assert s['before']['loss'] == pytest.approx(np.log(10), rel=1e-3)
  assert s['after']['loss'] < s['before']['loss'] - 0.05
  lora, head = 2 * 2 * (16 + 16), 16 * 10 + 10
  assert s['trained'] == s['stored'] == lora + head
  assert s['steps'] == STEPS and s['steps_per_second'] > 0
  assert s['compile_seconds'] > 0 and s['peak_bytes'] > 0
  assert len(s['fingerprint']) == 64 and s['versions']['jax'] == jax.__version__
  assert s['config']['optim']['ema'] == 0.9
  with open(os.path.join(whole.workdir, 'summary.json')) as f:
    assert json.load(f) == s


def test_step_is_traced_once(whole):
  assert whole.traces == 1


def test_metrics_hold_every_step_once(whole):
  lines = metrics.read(whole.workdir)
  assert [v['step'] for v in lines if 'loss' in v] == list(range(1, STEPS + 1))
  first = np.mean([v['loss'] for v in lines[:5]])
  last = np.mean([v['loss'] for v in lines[STEPS - 5:STEPS]])
  assert last < first - 0.1
  assert lines[-1]['test/accuracy'] == whole.summary['after']['accuracy']
  assert glob.glob(os.path.join(whole.workdir, 'tensorboard', 'events*'))


def test_adapter_is_what_was_evaluated(whole):
  found = evaluate.evaluate_adapter(os.path.join(whole.workdir, 'adapter'))
  assert found['data'] == 'digits' and found['adapted']['n'] == 797
  assert found['adapted']['accuracy'] > found['base']['accuracy']
  model, params = load_weights(whole.summary['config']['model']['weights'], 10)
  methods, theta, _ = peftjax.load_adapter(
      os.path.join(whole.workdir, 'adapter'))
  test = {k: v[:40] for k, v in
          pipeline.load_split('digits', 'test', size=8).items()}
  assert evaluate.evaluate(
      model, methods, params, theta, test, 16) == whole.summary['after']


def test_runs_that_differ_in_rate_steps_and_seed_share_a_program(tiny):
  texts = []
  for lr, steps, seed in ((1e-3, 10, 0), (3e-3, 7, 1)):
    config = config_lib.defaults()
    config.batch, config.optim.lr, config.optim.groups.head.lr = 4, lr, 2.0
    run, _, theta = tiny.run(config, peftjax.load('lowrank.lora', rank=1))
    run = run._replace(key=jax.random.key(seed))
    stage = phases.schedule(peftjax.load('lowrank.lora', rank=1), steps)[0]
    state = step_lib.start(run, stage, theta, 0)
    lowered, _ = step_lib.lower_step(
        run, stage, state, dict(image=tiny.x, label=jnp.arange(4)))
    texts.append(lowered.as_text())
  assert texts[0] == texts[1]


def test_average_by_hand(tiny):
  config = config_lib.defaults()
  config.batch, config.optim.ema = 4, 0.75
  run, stage, theta = tiny.run(config, peftjax.load('lowrank.lora', rank=1))
  state = step_lib.start(run, stage, theta, 0)
  batch = dict(image=tiny.x, label=jnp.arange(4))
  step, _ = step_lib.compile_step(run, stage, state, batch)
  pace = step_lib.pace_of(run, stage)
  average = jax.tree.map(np.asarray, state['trained'])
  for _ in range(3):
    state, _ = step(state, run.params, batch, pace)
    average = jax.tree.map(lambda a, v: 0.75 * a + 0.25 * np.asarray(v),
                           average, state['trained'])
  best = step_lib.best(state)
  for a, b, c in zip(*map(jax.tree.leaves, (
      best, average, step_lib.theta_of(state)))):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert np.abs(a - c).max() > 1e-5


def test_run_cut_off_before_its_summary_only_ends(
    whole, tiny_weights, tmp_path, monkeypatch):
  shutil.copytree(whole.workdir, tmp_path / 'run')
  os.remove(tmp_path / 'run' / 'summary.json')
  monkeypatch.setattr(step_lib, 'compile_step', None)
  summary = train_lib.train(
      make_config(tiny_weights, 'optim.ema=0.9'), str(tmp_path / 'run'), False)
  assert summary == dict(whole.summary, adapter=summary['adapter'])
  assert metrics.read(tmp_path / 'run') == metrics.read(whole.workdir)


def test_a_finished_run_is_not_run_again(whole, tiny_weights, monkeypatch):
  monkeypatch.setattr(step_lib, 'compile_step', None)
  config = make_config(tiny_weights, 'optim.ema=0.9')
  assert train_lib.train(config, whole.workdir, False) == whole.summary
  config.optim.lr = 0.02
  with pytest.raises(
      ValueError, match='optim.lr: 0.01 in the checkpoint, 0.02'):
    train_lib.train(config, whole.workdir, False)


# --------------------------------------------------------------------- resuming
def test_sigterm_saves_and_the_same_command_goes_on(
    whole, tiny_weights, tmp_path, monkeypatch):
  config = make_config(tiny_weights, 'optim.ema=0.9')
  before = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    patch.setattr(pipeline, 'train_iterator', at_batch(
        12, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    assert train_lib.train(config, str(tmp_path), False) == dict(stopped_at=13)
  assert signal.getsignal(signal.SIGTERM) is before
  assert not os.path.exists(tmp_path / 'summary.json')
  summary = train_lib.train(config, str(tmp_path), False)
  assert_same(adapter(tmp_path), adapter(whole.workdir))
  assert summary['after'] == whole.summary['after']
  assert metrics.read(tmp_path) == metrics.read(whole.workdir)


DRIVER = """
import os, signal, sys
sys.path[:0] = {path!r}
import train_test
from peftjax import train as train_lib
from peftjax.data import pipeline
kill = lambda _: os.kill(os.getpid(), signal.SIGKILL)
pipeline.train_iterator = train_test.at_batch(17, kill)
config = train_test.make_config({weights!r}, 'optim.ema=0.9')
train_lib.train(config, {workdir!r})
"""


def test_kill_9_and_the_same_command_ends_in_the_same_theta(
    whole, tiny_weights, tmp_path):
  workdir = str(tmp_path / 'run')
  here = os.path.dirname(os.path.abspath(__file__))
  code = DRIVER.format(path=[here, os.path.dirname(here)], weights=tiny_weights,
                       workdir=workdir)
  done = subprocess.run([sys.executable, '-c', code], capture_output=True,
                        text=True, check=False)
  assert done.returncode == -signal.SIGKILL, done.stderr
  # The last save may have been cut off too; the one before cannot have been.
  saved = max(int(n) for n in os.listdir(f'{workdir}/checkpoints')
              if n.isdigit())
  assert saved in (10, 15)
  # Lines beyond the checkpoint, and one that was cut off, are written again.
  with open(f'{workdir}/metrics.jsonl', 'a') as f:
    f.write('{"step": 17, "lo')
  train_lib.train(make_config(tiny_weights, 'optim.ema=0.9'), workdir, False)
  assert_same(adapter(workdir), adapter(whole.workdir))
  assert metrics.read(workdir) == metrics.read(whole.workdir)


def test_damaged_newest_checkpoint_costs_five_steps_and_nothing_else(
    whole, tiny_weights, tmp_path, monkeypatch):
  config = make_config(tiny_weights, 'optim.ema=0.9')
  with monkeypatch.context() as patch:
    patch.setattr(pipeline, 'train_iterator', at_batch(
        14, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    train_lib.train(config, str(tmp_path), False)
  for path in glob.glob(str(tmp_path / 'checkpoints/15/state/*/d/*')):
    with open(path, 'r+b') as f:
      f.truncate(10)
  train_lib.train(config, str(tmp_path), False)
  assert_same(adapter(tmp_path), adapter(whole.workdir))
  assert metrics.read(tmp_path) == metrics.read(whole.workdir)


# ----------------------------------------------------------------------- phases
def test_phases_switch_theta_and_resume(tiny_weights, tmp_path, monkeypatch):
  method = (dict(name='sparse.diff_pruning', density=0.05,
                 sites=dict(path='mlp', leaf='kernel')), common.HEAD)
  config = make_config(tiny_weights, 'steps=8,checkpoint_every=3', method)
  counted = Counted()
  with monkeypatch.context() as patch:
    patch.setattr(step_lib, 'make_step', counted)
    summary = train_lib.train(config, str(tmp_path / 'a'), False)
  assert counted.traces == 2
  kept = int(0.05 * (2 * 16 * 32 + 16 + 32))
  assert summary['trained'] == kept + 16 * 10 + 10
  assert summary['stored'] == 2 * kept + 16 * 10 + 10
  # Once in the first phase's last step, whose checkpoint is not yet converted,
  # and once in the second phase.
  for n in (3, 5):
    with monkeypatch.context() as patch:
      patch.setattr(pipeline, 'train_iterator', at_batch(
          n, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
      train_lib.train(config, str(tmp_path / 'b'), False)
  train_lib.train(config, str(tmp_path / 'b'), False)
  assert_same(adapter(tmp_path / 'b'), adapter(tmp_path / 'a'))


@pytest.mark.parametrize('ema, moves', [(0.0, True), (0.99999, False)])
def test_a_last_phase_without_steps_is_made_of_the_average(
    tiny_weights, tmp_path, ema, moves):
  method = (dict(name='lowrank.selective_lora', rank=2, lam=0.0,
                 sites=dict(path='mlp', leaf='kernel')), common.HEAD)
  config = make_config(tiny_weights, f'steps=3,optim.ema={ema}', method)
  train_lib.train(config, str(tmp_path), False)
  theta = peftjax.load_adapter(str(tmp_path / 'adapter')).theta
  b = max(np.abs(t['b']).max() for t in theta['selective_lora'].values())
  assert (b > 1e-4) == moves  # B starts at 0, and so does the average


# ----------------------------------------------------------- what is not finite
def poison(batch):
  batch['image'][3, 2, 2, 0] = np.nan
  return batch


def test_nan_in_a_batch_stops_at_its_step_and_site(
    whole, tiny_weights, tmp_path, monkeypatch):
  config = make_config(tiny_weights, 'optim.ema=0.9')
  monkeypatch.setattr(pipeline, 'train_iterator', at_batch(12, poison))
  with pytest.raises(FloatingPointError, match=(
      "step 12 .*output of 'patch'.*last checkpoint is of step 10")):
    train_lib.train(config, str(tmp_path), False)
  assert [v['step'] for v in metrics.read(tmp_path)] == list(range(1, 13))
  # The last good checkpoint leads to where an undisturbed run ends.
  monkeypatch.undo()
  train_lib.train(config, str(tmp_path), False)
  assert_same(adapter(tmp_path), adapter(whole.workdir))


def test_step_too_large_is_not_saved_and_exits_with_an_error(
    config, tmp_path, monkeypatch):
  config.optim.lr, config.checkpoint_every = 1e38, 1
  config.optim.groups.head.lr = 10.0
  monkeypatch.setattr(train_lib, '_CONFIG', types.SimpleNamespace(value=config),
                      raising=False)
  monkeypatch.setattr(train_lib, '_WORKDIR', types.SimpleNamespace(
      value=str(tmp_path)), raising=False)
  with pytest.raises(SystemExit, match=(
      "^train: not finite in step 0 .* new value of 'full/head/.*no checkpoint "
      r'yet.*optim.lr \(1e\+38\)')) as e:
    train_lib.main(['train'])
  assert e.value.code != 0
  assert not glob.glob(str(tmp_path / 'checkpoints' / '[0-9]*'))


def test_blame_of_a_gradient_and_of_a_scanned_layer(tiny):

  def layer(f, x, t, ctx):
    del ctx
    return f(x) + jnp.sqrt(t['a'] ** 2)  # has no gradient at 0

  root = peftjax.Method(
      'root', peftjax.select(roles='up'), layer=layer,
      init=lambda key, site, p, stats: dict(a=jnp.zeros(())))
  run, stage, theta = tiny.run(config_lib.defaults(), root)
  find = lambda theta: diagnose.nonfinite_site(
      tiny.model, root, tiny.params, theta, tiny.sites, tiny.x)
  assert find(theta) is None
  assert find(jax.tree.map(lambda v: v.at[1:].set(jnp.inf), theta)
             ) == 'blocks/mlp/up (layer 1)'
  state = step_lib.start(run, stage, theta, 0)
  tx, _, _ = step_lib.layout(run, stage, theta)
  assert step_lib.blame(run, stage, tx, state, 0, dict(
      image=tiny.x, label=jnp.arange(4))
                       ) == "in the gradient of 'root/blocks/mlp/up/a'"


# ---------------------------------------------------------------- other modes
def test_bfloat16_scanned_rematerialised_with_evaluation_between(
    config, tmp_path):
  config.dtype, config.model.scan, config.model.remat = 'bfloat16', True, True
  config.steps, config.eval_every, config.loss.label_smoothing = 4, 2, 0.1
  config.mesh.data = 2
  summary = train_lib.train(config, str(tmp_path), False)
  lines = [v['step'] for v in metrics.read(tmp_path) if 'test/loss' in v]
  assert lines == [2, 4]
  theta = adapter(tmp_path)['lora']
  assert set(theta) == {'blocks/attn/query', 'blocks/attn/value'}
  assert {v.dtype for v in jax.tree.leaves(theta)} == {jnp.dtype('float32')}
  assert np.isfinite(summary['after']['loss'])
  assert summary['devices'] == ['2 x cpu']


# ---------------------------------------------------------------- bad configs
@pytest.mark.parametrize('change, words', [
    (lambda c: c.optim.update(dict(lrr=1.0)), "key 'optim.lrr'.*'lr'"),
    (lambda c: c.__delitem__('batch'), "lacks the key 'batch'.*default is 32"),
    (lambda c: c.optim.update(schedule='cosin'), "'cosin'.*'cosine'"),
    (lambda c: c.update(dtype='float64'), "dtype='float64'.*'float32'"),
    (lambda c: c.update(batch=0), 'batch=0: expected at least 1'),
    (lambda c: c.update(batch=100), 'batch_size 100 with 64 examples'),
    (lambda c: c.data.update(train=10**6), '1000000 images of digits train'),
    (lambda c: c.data.update(name='kmist'), "'kmist'.*kmnist"),
    (lambda c: c.optim.update(warmup=1.0), r'optim.warmup=1.0: .*\[0, 1\)'),
    (lambda c: c.update(method=()), r'method=\(\): expected a tuple'),
    (lambda c: c.update(method=(dict(rank=2),)), "{'rank': 2}: .* a name"),
    (lambda c: c.update(method=(dict(name='lowrank.lara'),)),
     "'lowrank.lara'.*'lowrank.lora'"),
    (lambda c: c.update(method=(dict(name='lowrank.lora', rnk=2),)),
     "'rnk'.*'rank'"),
    (lambda c: c.model.update(name='encoder'), "model.name='vit'"),
    (lambda c: c.mesh.update(model=16), 'needs 16 devices'),
    (lambda c: c.update(shard_rules=(('kernul', ('model',)),)), "'kernul'"),
    (lambda c: c.optim.groups.update(dict(hed=dict(lr=2.0))), "'hed'.*'head'"),
])
def test_bad_config_is_refused_before_any_step(
    config, tmp_path, monkeypatch, change, words):
  monkeypatch.setattr(step_lib, 'compile_step', None)
  with config.unlocked(), config.ignore_type():
    change(config)
  with pytest.raises(ValueError, match=words):
    train_lib.train(config, str(tmp_path), False)
  assert not glob.glob(str(tmp_path / 'checkpoints' / '[0-9]*'))


def test_base_with_nan_and_unwritable_workdir_are_refused(
    config, tmp_path, monkeypatch):
  load = bases.load_weights

  def spoiled(*args, **kwargs):
    model, params = load(*args, **kwargs)
    params['norm']['scale'] = params['norm']['scale'].at[0].set(jnp.nan)
    return model, params

  monkeypatch.setattr(bases, 'load_weights', spoiled)
  with pytest.raises(ValueError, match='NaN or infinity in norm/scale'):
    train_lib.train(config, str(tmp_path / 'run'), False)
  monkeypatch.setattr(bases, 'load_weights', None)
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot be written'):
    train_lib.train(config, str(tmp_path / 'file' / 'run'), False)


@pytest.mark.parametrize('text, words', [
    ('def get_config(:\n  return 1\n', ('broken.py', 'line 1', 'SyntaxError')),
    (None, ('broken.py', 'No such file'))])
def test_config_file_that_cannot_be_read(tmp_path, text, words):
  path = tmp_path / 'broken.py'
  if text:
    path.write_text(text)
  done = subprocess.run(
      [sys.executable, '-m', 'peftjax.train', f'--config={path}',
       f'--workdir={tmp_path / "run"}'],
      capture_output=True, text=True, check=False)
  assert done.returncode != 0
  for word in words:
    assert word in done.stderr
  assert not (tmp_path / 'run').exists()


# ----------------------------------------------------------- config arguments
def test_config_arguments_are_typed():
  found = common.parse_arg('runlocal,seed=3,lr=1e-3,model.scan=true')
  assert found['runlocal'] is True and found['steps'] == 2
  assert (found['seed'], found['optim.lr']) == (3, 0.001)
  config = common.kmnist(
      (common.HEAD,), 1e-2, 'runlocal,seed=3,model.scan=true')
  assert (config.steps, config.seed, config.optim.lr) == (2, 3, 0.01)
  assert config.model.scan is True
  config_lib.check(config)
  assert common.parse_arg(None) == {}


@pytest.mark.parametrize('arg, words', [
    ('sed=3', "'sed=3'.*'seed'"), ('runlocl', "'runlocl'.*'runlocal'"),
    ('seed', "'seed': expected runlocal or key=value"),
    ('seed=1.5', "seed='1.5': expected a int"),
    ('model.scan=yes', 'True or False'), ('method=x', "'method=x'")])
def test_config_arguments_that_are_wrong_are_refused(arg, words):
  with pytest.raises(ValueError, match=words):
    common.parse_arg(arg)
  with pytest.raises(ValueError, match="no key 'stps'.*'steps'"):
    common.kmnist((common.HEAD,), 1e-2, stps=3)


# --------------------------------------------------------- from an adapter on
def test_training_goes_on_from_an_adapter(tiny_weights, tmp_path):
  first = train_lib.train(make_config(tiny_weights, 'steps=2'),
                          tmp_path / 'a', progress=False)
  config = make_config(tiny_weights, 'steps=2,lr=0')
  config.start, config.optim.groups.head.lr_abs = first['adapter'], 0.0
  second = train_lib.train(config, tmp_path / 'b', progress=False)
  a, b = (peftjax.load_adapter(s['adapter']).theta for s in (first, second))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)
  assert second['before'] == first['after']
  config.method = (dict(LORA, rank=3), common.HEAD)
  with pytest.raises(ValueError, match=r"start=.*'lora/.*/a' has shape"):
    train_lib.train(config, tmp_path / 'c', progress=False)
  config.method = (dict(LORA, alpha=4.0), common.HEAD)
  with pytest.raises(ValueError, match='makes another function of it'):
    train_lib.train(config, tmp_path / 'd', progress=False)
