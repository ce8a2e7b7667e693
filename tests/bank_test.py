"""Banks: members against single runs, one base, members that stop, resuming."""

import contextlib
import json
import os
import re
import types

import jax
import numpy as np
import pytest

import peftjax
from experiments import common
from peftjax import bank
from peftjax import evaluate
from peftjax import metrics
from peftjax import phases
from peftjax import program
from peftjax import step as run_step
from peftjax import train as train_lib
from peftjax.apply import graft
from peftjax.bank import __main__ as command
from peftjax.bank import members as members_lib
from peftjax.bank import step as step_lib

STEPS = 6
LORA = dict(name='lowrank.lora', rank=2, dropout=0.1)
METHODS = dict(
    lora=LORA, oft=dict(name='orthogonal.oft', block_size=4),
    bitfit=dict(name='selective.bitfit'), ssf=dict(name='scaling.ssf'))
# Seed, rate and data: other numbers, the same program.
MEMBERS = [dict(seed=0), {'seed': 3, 'optim.lr': 3e-3, 'data.train': 48}]


def make_config(weights, method, **more):
  """A run of seconds: a tiny ViT on 64 of scikit-learn's digits."""
  config = common.kmnist(
      (*method, common.HEAD), 1e-2, 'data.train=64,data.test=40', batch=16,
      eval_batch=40, steps=STEPS, log_every=1, checkpoint_every=0,
      mesh=dict(data=1), eval_before=False, **more)
  config.data.name = 'digits'
  config.model.weights = weights
  # Biases of keys have no gradient but rounding, which Adam would blow up.
  config.optim.eps = 1e-4
  return config


def theta_of(summary):
  return peftjax.load_adapter(summary['adapter']).theta


def assert_close(a, b, **tolerance):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance)


def single(config, changes, workdir):
  """The run of `peftjax.train` that a member should be."""
  one, = members_lib.expand(config, [changes]).values()
  return train_lib.train(one, str(workdir), progress=False)


def compiled(config, count):
  """(costs of a bank's step, of a single one, bytes held once, HLO)."""
  run, (stage,), case = train_lib.prepare(config)
  row, base = case.sample('train'), case.base.params
  theta = train_lib.first_theta(run, stage, base)
  one, _ = run_step.compile_step(
      run, stage, run_step.start(run, stage, theta, 0), row)
  runs = [run._replace(key=jax.random.key(i)) for i in range(count)]
  state, shared = step_lib.start(
      runs, stage, (train_lib.first_theta(r, stage, base) for r in runs))
  pace = step_lib.pace_of(runs, stage)
  many = step_lib.lower_step(
      run, stage, state, shared, row, pace).compile()
  # Of the base what no method stands in for; and data of theta.
  used = {id(v) for v in jax.tree.leaves(
      graft(stage.methods, base, theta))}
  once = [v for v in jax.tree.leaves(base) if id(v) in used] + [
      v for v, s in zip(jax.tree.leaves(state['frozen']),
                        jax.tree.leaves(shared)) if s]
  return (program.read(many), program.read(one),
          sum(v.nbytes for v in once), many.as_text())


# ------------------------------------------------------- equal to single runs
@pytest.mark.parametrize('name', METHODS)
def test_members_are_single_runs(name, tiny_weights, tmp_path):
  config = make_config(tiny_weights, [METHODS[name]],
                       optim=dict(ema=0.9, clip=0.05))
  out = bank.train(config, MEMBERS, str(tmp_path / 'bank'), progress=False)
  assert list(out) == ['0-seed_0', '1-seed_3-lr_0.003-train_48']
  for changes, (folder, got) in zip(MEMBERS, out.items()):
    want = single(config, changes, tmp_path / folder)
    assert set(got) == {*want, 'members'} and got['members'] == 2
    for key in ('config', 'trained', 'stored', 'base', 'steps', 'fingerprint'):
      assert got[key] == want[key]
    assert_close(theta_of(got), theta_of(want), rtol=0, atol=1e-5)
    assert got['after'] == pytest.approx(want['after'], abs=1e-5)
    # Of every step: rows, clipping and rates are those of its own.
    for a, b in zip(metrics.read(tmp_path / 'bank' / folder),
                    metrics.read(tmp_path / folder), strict=True):
      assert a == pytest.approx(b, abs=1e-4, rel=1e-4)
    with open(tmp_path / 'bank' / folder / 'summary.json') as f:
      assert json.load(f) == got


@pytest.mark.parametrize('method', [
    dict(name='lowrank.adalora', rank=4, target=2),
    dict(name='lowrank.auto_lora', rank=4, xi=0.1)])
