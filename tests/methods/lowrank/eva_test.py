"""EVA against the decomposition of its inputs, brute force and Hugging Face
PEFT; and a run that shares out ranks, is saved, loaded and gone on with."""

import contextlib
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from experiments import common
from peftjax import train as train_lib
from peftjax.conformance import models
from peftjax.methods.lowrank import eva
import pytest

DRAW = np.random.default_rng(3).normal
# Inputs with directions of unlike variance; the second layer's are more alike.
BATCHES = [np.float32(0.3 * DRAW(size=(n, 12)) * np.linspace(0.2, 3, 12) + 0.1)
           for n in (64, 48)]


def load(case, **kwargs):
  return peftjax.load('lowrank.eva', **{'sites': case.chosen, **kwargs})


def inputs(case, x):
  """{layer: what it reads} of the small network."""
  one = case.params['one']
  return dict(one=np.float64(x), two=np.tanh(x @ one['kernel'] + one['bias']))


def principal(x):
  """(directions as columns, values) of centred rows, signs fixed."""
  _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
  return (vt * np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(1)])[:, None]
          ).T, s


def ranks(theta):
  return {site: t['a'].shape[-1] for site, t in theta.items()}


# ---------------------------------------------------------------- closed forms
def test_starts_at_the_principal_components_of_the_inputs(case, calibrated):
  c = case('mlp')
  got = calibrated(load(c, rank=3, rho=1.0), c, BATCHES[:1])
  for site, t in got.theta['eva'].items():
    want, _ = principal(inputs(c, BATCHES[0])[site])
    np.testing.assert_allclose(t['a'], want[:, :3], atol=1e-5)
    np.testing.assert_allclose(t['a'].T @ t['a'], np.eye(3), atol=2e-6)
    np.testing.assert_array_equal(t['b'], 0)
  assert ranks(got.theta['eva']) == dict(one=3, two=3)  # rho=1 shares nothing
  y, _ = peftjax.apply(c.model, got.method, c.params, got.theta, c.x)
  np.testing.assert_array_equal(y, c.model.apply({'params': c.params}, c.x))


def test_whitened(case, calibrated):
  c = case('mlp')
  got = calibrated(load(c, rank=3, rho=1.0, whiten=True), c, BATCHES[:1])
  for site, t in got.theta['eva'].items():
    want, s = principal(inputs(c, BATCHES[0])[site])
    np.testing.assert_allclose(
        t['a'], (want / np.sqrt(s))[:, :3], rtol=0, atol=1e-5)


def test_whitening_leaves_rounding_small(case, calibrated):
  c = case('mlp')
  flat = BATCHES[0] * (np.arange(12) < 2)  # no third direction
  for x, most in ((flat, 1e3), (np.ones((40, 12), np.float32), np.inf)):
    got = calibrated(load(c, rank=3, rho=1.0, whiten=True), c, [x])
    for t in got.theta['eva'].values():
      assert np.isfinite(t['a']).all() and np.abs(t['a']).max() <= most


# ---------------------------------------------------------------------- ranks
def by_hand(found, budget):
  """{path: [rank of every layer]}: the largest of all shares, one by one."""
  table = sorted(((-share, i, path, layer) for i, (path, s) in enumerate(
      found.items()) for layer, row in enumerate(s) for share in row))
  won = {path: [0] * len(s) for path, s in found.items()}
  for _, _, path, layer in table[:budget]:
    won[path][layer] += 1
  return won


@pytest.mark.parametrize('seed', range(20))
def test_the_largest_shares_win(seed):
  rng = np.random.default_rng(seed)
  found = {path: -np.sort(-rng.dirichlet(np.ones(9) / 3, layers)[:, :q])
           for path, layers, q in (
               ('a', 1, 4), ('b', 3, 2), ('c', 1, 0), ('d', 2, 6))}
  budget = int(rng.integers(1, 23))
  got = eva.share_out(found, budget)
  assert {p: list(r) for p, r in got.items()} == by_hand(found, budget)
  assert sum(r.sum() for r in got.values()) == budget


def test_of_equal_shares_the_first_layer_wins():
  row = np.array([[0.5, 0.2]])
  got = eva.share_out(dict(q=row, k=row, v=row), 4)
  assert {p: list(r) for p, r in got.items()} == dict(q=[2], k=[1], v=[1])


