"""AdaLoRA: its budget, masks and ranks, against PEFT's RankAllocator."""

import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from experiments import common
from peftjax import train as train_lib
from peftjax.data import pipeline
from peftjax.methods.lowrank import adalora as module
from peftjax.ops import budget
from peftjax.phases import schedule

RNG = np.random.default_rng(0)


def load(**kwargs):
  return peftjax.load('lowrank.adalora', **kwargs)


# --------------------------------------------------------------------- budget
def test_budget_as_a_table():
  """12 of 24 ranks in 10 steps, of which 2 before and 2 after: by hand."""
  got = [int(budget.cubic(t, 2, 8, 24, 12)) for t in range(12)]
  # 12 + 12 (1 - i / 6)^3: 18.94, 15.55, 13.5, 12.44, 12.05, 12
  assert got == [24, 24, 24, 18, 15, 13, 12, 12, 12, 12, 12, 12]


@pytest.mark.parametrize('b0, bt, tinit, tfinal, steps', [
    (24, 16, 0, 0, 20), (144, 96, 30, 70, 400), (1296, 288, 7, 11, 1000),
    (30000, 10000, 0, 100, 3000)])
def test_budget_is_pefts(b0, bt, tinit, tfinal, steps):
  layer = pytest.importorskip('peft.tuners.adalora.layer')
  peft = layer.RankAllocator.__new__(layer.RankAllocator)
  peft.init_bgt, peft.target_bgt = b0, bt
  peft.peft_config = type('Config', (), dict(
      tinit=tinit, tfinal=tfinal, total_step=steps, deltaT=1))
  t = np.arange(1, steps + 1)
  got = np.asarray(jax.vmap(lambda t: budget.cubic(
      t, tinit, steps - tfinal, b0, bt))(t))
  want = np.array([peft.budget_schedule(int(i))[0] for i in t])
  # 1e-6 b0 below a whole number counts as it; and float64 may miss one.
  assert np.abs(got - want).max() <= 1
  assert (got != want).mean() <= 0.01 + 1.2e-6 * b0
  assert got[0] <= b0 and (np.diff(got) <= 0).all() and got[-1] == bt


def test_scores_equal_to_the_threshold_go_with_it():
  tree = dict(x=jnp.array([[3.0, 1.0], [2.0, 2.0]]), y=jnp.array([2.0, 5.0]))
  got = lambda k: jax.tree.map(
      lambda v: np.asarray(v).tolist(), budget.above(tree, k))
  assert got(0) == dict(x=[[True] * 2] * 2, y=[True] * 2)
  assert got(1) == dict(x=[[True, False], [True, True]], y=[True, True])
  for k in (2, 3, 4):
    assert got(k) == dict(x=[[True, False], [False, False]], y=[False, True])


# ------------------------------------------------------------- another library
SIZES = dict(one=(5, 4), two=(4, 6))  # and two layers in a stack of 6 x 6


def start():
  """Theta of two sites and a stack of two layers, r0 = 3, by hand."""
  method, key = load(rank=3, target=2), jax.random.key(0)
  init = lambda key, shape: method.init(
      key, None, dict(kernel=jnp.zeros(shape)), None)
  theta = {n: init(key, shape) for n, shape in SIZES.items()}
  theta['stack'] = jax.vmap(lambda k: init(k, (6, 6)))(jax.random.split(key))
  return theta


def layers(theta):
  """The same, layer by layer."""
  out = {n: theta[n] for n in SIZES}
  return out | {f'stack_{i}': jax.tree.map(lambda v, i=i: v[i], theta['stack'])
                for i in range(2)}


@pytest.mark.parametrize('tinit, tfinal, delta_t', [
    (0, 0, 1), (4, 6, 3), (3, 4, 1)])
def test_masks_are_pefts_step_by_step(tinit, tfinal, delta_t):
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  steps, theta = 20, start()
  net = torch.nn.Sequential()
  for name, t in layers(theta).items():
    net.add_module(name, torch.nn.Linear(len(t['a']), t['b'].shape[1]))
  model = peft.get_peft_model(net, peft.AdaLoraConfig(
      target_modules=list(layers(theta)), init_r=3, target_r=2, tinit=tinit,
      tfinal=tfinal, deltaT=delta_t, total_step=steps)).base_model
  parts = {n: {leaf: getattr(model.model.get_submodule(n), there)['default']
               for leaf, there in zip('aeb', ('lora_A', 'lora_E', 'lora_B'))}
           for n in layers(theta)}
  method = load(rank=3, target=2, tinit=tinit / steps, tfinal=tfinal / steps,
                delta_t=delta_t)
  track = jax.jit(method.track)
  seen, masks = set(), []
  for step in range(steps):
    grads = {n: {leaf: jnp.asarray(RNG.normal(size=t[leaf].shape), jnp.float32)
                 for leaf in 'aeb'} for n, t in theta.items()}
    theta = {n: {**t, **{leaf: t[leaf] - 0.02 * grads[n][leaf]
                         for leaf in 'aeb'}} for n, t in theta.items()}
    of = layers(grads)
    for n, t in layers(theta).items():
      for leaf, p in parts[n].items():
        p.data, p.grad = (torch.from_numpy(np.array(v).T.reshape(p.shape))
                          for v in (t[leaf], of[n][leaf]))
    theta = track(theta, grads, step, steps)
    model.update_and_allocate(step + 1)
    pattern = model.peft_config['default'].rank_pattern
    for n, t in layers(theta).items():
      e = parts[n]['e'].detach().numpy().ravel()
      np.testing.assert_allclose(t['e'], e, rtol=1e-6, err_msg=f'{n} {step}')
      if pattern:
        want, = (v for k, v in pattern.items() if f'.{n}.' in f'.{k}')
        assert t['mask'].tolist() == want
    masks.append(np.concatenate([t['mask'] for t in layers(theta).values()]))
    seen.add(int(masks[-1].sum()))
  assert len(seen) > 2 and masks[-1].sum() == 4 * 2
  # Terms that were masked come back, before the end.
  gone = np.logical_not(masks)
  assert delta_t > 1 or (gone[:-1] & ~gone[1:]).any()


