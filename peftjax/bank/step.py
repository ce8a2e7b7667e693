"""The step of a bank: many adapters on one base, in one compiled program.

A member of a bank is a run of its own in everything but the program: it has a
key, a learning rate, batches and a state. States are stacked, every array with
a leading axis over the members, and the step is `step.make_step` under
`jax.vmap`. The base has no such axis: a product with one of its kernels is one
product of all members' rows. What a member clips, averages or finds to be not
finite is its own.

Leaves of theta that are data and alike in all members, such as a base in eight
bits, are held once as well. `shared` says which: a tree of booleans like
state['frozen'].
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec
import jax.numpy as jnp

from peftjax import sharding
from peftjax import step as run_step
from peftjax import theta as theta_lib
from peftjax.method import as_methods


# ----------------------------------------------------------------------- state
def _over(fn, shared, tree):
  """`fn` of every leaf of a tree like a state that has the members' axis."""
  frozen = jax.tree.map(
      lambda s, v: v if s else fn(v), shared, tree['frozen'])
  return {k: frozen if k == 'frozen' else jax.tree.map(fn, v)
          for k, v in tree.items()}


def _axes(tree, shared):
  """Where a tree like a state has that axis, for `jax.vmap`."""
  return dict.fromkeys(tree, 0) | dict(
      frozen=jax.tree.map(lambda s: None if s else 0, shared))


def _stacked(at):
  """A sharding of a member's array -> of all members' arrays."""
  return NamedSharding(at.mesh, PartitionSpec(None, *at.spec))


def batch_sharding(mesh):
  """Of batches [K, B, ...]."""
  return _stacked(sharding.batch_sharding(mesh))


def _stack_thetas(stage, thetas):
  """(trained, frozen, shared) of all members' thetas."""
  named = as_methods(stage.methods)
  alike = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x == y).all(), a, b))
  all_trained, all_frozen = [], []
  for theta in thetas:
    trained, frozen = theta_lib.partition(stage.methods, theta)
    if all_frozen:  # a copy of the first's is let go of before the next is made
      frozen = jax.tree.map(
          lambda same, v, one: one if same else v,
          jax.device_get(alike(frozen, all_frozen[0])), frozen, all_frozen[0])
    all_trained.append(trained)
    all_frozen.append(frozen)
  # What a method may change at a step is each member's own from the start.
  shared = {name: jax.tree.map(
      lambda one, *more, m=named[name]: not (m.after_step or m.track) and all(
          v is one for v in more), by_path, *(f[name] for f in all_frozen[1:]))
            for name, by_path in all_frozen[0].items()}
  trained = jax.tree.map(lambda *v: jnp.stack(v), *all_trained)
  frozen = jax.tree.map(
      lambda s, *v: v[0] if s else jnp.stack(v), shared, *all_frozen)
  return trained, frozen, shared


def layout(run, stage, theta, shared, members):
  """Optimiser, shapes and shardings of a bank's state; see `step.layout`.

  Args:
    run: The `step.Run` of any member.
    stage: The `phases.Stage`.
    theta: Shapes of one member's theta.
    shared: See above.
    members: Their number.
  """
  tx, shapes, at = run_step.layout(run, stage, theta)
  more = lambda v: jax.ShapeDtypeStruct((members, *v.shape), v.dtype)
  return tx, _over(more, shared, shapes), _over(_stacked, shared, at)


def _one_theta(state, shared):
  """Shapes of a member's theta, from what is stacked."""
  less = lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype)
  return theta_lib.combine(**_over(
      less, shared, {k: state[k] for k in ('trained', 'frozen')}))


def start(runs, stage, thetas):
  """The state before the first step, on the devices.

  Args:
    runs: [`step.Run`] of the members; they differ in config and key.
    stage: Their `phases.Stage`.
    thetas: Iterable of their thetas before the first step.

  Returns:
    (state, shared).
  """
  trained, frozen, shared = _stack_thetas(stage, thetas)
  theta = dict(trained=trained, frozen=frozen)
  tx, shapes, at = layout(
      runs[0], stage, _one_theta(theta, shared), shared, len(runs))

  def one(theta, rng):
    return run_step.fresh(runs[0], stage, tx, theta_lib.combine(**theta), rng,
                          jnp.int32(0))

  make = jax.vmap(one, (_axes(theta, shared), 0), _axes(shapes, shared))
  state = jax.jit(make, out_shardings=at)(
      theta, jnp.stack([jax.random.key_data(run.key) for run in runs]))
  return state, shared


def take(shared):
  """Makes `(state, i) -> state of member i`, compiled once."""
  return jax.jit(lambda state, i: _over(lambda v: v[i], shared, state))


# ------------------------------------------------------------------------ step
def pace_of(runs, stage):
  """Learning rates and steps of the members, on the devices."""
  paces = [run_step.pace_of(run, stage) for run in runs]
  return jax.device_put(jax.tree.map(lambda *v: jnp.stack(v), *paces),
                        sharding.replicated(runs[0].mesh))


def lower_step(run, stage, state, shared, arrays, pace):
  """Lowers the step of a bank.

  Args:
    run: The `step.Run` of any member.
    stage: The `phases.Stage`.
    state: The bank's state; it is donated when the step is called.
    shared: See above.
    arrays: {name: [N, ...]}; a member's batch has config.batch rows of them.
    pace: From `pace_of`.

  Returns:
    The lowered step, `(state, params, batch, pace) -> (state, metrics)` with
    batches [K, B, ...] and metrics [K].
  """
  k, b = len(state['step']), run.config.batch
  _, _, at = layout(run, stage, _one_theta(state, shared), shared, k)
  place = batch_sharding(run.mesh)
  batch = {n: jax.ShapeDtypeStruct(
      (k, b, *v.shape[1:]), v.dtype, sharding=place) for n, v in arrays.items()}
  axes = _axes(state, shared)
  step = jax.vmap(
      run_step.make_step(run, stage), (axes, None, 0, 0), (axes, 0))
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(
      at, sharding.replicated(run.mesh)))
  return jitted.lower(state, run.params, batch, pace)
