"""AutoLoRA: its hypergradient, the ranks it finds, and what is made of them."""

import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax
from peftjax import bilevel
from peftjax import config as config_lib
from peftjax import phases
from peftjax import sharding
from peftjax import step as step_lib
from peftjax import train as train_lib
from peftjax.data import pipeline
from peftjax.methods.lowrank import auto_lora as module
from peftjax.tasks.base import Task
import pytest

from experiments import common

RNG = np.random.default_rng(0)
KERNELS = peftjax.select(leaf='kernel')


def load(**kwargs):
  return peftjax.load('lowrank.auto_lora', **kwargs)


# ---------------------------------------------------------------- closed forms
@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_weighs_the_terms_of_a_lora(case, moved, name):
  c = case(name)
  method = load(rank=3, alpha=6.0, sites=c.chosen)
  fresh = peftjax.init(method, jax.random.key(0), c.sites, c.params)
  jax.tree.map(np.testing.assert_array_equal, c.params,
               peftjax.fold(method, c.params, fresh, c.sites))
  theta = moved(method, c)
  lora = {}
  for site, t in theta['auto_lora'].items():
    np.testing.assert_array_equal(fresh['auto_lora'][site]['logits'], 1)
    p = np.exp(t['logits']) / np.exp(t['logits']).sum()
    lora[site] = dict(a=t['a'] * p, b=t['b'])
    assert method.count(c.sites[site]) == sum(
        t[leaf].size for leaf in ('a', 'b', 'logits'))
  other = peftjax.load('lowrank.lora', rank=3, alpha=6.0, sites=c.chosen)
  got, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  want, _ = peftjax.apply(c.model, other, c.params, {'lora': lora}, c.x)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_ranks_by_hand():
  p = np.array([[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1],
                [0.26, 0.25, 0.25, 0.24], [0.97, 0.01, 0.01, 0.01]])
  theta = dict(one=dict(logits=jnp.log(p[0])), stack=dict(
      logits=jnp.log(p[1:]) + 7))
  got = lambda *a: {n: r.tolist() for n, r in module.ranks(theta, *a).items()}
  assert got() == dict(one=4, stack=[2, 3, 1])
  assert got(1.05) == dict(one=0, stack=[2, 0, 1])


def test_permuted_ranks_are_the_same_ranks():
  found = dict(a=np.int64(3), b=np.array([0, 1, 2]), c=np.array([[4, 5]]))
  got = module.permuted(found, 1)
  assert {n: r.shape for n, r in got.items()} == dict(a=(), b=(3,), c=(1, 2))
  flat = lambda f: np.concatenate([np.ravel(r) for r in f.values()])
  assert sorted(flat(got)) == sorted(flat(found))
  assert (flat(got) != flat(found)).any()
  np.testing.assert_array_equal(flat(got), flat(module.permuted(found, 1)))
  assert (flat(got) != flat(module.permuted(found, 2))).any()


# ------------------------------------------------------------------- restarting
class Block(nn.Module):

  @nn.compact
  def __call__(self, x, _=None):
    return x + nn.Dense(6, name='dense')(jnp.tanh(x)), None


class Stacked(nn.Module):

  @nn.compact
  def __call__(self, x):
    scanned = nn.scan(Block, variable_axes={'params': 0}, length=3,
                      split_rngs={'params': True})
    return nn.Dense(5, name='out')(scanned(name='blocks')(x, None)[0])


def stacked(**kwargs):
  """(model, x, params, sites, method, its second one, theta of both)."""
  model, x = Stacked(), jnp.asarray(RNG.normal(size=(7, 6)), jnp.float32)
  params = model.init(jax.random.key(0), x)['params']
  sites = peftjax.describe(model, x)
  method = load(rank=4, alpha=6.0, sites=KERNELS, **kwargs)
  theta = peftjax.init(method, jax.random.key(1), sites, params)
  t = theta['auto_lora']
  # Ranks 1, 3 and 2 of the layers, 4 at the end, where no logit has moved.
  t['blocks/dense']['logits'] += jnp.array(
      [[9.0, 0, 0, 0], [9, 9, 9, 0], [0, 0, 9, 9]])
  phase, = method.phases
  later = phase.start(t, jax.random.key(2), sites)
  return model, x, params, sites, phase.method, {'auto_lora': later}


def test_retraining_starts_as_a_lora_of_the_ranks_found():
  model, x, params, _, method, theta = stacked()
  t = theta['auto_lora']
  assert {n: v['a'].shape for n, v in t.items()} == {
      'blocks/dense': (3, 6, 3), 'out': (6, 4)}
  for v in t.values():
    assert set(v) == {'a', 'b', 'scale'}
    np.testing.assert_array_equal(v['b'], 0)
    np.testing.assert_array_equal(v['scale'], np.float32(6 / 4))  # not 6 / r_i
  a = np.asarray(t['blocks/dense']['a'])
  used = np.array([[1, 0, 0], [1, 1, 1], [1, 1, 0]], bool)
  np.testing.assert_array_equal((a != 0).all(1), used)
  np.testing.assert_array_equal((a != 0).any(1), used)
  assert np.abs(a).max() <= 6 ** -0.5 and len(np.unique(a[used[0]])) > 3
  y, _ = peftjax.apply(model, method, params, theta, x)
  np.testing.assert_array_equal(y, model.apply({'params': params}, x))