def test_equals_peft(case, moved):
  """Output, penalty, gradients and merged weights."""
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  c = case('mlp')
  method = load(rank=3, target=2, alpha=5.0, orthogonal=0.3, sites=c.chosen)
  theta = moved(method, c)

  class Net(torch.nn.Module):

    def __init__(self):
      super().__init__()
      self.one, self.two = torch.nn.Linear(12, 10), torch.nn.Linear(10, 6)

    def forward(self, x):
      y = self.two(torch.tanh(self.one(x)))
      return types.SimpleNamespace(y=y, loss=torch.sin(y).sum())

  tensor = lambda v: torch.from_numpy(np.array(v).T.copy())
  net = Net()
  net.load_state_dict({f'{n}.{there}': tensor(p[leaf]) for n, p in
                       c.params.items() for leaf, there in (
                           ('kernel', 'weight'), ('bias', 'bias'))})
  model = peft.get_peft_model(net, peft.AdaLoraConfig(
      target_modules=['one', 'two'], init_r=3, target_r=2, lora_alpha=5,
      orth_reg_weight=0.3, total_step=9))
  parts = {}
  for n, t in theta['adalora'].items():
    layer = model.base_model.model.get_submodule(n)
    for leaf in 'aeb':
      p = parts[n, leaf] = getattr(layer, f'lora_{leaf.upper()}')['default']
      p.data.copy_(tensor(t[leaf]).reshape(p.shape))
  out = model.base_model(tensor(c.x.T))
  out.loss.backward()

  trained, frozen = peftjax.partition(method, theta)

  @jax.jit
  def ours(trained):
    def loss(trained):
      theta = peftjax.combine(trained, frozen)
      y, aux = peftjax.apply(c.model, method, c.params, theta, c.x)
      return jnp.sin(y).sum() + method.penalty(theta['adalora'], aux, 0), y
    return jax.value_and_grad(loss, has_aux=True)(trained)

  (loss, y), grads = ours(trained)
  np.testing.assert_allclose(y, out.y.detach(), rtol=0, atol=1e-5)
  np.testing.assert_allclose(loss, out.loss.detach(), rtol=1e-5)
  for (n, leaf), p in parts.items():
    g = grads['adalora'][n][leaf]
    np.testing.assert_allclose(g, p.grad.numpy().T.reshape(g.shape), rtol=0,
                               atol=1e-4 * np.abs(g).max())
  folded = peftjax.fold(method, c.params, theta, c.sites)
  merged = model.merge_and_unload()
  for n in ('one', 'two'):
    np.testing.assert_allclose(
        folded[n]['kernel'], merged.get_submodule(n).weight.detach().T, rtol=0,
        atol=1e-5)


# -------------------------------------------------- the start, and the end
@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_starts_as_the_base(case, name):
  c = case(name)
  method = load(rank=3, target=2, alpha=6.0, sites=c.chosen)
  theta = peftjax.init(method, jax.random.key(0), c.sites, c.params)
  jax.tree.map(np.testing.assert_array_equal, c.params,
               peftjax.fold(method, c.params, theta, c.sites))
  for n, t in theta['adalora'].items():
    assert 0.01 < np.std(np.append(t['a'], t['b'])) < 0.03
    assert t['scale'] == np.float32(6 / 3.00001)
    assert t['mask'].all()
    assert method.count(c.sites[n]) == sum(t[leaf].size for leaf in 'aeb')


