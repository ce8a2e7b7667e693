"""Groups, schedules and wrappers of optimisers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peftjax import config as config_lib
from peftjax import optim
from peftjax.method import Method

METHODS = (
    Method('lora', None, None, labels=dict(b='fast')),
    Method('gates', None, None, labels=dict(alpha='gate', s='no_decay')))


def theta():
  return {'lora': {'up': dict(a=jnp.full((2, 3), 0.5), b=jnp.full((3,), 2.0))},
          'gates': {'up': dict(alpha=jnp.ones(4), s=jnp.ones(2))}}


def config(**changes):
  c = config_lib.defaults().optim
  c.schedule, c.warmup = 'constant', 0.0
  for key, value in changes.items():
    c[key] = value
  return c


def test_labels_come_from_the_methods():
  assert optim.labels(METHODS, theta()) == {
      'lora': {'up': dict(a='', b='fast')},
      'gates': {'up': dict(alpha='gate', s='no_decay')}}


def test_one_step_of_every_group_by_hand():
  """AdamW's first step is -lr (g / |g| + weight decay p)."""
  c = config(lr=0.01, weight_decay=0.1, eps=0.0)
  t = theta()
  tx = optim.make(c, METHODS, t, steps=10)
  grads = jax.tree.map(lambda v: jnp.full(v.shape, -3.0), t)
  updates, _ = tx.update(grads, tx.init(t), t)
  lora, gates = updates['lora']['up'], updates['gates']['up']
  np.testing.assert_allclose(lora['a'], 0.01 * (1 - 0.1 * 0.5), rtol=1e-5)
  np.testing.assert_allclose(lora['b'], 0.16 * (1 - 0.1 * 2.0), rtol=1e-5)
  np.testing.assert_allclose(gates['alpha'], 0.1, rtol=1e-5)
  np.testing.assert_allclose(gates['s'], 0.01, rtol=1e-5)


def test_a_group_has_moments_of_its_own():
  methods = Method('search', None, None, labels=dict(logits='search')),
  t = {'search': {'up': dict(a=jnp.zeros(2), logits=jnp.zeros(2))}}
  c = config(lr=0.1, weight_decay=0.1, clip=0.0)
  tx = optim.make(c, methods, t, steps=10)
  state, ones = tx.init(t), jax.tree.map(jnp.ones_like, t)
  for g in (ones, jax.tree.map(jnp.zeros_like, t)):
    updates, state = tx.update(g, state, t)
  # m / (1 - b1^2) over the root of v / (1 - b2^2), from m = b1 (1 - b1).
  root = (0.001 * 0.999 / (1 - 0.999 ** 2)) ** 0.5
  for leaf, b1 in (('a', 0.9), ('logits', 0.5)):
    m = b1 * (1 - b1) / (1 - b1 ** 2)
    np.testing.assert_allclose(
        updates['search']['up'][leaf], -0.1 * m / root, rtol=1e-4)


def test_each_group_is_clipped_by_its_own_norm():
  c = config(clip=1.0)
  c.groups.fast.clip = 0.5
  t = {'lora': theta()['lora']}
  tx = optim.make(c, METHODS[:1], t, steps=10)
  grads = {'lora': {'up': dict(a=jnp.full((2, 3), 100.0), b=jnp.full(3, 0.01))}}
  _, state = tx.update(grads, tx.init(t), t)
  # The first moment is 0.1 times the clipped gradient.
  moments = {
      k: [np.asarray(v) for v in jax.tree.leaves(
          optax.tree_utils.tree_get(s, 'mu'))]
      for k, s in state.inner_states.items()}
  np.testing.assert_allclose(moments[''][0], 0.1 / np.sqrt(6), rtol=1e-5)
  # A huge gradient elsewhere does not shrink this one, which is below 0.5.
  np.testing.assert_allclose(moments['fast'][0], 0.1 * 0.01, rtol=1e-5)