def test_filled_up_pairs_stay_zero():
  model, x, params, _, method, theta = stacked()
  trained, frozen = peftjax.partition(method, theta)
  tx = optax.adamw(0.1, weight_decay=0.1)

  @jax.jit
  @jax.grad
  def grad(trained):
    y, _ = peftjax.apply(
        model, method, params, peftjax.combine(trained, frozen), x)
    return jnp.sin(y).sum()

  state = tx.init(trained)
  for _ in range(4):
    updates, state = tx.update(grad(trained), state, trained)
    trained = optax.apply_updates(trained, updates)
  t = trained['auto_lora']['blocks/dense']
  used = np.array([[1, 0, 0], [1, 1, 1], [1, 1, 0]], bool)
  for v in (t['a'].swapaxes(1, 2), t['b']):
    np.testing.assert_array_equal((v != 0).any(-1), used)


def test_sites_of_rank_zero_are_left_out_and_ranks_may_be_permuted():
  *_, theta = stacked(threshold=1.05)
  assert set(theta['auto_lora']) == {'blocks/dense'}
  seen = set()
  for seed in range(6):
    *_, theta = stacked(permute=seed)
    a = theta['auto_lora']['blocks/dense']['a']
    found = [*(a != 0).any(1).sum(-1).tolist(),
             theta['auto_lora']['out']['a'].shape[1]]
    assert sorted(found) == [1, 2, 3, 4]
    seen.add(tuple(found))
  assert len(seen) > 1


# ----------------------------------------------------------------- the search
class Pair(nn.Module):
  """Two layers side by side."""

  @nn.compact
  def __call__(self, x):
    parts = [nn.Dense(n, name=f'{name}')(x)
             for name, n in (('planted', 12), ('empty', 8))]
    return jnp.concatenate(parts, -1)


def planted(method, steps, seed=0, noise=0.3, both=False):
  """A run on a model of which one layer lacks a delta of rank 2, and data.

  both: Whether there is noise on what the other layer makes, too.
  """
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  model, x = Pair(), draw(256, 10)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  params = jax.tree.map(lambda s: draw(*s.shape) / 3, shapes)
  u, _, vt = np.linalg.svd(draw(10, 12), full_matrices=False)
  there = {**params, 'planted': {
      **params['planted'],
      'kernel': params['planted']['kernel'] + 3 * u[:, :2] @ vt[:2]}}
  y = np.array(model.apply({'params': there}, x))
  y[:, :12] += noise * draw(256, 12)
  if both:
    y[:, 12:] += noise * draw(256, y.shape[1] - 12)
  task = Task(
      'fit', 'loss', lambda b: ((b['x'],), {}),
      lambda out, b, _: (jnp.square(out - b['y']).sum(-1), None), None, None)
  config = config_lib.defaults()
  config.batch, config.optim.lr, config.optim.warmup = 64, 1e-2, 0.0
  mesh = sharding.make_mesh(dict(data=1, model=1))
  run = step_lib.Run(
      config, task, model, params, peftjax.describe(model, x), mesh,
      sharding.params_sharding(mesh, (), params), jax.random.key(seed))
  return run, phases.schedule(method, 2 * steps)[0], dict(x=x, y=y)


@pytest.mark.parametrize('form, seed, both', [
    ('exact', 0, False), ('exact', 1, False), ('darts', 2, False),
    ('exact', 0, True)])
def test_ranks_go_where_the_target_is(form, seed, both):
  """And where there is noise to fit: shares do not say what a site is worth."""
  method = load(rank=8, hypergradient=form, xi=1e-2, sites=KERNELS)
  run, stage, data = planted(method, 400, seed, both=both)
  theta = peftjax.init(method, jax.random.key(seed), run.sites, run.params)
  state = step_lib.start(run, stage, theta, 0)
  step, _ = step_lib.compile_step(run, stage, state, data)
  pace = step_lib.pace_of(run, stage)
  rng = np.random.default_rng(seed)
  for _ in range(stage.end):
    rows = rng.integers(0, 256, 64)
    state, _ = step(state, run.params, {k: v[rows] for k, v in data.items()},
                    pace)
  t = step_lib.theta_of(state)['auto_lora']
  if both:
    assert set(module.ranks(t).values()) <= {2, 3, 4}, module.ranks(t)
    return
  found = module.ranks(t, 1.05)
  assert found['planted'] in (2, 3, 4) and found['empty'] == 0, found
  assert module.ranks(t)['empty'] == 8  # where no logit has moved
  later = load(rank=8, threshold=1.05, sites=KERNELS).phases[0].start(
      t, jax.random.key(0), run.sites)
  assert {n: v['a'].shape[1] for n, v in later.items()} == dict(
      planted=found['planted'])