def test_isotropic_inputs_lose_ranks_to_spiked_ones(case):
  """Known variances; and a layer that wins nothing has no adapter."""
  c = case('mlp')
  method = load(c, rank=2, alpha=3.0)
  stats = dict(  # q = 4; all of the variance against 4 of 10 equal parts
      one=dict(directions=jnp.eye(4, 12), values=jnp.array([9., 3, 2, 1]),
               total=jnp.float32(95), rows=jnp.float32(50)),
      two=dict(directions=jnp.eye(4, 10), values=jnp.ones(4),
               total=jnp.float32(10), rows=jnp.float32(50)))
  (fitted,), found = peftjax.calibrate.fitted(method, dict(eva=stats), c.sites)
  # 81/95 9/95 | 1/10 three times: two wins three.
  assert fitted.spec['rank_pattern'] == {'^one$': 1, '^two$': 3}
  theta = peftjax.init(fitted, jax.random.key(0), c.sites, c.params, found)
  assert ranks(theta['eva']) == dict(one=1, two=3)
  stats['two'] = {**stats['two'], 'total': jnp.float32(1e4)}
  (fitted,), found = peftjax.calibrate.fitted(method, dict(eva=stats), c.sites)
  assert fitted.spec['rank_pattern'] == {'^one$': 4, '^two$': 0}
  theta = peftjax.init(fitted, jax.random.key(0), c.sites, c.params, found)
  assert ranks(theta['eva']) == dict(one=4)
  assert {p: fitted.count(c.sites[p]) for p in ('one', 'two')} == dict(
      one=4 * 22, two=0)


@pytest.mark.parametrize('scaling', ['lora', 'rslora'])
def test_the_scale_stays_what_it_was(case, calibrated, scaling):
  c = case('mlp')
  kwargs = dict(rank=2, alpha=5.0, scaling=scaling, alpha_pattern=dict(two=7.0),
                rank_pattern=dict(two=3))
  got = calibrated(load(c, **kwargs), c, BATCHES)
  assert ranks(got.theta['eva']) == dict(one=3, two=2)
  for site, t in got.theta['eva'].items():
    scales = [m.prepare(t, peftjax.Context(site))['scale']
              for m in (got.method, load(c, **kwargs))]
    np.testing.assert_allclose(*scales, rtol=1e-6)


def test_stacked_layers_have_ranks_of_their_own():
  """The same as unrolled, but for pairs of zeros that never train."""
  found = {}
  for scan in (False, True):
    model, x, y = models.model_for('layers', scan, False)
    sites, params = models.base_of('layers', scan)
    task = peftjax.tasks.base.Task(
        'none', 'loss', lambda b: ((b['x'],), {}), None, None, None)
    method = peftjax.load('lowrank.eva', rank=2, rho=3.0)
    stats = peftjax.calibrate.collect(
        model, params, sites, task,
        lambda x=x: iter([dict(x=x), dict(x=2 * x[::-1] + 1)]),
        method.calibration, method)
    (method,), stats = peftjax.calibrate.fitted(
        method, dict(eva=stats), sites)
    theta = peftjax.init(method, jax.random.key(0), sites, params, stats)
    found[scan] = theta['eva']

  @models.jit
  @jax.grad
  def grads(theta):
    out, _ = peftjax.apply(model, method, params, theta, x)
    return jnp.square(out - y).sum()

  moved = {p: {**t, 'b': t['b'] + (np.abs(t['a']).max(1) > 0)[..., None]}
           for p, t in found[True].items()}
  slopes, padded = grads(dict(eva=moved))['eva'], 0
  for path, t in found[True].items():
    for i in range(2):
      one = found[False].get(path.replace('blocks', f'block_{i}'))
      r = one['a'].shape[1] if one else 0
      if r:
        np.testing.assert_allclose(t['a'][i][:, :r], one['a'], atol=1e-4)
      padded += t['a'].shape[-1] - r
      np.testing.assert_array_equal(t['a'][i][:, r:], 0)
      np.testing.assert_array_equal(slopes[path]['a'][i][:, r:], 0)
      np.testing.assert_array_equal(slopes[path]['b'][i][r:], 0)
      assert np.abs(slopes[path]['a'][i][:, :r]).min(initial=1) > 0
  assert padded
  assert sum(t['a'].shape[-1] for t in found[False].values()) == 2 * 12


# ------------------------------------------------------------------- bad input
@pytest.mark.parametrize('kwargs, message', [
    (dict(rank=0), 'rank=0: expected a whole number, at least 1'),
    (dict(rank_pattern=dict(one=-1)), 'rank=-1: expected a whole number'),
    (dict(rank=7), "rank 7 at 'two': expected .* from 0 to 6 .*nearest is 6"),
    (dict(rho=0.5), 'rho=0.5: expected a finite number, at least 1'),
    (dict(tau=1.5), 'tau=1.5: expected a cosine from 0 to 1'),
    (dict(alpha=0), 'alpha=0: expected a positive number'),
    (dict(rank_pattern=dict(onne=1)), "'onne' matches none .*'one'")])