def test_compacting_changes_no_kernel(case, moved):
  c = case('mlp')
  method = load(rank=4, target=2, sites=c.chosen)
  theta = moved(method, c)
  for n, keep in (('one', [0, 1, 0, 1]), ('two', [0, 0, 0, 0])):
    t, keep = theta['adalora'][n], np.array(keep, bool)
    t |= dict(mask=jnp.array(keep), e=t['e'] * keep)
  phase, = method.phases
  small = phase.start(theta['adalora'], None, c.sites)
  assert {n: t['e'].shape for n, t in small.items()} == dict(one=(2,))
  assert set(small['one']) == {'a', 'e', 'b', 'scale'}
  want = peftjax.fold(method, c.params, theta, c.sites)
  got = peftjax.fold(phase.method, c.params, {'adalora': small}, c.sites)
  for n in want:
    np.testing.assert_allclose(got[n]['kernel'], want[n]['kernel'], atol=1e-6)


def test_compacting_a_stack_keeps_the_largest_rank():
  t = {leaf: jnp.asarray(RNG.normal(size=s), jnp.float32) for leaf, s in dict(
      a=(3, 5, 4), e=(3, 4), b=(3, 4, 6)).items()}
  mask = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
  t |= dict(mask=jnp.array(mask), e=t['e'] * mask, scale=jnp.ones(3))
  small = module.compact(dict(stack=t), None, None)['stack']
  assert small['a'].shape == (3, 5, 2)
  product = lambda t: jnp.einsum('lir,lr,lro->lio', t['a'], t['e'], t['b'])
  np.testing.assert_allclose(product(small), product(t), atol=1e-6)
  # An average of e is not 0 where the last steps have masked it.
  averaged = {**t, 'e': t['e'] + 1e-3 * ~mask}
  again = module.compact(dict(stack=averaged), None, None)['stack']
  jax.tree.map(np.testing.assert_array_equal, again, small)
  # Zeros in all three: no gradient brings them back.
  for leaf, v in (('a', small['a'][1]), ('b', small['b'][1]),
                  ('a', small['a'][2, :, 1]), ('b', small['b'][2, 1])):
    assert not np.any(v), leaf


@pytest.mark.parametrize('kwargs, message', [
    (dict(target=13), 'adalora: target=13: expected 1 to 12'),
    (dict(tinit=0.5, tfinal=0.5), 'tinit=0.5: expected a share .* below 1'),
    (dict(delta_t=0), 'delta_t=0: expected at least 1 step'),
    (dict(beta2=1.0), 'beta2=1.0: expected a decay'),
    (dict(orthogonal=-1.0), 'orthogonal=-1.0: expected a finite')])
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    load(**kwargs)


# ------------------------------------------------------------------ whole runs
def config(weights, **more):
  c = common.kmnist(
      (dict(name='lowrank.adalora', rank=4, target=2, tinit=0.1, tfinal=0.2,
            delta_t=2, dropout=0.1), common.HEAD), 1e-2,
      'data.train=64,data.test=40', batch=16, eval_batch=40, steps=30,
      log_every=1, checkpoint_every=5, mesh=dict(data=1), **more)
  c.data.name, c.model.weights = 'digits', weights
  return c


def test_ranks_move_and_a_run_that_was_stopped_finds_the_same(
    tiny_weights, tmp_path, monkeypatch):
  adapters = []
  for name, stops in (('whole', ()), ('parts', (7, 21, 29))):
    workdir = str(tmp_path / name)
    for n in stops:
      make = pipeline.train_iterator

      def stopping(*args, n=n, make=make):
        inner = make(*args)

        class Batches:
          get_state, set_state = inner.get_state, inner.set_state

          def __next__(self):
            if inner.get_state()['next_index'] == n:
              os.kill(os.getpid(), signal.SIGTERM)
            return next(inner)

        return Batches()

      with monkeypatch.context() as patch:
        patch.setattr(pipeline, 'train_iterator', stopping)
        train_lib.train(config(tiny_weights), workdir, False)
    traced = []
    with monkeypatch.context() as patch:
      step = module.budget.cubic
      patch.setattr(module.budget, 'cubic',
                    lambda *a: traced.append(1) or step(*a))
      out = train_lib.train(config(tiny_weights), workdir, False)
    assert len(traced) <= 1  # one trace, whatever the step
    adapters.append(peftjax.load_adapter(out['adapter']))
  first, second = (a.theta for a in adapters)
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  ranks = {n: len(t['e']) for n, t in first['adalora'].items()}
  # A mean of 2 over the sites, which are 7; not all of them 2.
  assert sum(ranks.values()) == 14 and len(set(ranks.values())) > 1, ranks
  assert out['stored'] - out['trained'] == len(ranks)  # scales
  assert adapters[0].methods[0].track is None


def test_program_does_not_know_how_long_it_runs():
  one, two = (schedule(load(rank=3, target=2, sites=peftjax.select(
      path='.')), steps)[0] for steps in (10, 20))
  theta = start()
  grads = {n: {leaf: t[leaf] for leaf in 'aeb'} for n, t in theta.items()}
  texts = {jax.jit(s.methods[0].track).lower(
      theta, grads, np.int32(0), np.int32(s.end)).as_text()
           for s in (one, two)}
  assert len(texts) == 1