@pytest.mark.parametrize('form', bilevel.FORMS)
def test_the_steps_gradients_are_those_of_the_unrolled_loss(form):
  """Against differences of L2(w - xi grad L1(w, l), l), the head trained too."""
  method = load(rank=3, hypergradient=form, xi=0.05, sites=peftjax.select(
      path='planted'))
  head = peftjax.load('selective.full', sites=dict(path='empty'))
  run, _, data = planted(method, 4)
  stage = phases.schedule((method, head), 4)[0]
  theta = peftjax.init(
      stage.methods, jax.random.key(0), run.sites, run.params)
  trained, frozen = peftjax.partition(stage.methods, theta)
  trained = jax.tree.map(lambda v: jnp.asarray(
      v + 0.3 * RNG.normal(size=v.shape), jnp.float32), trained)
  batch = {k: v[:32] for k, v in data.items()}
  loss = step_lib.make_loss(run, stage)
  rows = bilevel.first_part(batch, 0.7)
  rest = (frozen, run.params, batch, jax.random.key(0), 0)
  (value, _), got = jax.jit(bilevel.value_and_grad(loss, stage.methods))(
      trained, *rest)
  inner = jax.jit(jax.value_and_grad(lambda t: loss(t, *rest, rows)[0]))
  first, g = inner(trained)
  np.testing.assert_allclose(value, first, rtol=1e-6)
  at = ('auto_lora', 'planted', 'logits')
  leaf = lambda tree: tree[at[0]][at[1]][at[2]]

  def put(tree, v):
    return {**tree, at[0]: {at[1]: {**tree[at[0]][at[1]], at[2]: v}}}

  # w follows L1 alone, the head as well.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5,
                                                       atol=1e-5),
               put(got, 0), put(g, 0))

  @jax.jit
  def unrolled(l):
    now = put(trained, l)
    _, g = inner(now)
    moved = put(jax.tree.map(lambda v, d: v - 0.05 * d, now, g), l)
    return loss(moved, *rest, ~rows)[0]

  l, h = leaf(trained), 3e-3
  want = [(unrolled(l + h * e) - unrolled(l - h * e)) / (2 * h)
          for e in np.eye(3, dtype=np.float32)]
  plain = jax.grad(lambda l: loss(put(trained, l), *rest, ~rows)[0])(l)
  scale = np.abs(want).max()
  np.testing.assert_allclose(leaf(got), want, rtol=0, atol=0.02 * scale)
  assert np.abs(plain - np.array(want)).max() > 0.1 * scale  # the step matters


# ------------------------------------------------------------------ whole runs
def config(weights, **more):
  c = common.kmnist(
      (dict(name='lowrank.auto_lora', rank=4, dropout=0.1, **more),
       common.HEAD), 1e-2, 'data.train=64,data.test=40', batch=16,
      eval_batch=40, steps=24, log_every=1, checkpoint_every=5,
      mesh=dict(data=1))
  c.data.name, c.model.weights = 'digits', weights
  return c


def stop_at(n):
  """A train_iterator of a run that is told to stop at batch n."""
  make = pipeline.train_iterator

  def iterator(*args):
    inner = make(*args)

    class Batches:
      get_state, set_state = inner.get_state, inner.set_state

      def __next__(self):
        if inner.get_state()['next_index'] == n:
          os.kill(os.getpid(), signal.SIGTERM)
        return next(inner)

    return Batches()

  return iterator


def test_adapter_is_a_lora_of_the_ranks_found(
    tiny_weights, tmp_path, monkeypatch):
  out = train_lib.train(config(tiny_weights), str(tmp_path / 'a'), False)
  got = peftjax.load_adapter(out['adapter'])
  method = got.methods[0]
  assert method.spec['phase'] == 1 and not method.outer
  t = got.theta['auto_lora']
  assert all(set(v) == {'a', 'b', 'scale'} for v in t.values())
  found = {n: v['a'].shape[1] for n, v in t.items()}
  assert all(1 <= r <= 4 for r in found.values()) and (
      len(set(found.values())) > 1), found
  assert out['stored'] == out['trained'] + len(t)
  assert out['after']['loss'] < out['before']['loss']
  # Stopped while it searches, at its end, and in the second phase.
  for n in (4, 11, 17):
    with monkeypatch.context() as patch:
      patch.setattr(pipeline, 'train_iterator', stop_at(n))
      train_lib.train(config(tiny_weights), str(tmp_path / 'b'), False)
  out = train_lib.train(config(tiny_weights), str(tmp_path / 'b'), False)
  again = peftjax.load_adapter(out['adapter']).theta
  assert jax.tree.structure(again) == jax.tree.structure(got.theta)
  jax.tree.map(np.testing.assert_array_equal, again, got.theta)


@pytest.mark.parametrize('kwargs, message', [
    (dict(rank=1), 'auto_lora: rank=1: expected at least 2'),
    (dict(search=1.0), r'search=1.0: expected a share of the steps in \(0, 1'),
    (dict(threshold=0.0), 'threshold=0.0: expected a finite number above 0'),
    (dict(permute=-1), 'permute=-1: expected a seed'),
    (dict(inner=0.0), 'share 0.0 of the rows'),
    (dict(hypergradient='exakt'), "unknown hypergradient 'exakt'.*'exact'")])
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    load(**kwargs)