def test_state_that_follows_gradients_is_each_members_own(
    method, tiny_weights, tmp_path, monkeypatch):
  """Masks and averages, and hypergradients, of methods without their end."""
  schedule = phases.schedule
  monkeypatch.setattr(phases, 'schedule', lambda methods, steps: schedule(
      [m._replace(phases=()) for m in methods], steps))
  config = make_config(tiny_weights, [method])
  out = bank.train(config, MEMBERS, str(tmp_path / 'bank'), progress=False)
  thetas = []
  for changes, (folder, got) in zip(MEMBERS, out.items()):
    want = single(config, changes, tmp_path / folder)
    thetas.append(theta_of(got))
    assert_close(thetas[-1], theta_of(want), rtol=0, atol=1e-5)
  name, = set(thetas[0]) - {'full'}
  moved = 'mask' if name == 'adalora' else 'logits'
  assert any((a[moved] != b[moved]).any() for a, b in zip(
      *(t[name].values() for t in thetas)))


def test_a_member_is_an_adapter_like_any_other(tiny_weights, tmp_path):
  config = make_config(tiny_weights, [METHODS['lora']])
  config.data.test = 0  # all, as the command for adapters takes them
  out = bank.train(config, [dict(seed=1), dict(seed=2)], str(tmp_path),
                   progress=False)
  got = out['1-seed_2']
  found = evaluate.evaluate_adapter(got['adapter'], batch=40)
  assert found['adapted']['loss'] == pytest.approx(
      got['after']['loss'], abs=1e-6)
  # Asked again, nothing is trained.
  assert bank.train(config, [dict(seed=1), dict(seed=2)], str(tmp_path),
                    progress=False) == out


# ------------------------------------------------------------------ the program
def test_eight_members_cost_eight_single_runs_and_one_base(tiny_weights):
  config = make_config(tiny_weights, [METHODS['lora']])
  config.batch = 3  # so that no activation has the shape of a kernel
  many, one, once, hlo = compiled(config, 8)
  assert 8 * one.flops <= many.flops * 1.01 and many.flops < 8.01 * one.flops
  assert many.xla_flops < 1.15 * 8 * one.xla_flops
  # Everything but the base is there eight times.
  assert many.arguments == once + 8 * (one.arguments - once)
  for shape in ('16,16', '16,32', '32,16'):
    assert f'[{shape}]' in hlo and f'[8,{shape}]' not in hlo
  # Each of the six kernels multiplies all members' rows at once (8 x 3 images
  # of 4 tokens), forwards and backwards: no product of them is batched.
  found = re.findall(r'f32\[96,(?:16|32)\]\S* dot\((?!.*batch_dims)', hlo)
  assert len(found) == 12


def test_data_that_members_have_alike_are_held_once(tiny_weights):
  config = make_config(tiny_weights, [dict(name='quantised.int8'), LORA])
  many, one, once, hlo = compiled(config, 3)
  assert 's8[16,32]' in hlo and 's8[3,16,32]' not in hlo
  assert many.arguments == once + 3 * (one.arguments - once)


# --------------------------------------------------------------- one that stops
def test_a_member_that_is_not_finite_stops_alone(
    tiny_weights, tmp_path, monkeypatch):
  config = make_config(tiny_weights, [METHODS['lora']])
  flags = dict(CONFIG=config, WORKDIR=str(tmp_path / 'bank'), SEEDS=['0'],
               LRS=['1e-2', '1e39'], MEMBERS=None)
  for name, value in flags.items():
    monkeypatch.setattr(command, f'_{name}', types.SimpleNamespace(value=value),
                        raising=False)
  with pytest.raises(SystemExit, match=r'1 of 2 members .*1-seed_0-lr_1e\+39'):
    command.main(['bank'])
  good, bad = sorted(os.listdir(tmp_path / 'bank'))[-3:-1]
  folder = tmp_path / 'bank' / bad
  with open(folder / 'summary.json') as f:
    said = json.load(f)
  assert said['step'] == 0 and said['config']['optim']['lr'] == 1e39
  assert re.match(r"not finite in step 0 .*new value of 'lora/", said['error'])
  assert not (folder / 'adapter').exists()
  want = single(config, dict(seed=0), tmp_path / 'single')
  got = peftjax.load_adapter(tmp_path / 'bank' / good / 'adapter').theta
  assert_close(got, theta_of(want), rtol=0, atol=1e-5)