def test_bad_arguments(case, calibrated, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    calibrated(load(c, **{'rank': 2, **kwargs}), c, BATCHES)


@pytest.mark.parametrize('label_mask', [True, False])
def test_label_mask_is_handed_to_the_reducer(case, label_mask):
  assert load(case('mlp'), label_mask=label_mask).calibration.labelled == (
      label_mask)
  assert load(case('mlp')).calibration.labelled  # as in PEFT


def test_batches_of_too_few_rows(case, calibrated):
  c = case('mlp')
  with pytest.raises(ValueError, match='no batch of at least 6 rows.*'
                     'raise calibrate.batch, or lower rank or rho'):
    calibrated(load(c, rank=3), c, [x[:5] for x in BATCHES])


def test_a_site_that_is_given_rank_0_has_no_adapter(case, calibrated):
  c = case('mlp')
  got = calibrated(load(c, rank=3, rank_pattern=dict(one=0)), c, BATCHES)
  assert ranks(got.theta['eva']) == dict(two=3)


# ------------------------------------------------------------ another library
@pytest.mark.filterwarnings('ignore:lora with eva initialization')
@pytest.mark.parametrize('whiten', [False, True])
@pytest.mark.parametrize('exact', [True, False])
def test_equals_peft(
    case, calibrated, moved, twin, monkeypatch, exact, whiten):
  peft = pytest.importorskip('peft')
  from peft.tuners.lora import eva as theirs

  c = case('mlp')
  if exact:  # PEFT's own decomposition is a randomised one
    pca = theirs.IncrementalPCA
    monkeypatch.setattr(theirs, 'IncrementalPCA', lambda lowrank, **kwargs: pca(
        lowrank=False, n_components=kwargs['n_components']))
  config = peft.EvaConfig(rho=2.0, whiten=whiten)
  config.tau = -1.0  # each layer counts as settled after two batches, the last
  other = twin(c, r=3, lora_alpha=5, init_lora_weights='eva', eva_config=config)
  state = peft.get_eva_state_dict(
      other.model, [other.tensor(x) for x in BATCHES],
      forward_fn=lambda model, x: model(x), prepare_model_inputs_fn=None,
      prepare_layer_inputs_fn=None, show_progress_bar=False)
  got = calibrated(load(c, rank=3, alpha=5.0, whiten=whiten, tau=1.0), c,
                   BATCHES)
  assert ranks(got.theta['eva']) != dict(one=3, two=3)
  for site, t in got.theta['eva'].items():
    want = state[f'base_model.model.{site}'].numpy()
    np.testing.assert_allclose(t['a'].T, want, atol=2e-5 if exact else 2e-3)
  peft.initialize_lora_eva_weights(other.model, eva_state_dict=dict(state))
  for site, layer in other.layers.items():
    other.parts[site] = dict(a=layer.lora_A['default'].weight,
                             b=layer.lora_B['default'].weight)
    assert layer.scaling['default'] == pytest.approx(5 / 3)
  other.check(got.method, moved(got.method, c, start=got.theta))


# ---------------------------------------------------------------------- a run
@pytest.fixture(scope='module')
def run(tiny_weights):
  """workdir -> summary of two steps on 64 of scikit-learn's digits."""
  config = common.kmnist(
      (dict(name='lowrank.eva', rank=2, alpha=4.0), common.HEAD), 1e-2,
      'data.train=64,data.test=40', batch=16, eval_batch=16, steps=2,
      checkpoint_every=1, mesh=dict(data=1), calibrate=dict(batches=3))
  config.data.name, config.model.weights = 'digits', tiny_weights
  return functools.partial(train_lib.train, config, progress=False)


def test_a_run_keeps_its_ranks_and_goes_on(run, tmp_path, monkeypatch):
  summary = run(str(tmp_path / 'whole'))
  back = peftjax.load_adapter(tmp_path / 'whole' / 'adapter')
  method, theta = back.methods[0], back.theta['eva']
  won = ranks(theta)
  assert sum(won.values()) == 2 * 6 and set(won.values()) != {2}
  asked = dict(method.spec['rank_pattern'])
  assert {f'^{p}$'.replace('[', r'\[').replace(']', r'\]'): r
          for p, r in won.items()} == {p: r for p, r in asked.items() if r}
  sizes = {p: sum(s['params']['kernel'])
           for p, s in back.meta['sites']['eva'].items()}
  assert summary['trained'] == sum(
      r * sizes[p] for p, r in won.items()) + 16 * 10 + 10
  assert all(np.abs(t['b']).max() > 0 for t in theta.values())
  for path in won:
    assert method.prepare(theta[path], peftjax.Context(path))['scale'] == 2

  with monkeypatch.context() as patch:
    patch.setattr(train_lib, 'on_sigterm',
                  lambda: contextlib.nullcontext(lambda: True))
    assert run(str(tmp_path / 'halves')) == dict(stopped_at=1)
  assert os.listdir(tmp_path / 'halves' / 'calibration' / 'eva')
  again = run(str(tmp_path / 'halves'))
  assert again['after'] == summary['after']
  other = peftjax.load_adapter(tmp_path / 'halves' / 'adapter')
  assert json.dumps(other.methods[0].spec) == json.dumps(method.spec)
  jax.tree.map(np.testing.assert_array_equal, other.theta, back.theta)