@pytest.mark.parametrize('name, want', [
    ('cosine', [0.25, 0.5, 0.75, 1, 1, 0.853553, 0.5, 0.146447]),
    ('linear', [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
    ('constant', [0.25, 0.5, 0.75, 1, 1, 1, 1, 1])])
def test_schedules(name, want):
  factor = optim.schedule(config(schedule=name, warmup=0.5), 8)
  np.testing.assert_allclose([factor(i) for i in range(8)], want, rtol=1e-5)
  no_warmup = optim.schedule(config(schedule=name), 8)
  assert no_warmup(0) == 1
  if name != 'constant':
    assert no_warmup(8) == 0


def test_config_overrides_a_group_and_unknown_groups_are_refused():
  c = config(lr=0.01)
  c.groups.gate.lr = 3.0
  assert optim.settings(c, {'gate'})['gate']['lr'] == pytest.approx(0.03)
  c.groups.gate.lr_abs = 0.2
  with pytest.raises(ValueError, match='give one of them'):
    optim.settings(c, {'gate'})
  c = config()
  c.groups = dict(hed=dict(lr=1.0))
  with pytest.raises(ValueError, match="unknown group 'hed'.*'head'"):
    optim.settings(c, {'', 'head'})
  c.groups = dict(head=dict(decay=1.0))
  with pytest.raises(ValueError, match="'decay'.*weight_decay"):
    optim.settings(c, {'head'})
  c.groups = dict(head=dict(lr=-1.0))
  with pytest.raises(ValueError, match='lr=-1.0'):
    optim.settings(c, {'head'})
  c.groups = dict(head=dict(b1=1.0))
  with pytest.raises(ValueError, match=r'b1=1.0: expected a number in \[0, 1'):
    optim.settings(c, {'head'})
  # A group that only a method knows gets the defaults.
  assert optim.settings(config(lr=0.01), {'mine'})['mine'] == dict(
      lr=0.01, weight_decay=0.0, clip=1.0, b1=0.9, b2=0.999)


def test_state_sharding_follows_theta():
  t = theta()
  tx = optim.make(config(), METHODS, t, steps=10)
  state = jax.eval_shape(tx.init, t)
  names = jax.tree.map(lambda v: f'at {v.shape}', t)
  at = optim.state_sharding(tx, state, names, 'everywhere')
  assert jax.tree.structure(at) == jax.tree.structure(state)
  for v, where in zip(jax.tree.leaves(state), jax.tree.leaves(at)):
    assert where == ('everywhere' if v.shape == () else f'at {v.shape}')


# ------------------------------------------------------------------ wrappers
def test_by_label_refuses_a_label_without_transformation():
  with pytest.raises(ValueError, match="'fats'.*'fast'"):
    optim.by_label(dict(fast=optax.sgd(1.0)), dict(a='fats'))


def test_by_label_updates_each_leaf_by_its_own():
  tx = optim.by_label(dict(x=optax.sgd(1.0), y=optax.sgd(0.5)),
                      dict(a='x', b='y'))
  p = dict(a=jnp.ones(2), b=jnp.ones(2))
  updates, _ = tx.update(p, tx.init(p), p)
  np.testing.assert_array_equal(updates['a'], -1)
  np.testing.assert_array_equal(updates['b'], -0.5)


def test_gated_moves_nothing_outside_and_clips_by_the_support():
  p = dict(w=jnp.arange(1.0, 5.0), b=jnp.ones(3))
  support = dict(w=jnp.array([True, False, True, False]), b=False)
  tx = optim.gated(optax.chain(
      optax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.9),
      optax.add_decayed_weights(-0.1)), support)
  # Outside the support gradients are huge, and one is no number at all.
  grads = dict(w=jnp.array([3.0, 1e6, 4.0, jnp.nan]), b=jnp.full(3, 1e6))
  updates, state = tx.update(grads, tx.init(p), p)
  np.testing.assert_allclose(
      updates['w'], [-0.6 - 0.1, 0, -0.8 - 0.3, 0], rtol=1e-6)
  np.testing.assert_array_equal(updates['b'], 0)
  trace = optax.tree_utils.tree_get(state, 'trace')
  np.testing.assert_allclose(trace['w'], [0.6, 0, 0.8, 0], rtol=1e-6)
  assert not trace['b'].any()


def test_gated_takes_a_function_and_refuses_what_does_not_fit():
  p = dict(w=jnp.array([1.0, -1.0]))
  tx = optim.gated(optax.sgd(1.0), lambda p: jax.tree.map(lambda v: v > 0, p))
  updates, _ = tx.update(dict(w=jnp.ones(2)), tx.init(p), p)
  np.testing.assert_array_equal(updates['w'], [-1, 0])
  bad = optim.gated(optax.sgd(1.0), dict(w=jnp.ones(3, bool)))
  with pytest.raises(ValueError, match=r"\['w'\].*\(3,\).*\(2,\)"):
    bad.init(p)


def test_project_after_lands_in_the_set():
  ball = lambda p: jax.tree.map(
      lambda v: v / jnp.maximum(jnp.linalg.norm(v), 1.0), p)
  tx = optax.chain(optax.sgd(1.0), optim.project_after(ball))
  p = dict(w=jnp.array([0.6, 0.0]))
  updates, _ = tx.update(dict(w=jnp.array([0.0, -3.0])), tx.init(p), p)
  new = optax.apply_updates(p, updates)['w']
  want = np.array([0.6, 3.0]) / np.hypot(0.6, 3.0)
  np.testing.assert_allclose(new, want, rtol=1e-6)
  with pytest.raises(ValueError, match='needs the trained tree'):
    tx.update(p, tx.init(p))


def test_transform_grad_sees_gradients_and_parameters():
  tx = optax.chain(
      optim.transform_grad(lambda g, p: jax.tree.map(jnp.multiply, g, p)),
      optax.sgd(1.0))
  p = dict(w=jnp.array([2.0, 0.0]))
  updates, _ = tx.update(dict(w=jnp.array([5.0, 7.0])), tx.init(p), p)
  np.testing.assert_array_equal(updates['w'], [-10, 0])