# --------------------------------------------------------------------- resuming
def test_a_bank_goes_on_to_the_bit(tiny_weights, tmp_path, monkeypatch):
  config = make_config(tiny_weights, [dict(name='quantised.int8'), LORA],
                       optim=dict(ema=0.9))
  whole = bank.train(config, MEMBERS, str(tmp_path / 'whole'), progress=False)

  @contextlib.contextmanager
  def sigterm():
    asked = iter([False, False, True])
    yield lambda: next(asked)

  with monkeypatch.context() as patch:
    patch.setattr(train_lib, 'on_sigterm', sigterm)
    assert bank.train(config, MEMBERS, str(tmp_path / 'cut'),
                      progress=False) == dict(stopped_at=3)
  with pytest.raises(ValueError, match=r'members.0.seed: 0 in the'):
    bank.train(config, [dict(seed=5), MEMBERS[1]], str(tmp_path / 'cut'),
               progress=False)
  cut = bank.train(config, MEMBERS, str(tmp_path / 'cut'), progress=False)
  for name in whole:
    assert_close(theta_of(cut[name]), theta_of(whole[name]), rtol=0, atol=0)
    assert [v['step'] for v in metrics.read(
        tmp_path / 'cut' / name) if 'loss' in v] == list(range(1, STEPS + 1))


def test_several_devices_make_the_same_members(tiny_weights, tmp_path):
  config = make_config(tiny_weights, [dict(name='quantised.int8'), LORA])
  one = bank.train(config, MEMBERS, str(tmp_path / 'one'), progress=False)
  config.mesh.data = 2
  two = bank.train(config, MEMBERS, str(tmp_path / 'two'), progress=False)
  for name in one:
    assert two[name]['devices'] == ['2 x cpu']
    assert_close(theta_of(two[name]), theta_of(one[name]), rtol=0, atol=1e-5)


# -------------------------------------------------------------------- bad input
@pytest.mark.parametrize('members, message', [
    ([], 'needs members: give --seeds'),
    ([dict(seed=1), dict(seed=1)], 'members 0 and 1 are the same'),
    ([{}, {'seed': 0}], 'members 0 and 1 are the same'),
    ([{'optim.weight_decay': 0.1}],
     "member 0: 'optim.weight_decay' cannot .* what can: seed, optim.lr"),
    ([{'optim.rl': 0.1}], "'optim.rl' cannot .*did you mean 'optim.lr'"),
    ([{'steps': 3}], "'steps' cannot differ"),
    ([{'data.nmae': 'x'}], "no key 'data.nmae'; did you mean 'name'"),
    ([{'seed': -1}], 'member 0: seed=-1: expected at least 0'),
    ([{}, {'optim.lr': 'fast'}], "member 1: optim.lr='fast': expected a float"),
])
def test_members_that_no_bank_can_have(members, message, tiny_weights):
  config = make_config(tiny_weights, [LORA])
  with pytest.raises(ValueError, match=message):
    members_lib.expand(config, members)


@pytest.mark.parametrize('classes, width, message', [
    (3, 8, 'member b has 3 classes, a has 10'),
    (10, 9, r"member b has batches of .*B, 9.*, a of .*B, 8.*the same shapes"),
])
def test_data_that_do_not_fit_each_other(classes, width, message):
  case = lambda classes, width: types.SimpleNamespace(
      classes=classes, sample=lambda split: dict(image=np.zeros((1, width))))
  with pytest.raises(ValueError, match=message):
    members_lib.check_alike('ab', [case(10, 8), case(classes, width)])


def test_what_a_bank_refuses(tiny_weights, tmp_path):
  config = make_config(tiny_weights, [dict(name='sparse.diff_pruning')])
  with pytest.raises(ValueError, match='phases'):
    bank.train(config, MEMBERS, str(tmp_path), progress=False)
  config.task.buckets = 2
  with pytest.raises(ValueError, match='task.buckets=2'):
    bank.train(config, MEMBERS, str(tmp_path), progress=False)


def test_grids_of_members(tmp_path):
  assert members_lib.product(None, [0, 1], [1e-3]) == [
      {'seed': 0, 'optim.lr': 1e-3}, {'seed': 1, 'optim.lr': 1e-3}]
  path = tmp_path / 'members.json'
  path.write_text('[{"data.name": "digits"}, {"seed": 1}]')
  members = members_lib.read(str(path))
  assert members_lib.product(members, None, [1.0])[1] == {
      'seed': 1, 'optim.lr': 1.0}
  with pytest.raises(ValueError, match="'seed' is given by --members and"):
    members_lib.product(members, [0])
  path.write_text('{}')
  with pytest.raises(ValueError, match='expected a list of members'):
    members_lib.read(str(path))
