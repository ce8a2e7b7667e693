"""One training step: its state, its loss, its update, and how it is compiled.

The state is a dict of everything that a step changes, and so of everything that
a checkpoint holds:

  step      int32, steps done
  bad       int32, the first step that was not finite, or -1
  rng       uint32, the run's key
  trained   the part of theta that is trained
  frozen    the part of theta that is data
  opt       optimiser state
  ema       average of trained, where config.optim.ema is on

The base's params are an argument of their own: never differentiated, never
donated, never returned.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax import bilevel
from peftjax import calibrate
from peftjax import diagnose
from peftjax import optim
from peftjax import sharding
from peftjax import theta as theta_lib
from peftjax.apply import apply
from peftjax.method import as_methods
from peftjax.tasks.base import mean_loss, Task


class Run(NamedTuple):
  """What stays the same in all steps of a run."""

  config: Any
  task: Task
  model: nn.Module
  params: Any  # on the devices; shapes are enough to lower a step
  sites: Any
  mesh: Any
  params_at: Any  # shardings of params
  key: jax.Array  # PRNG key of the run
  stats: Any = {}  # {method name: {path: ...}}, of methods that start from data


# ----------------------------------------------------------------------- state
def layout(run, stage, theta):
  """Optimiser, shapes and shardings of the state of one stage.

  Args:
    run: The run.
    stage: A `phases.Stage`.
    theta: Its theta, or the shapes of it.

  Returns:
    (optax transformation, ShapeDtypeStructs, shardings), the last two like a
    state.
  """
  config = run.config.optim
  split = lambda tree: theta_lib.partition(stage.methods, tree)
  trained, frozen = split(theta)
  trained_at, frozen_at = split(sharding.theta_sharding(
      run.mesh, run.sites, run.params_at, theta))
  everywhere = sharding.replicated(run.mesh)
  tx = optim.make(config, stage.methods, trained, stage.end - stage.start)
  opt = jax.eval_shape(tx.init, trained)
  one = jax.ShapeDtypeStruct((), jnp.int32)
  shapes = dict(
      step=one, bad=one, rng=jax.eval_shape(jax.random.key_data, run.key),
      trained=trained, frozen=frozen, opt=opt)
  at = dict(step=everywhere, bad=everywhere, rng=everywhere,
            trained=trained_at, frozen=frozen_at,
            opt=optim.state_sharding(tx, opt, trained_at, everywhere))
  if config.ema:
    shapes['ema'], at['ema'] = trained, trained_at
  return tx, jax.eval_shape(lambda s: s, shapes), at


def fresh(run, stage, tx, theta, rng, step):
  """A state before any step, from theta and the data of a key."""
  trained, frozen = theta_lib.partition(stage.methods, theta)
  state = dict(step=step, bad=jnp.int32(-1), rng=rng,
               trained=trained, frozen=frozen, opt=tx.init(trained))
  if run.config.optim.ema:
    state['ema'] = jax.tree.map(jnp.copy, trained)  # both are donated
  return state


def start(run, stage, theta, step):
  """The state at the beginning of a stage, on the devices."""
  tx, _, at = layout(run, stage, theta)
  make = functools.partial(fresh, run, stage, tx)
  if jax.process_count() > 1:  # all of them have made the same
    theta = sharding.put_global(
        theta, theta_lib.combine(at['trained'], at['frozen']))
  return jax.jit(make, out_shardings=at)(
      theta, np.asarray(jax.random.key_data(run.key)), np.int32(step))


def abstract(run, stage):
  """The shapes of the first stage's state, as nothing but a plan needs them."""
  theta = jax.eval_shape(
      lambda params: theta_lib.init(
          stage.methods, run.key, run.sites, params,
          calibrate.stand_in(stage.methods, run.sites)), run.params)
  _, shapes, at = layout(run, stage, theta)
  return _placed(shapes, at)


def _placed(tree, at):
  """Shapes of arrays (or of shapes) that lie as shardings say."""
  return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(
      v.shape, v.dtype, sharding=s), tree, at)


def theta_of(state):
  """Theta as it is being trained."""
  return theta_lib.combine(state['trained'], state['frozen'])


def best(state):
  """Theta to evaluate and to keep: the average, where there is one."""
  return theta_lib.combine(state.get('ema', state['trained']), state['frozen'])


# ------------------------------------------------------------------------ step
def step_key(rng, step):
  """Key of a step, a function of seed and step alone."""
  return jax.random.fold_in(jax.random.wrap_key_data(rng), step)


def make_loss(run, stage):
  """`(trained, frozen, params, batch, rng, step, rows) -> (loss, output)`.

  The task's loss of the batch, or of those of its rows that are in `rows`, bool
  [B], plus the methods' penalties; and the model's output.
  """
  smoothing = run.config.loss.label_smoothing

  def loss_fn(trained, frozen, params, batch, rng, step, rows=None):
    theta = theta_lib.combine(trained, frozen)
    args, kwargs = run.task.inputs(batch)
    with sharding.rows_stay(run.mesh, len(jax.tree.leaves(batch)[0])):
      out, aux = apply(run.model, stage.methods, params, theta, *args,
                       train=True, rng=rng, **kwargs)
    found = run.task.loss(out, batch, smoothing)
    if rows is not None:
      found = bilevel.on_rows(*found, rows)
    loss = mean_loss(*found)
    return loss + theta_lib.penalty(stage.methods, theta, aux, step), out

  return loss_fn


def update(stage, tx, state, grads, pace):
  """(trained, frozen, optimiser state) after gradients."""
  updates, opt = tx.update(grads, state['opt'], state['trained'])
  theta = theta_lib.combine(
      optax.apply_updates(state['trained'], updates), state['frozen'])
  for name, m in as_methods(stage.methods).items():
    if m.track:
      theta[name] = m.track(theta[name], grads[name],
                            state['step'] - pace['start'], pace['steps'])
  theta = theta_lib.after_step(stage.methods, theta)
  return (*theta_lib.partition(stage.methods, theta), opt)


def make_step(run, stage):
  """`(state, params, batch, pace) -> (state, metrics)`; pace as from `pace_of`.

  A step whose loss or result is not finite changes nothing, nor does any after
  it, until the host has noticed.
  """
  config = run.config.optim
  bilevel.check(run.config, stage.methods)
  differentiate = bilevel.value_and_grad(make_loss(run, stage), stage.methods)

  def step_fn(state, params, batch, pace):
    step = state['step']
    tx = optim.make(config, stage.methods, state['trained'], **{
        k: pace[k] for k in ('steps', 'warm', 'lr')})
    factor = optim.schedule(config, pace['steps'], pace['warm'])
    (loss, out), grads = differentiate(
        state['trained'], state['frozen'], params, batch,
        step_key(state['rng'], step), step)
    trained, frozen, opt = update(stage, tx, state, grads, pace)
    new = dict(state, trained=trained, frozen=frozen, opt=opt)
    if config.ema:
      new['ema'] = optax.incremental_update(
          trained, state['ema'], 1 - config.ema)
    moved = [n for n, o in zip(
        jax.tree.leaves((trained, frozen)),
        jax.tree.leaves((state['trained'], state['frozen']))) if n is not o]
    finite = jnp.isfinite(loss) & jnp.all(jnp.array(
        [jnp.isfinite(v).all() for v in moved]))
    bad = jnp.where((state['bad'] < 0) & ~finite, step, state['bad'])
    # What no step changes passes through: in a bank it has no members' axis.
    new = jax.tree.map(
        lambda n, o: n if n is o else jnp.where(bad < 0, n, o), new, state)
    new |= dict(step=step + 1, bad=bad)
    return new, dict(
        run.task.watch(out, batch), loss=loss, bad=bad,
        grad_norm=optax.tree.norm(grads),
        lr=pace['lr'] * factor(step - pace['start']))

  return step_fn


def pace_of(run, stage):
  """Learning rate and steps of a stage, on the devices.

  They are arguments of the step, not constants in it: runs that differ in them
  (and in the seed) alone share one compiled program through jax's cache.
  """
  return sharding.put_global(_pace(run, stage), sharding.replicated(run.mesh))


def _pace(run, stage):
  """`pace_of`, on the host."""
  config, steps = run.config.optim, stage.end - stage.start
  return dict(lr=np.float32(config.lr), start=np.int32(stage.start),
              steps=np.int32(steps), warm=np.int32(optim.warmup(config, steps)))


def compile_step(run, stage, state, arrays):
  """Compiles the step of a stage, once, ahead of time.

  Args:
    run: The run.
    stage: A `phases.Stage`.
    state: The state; it is donated when the step is called.
    arrays: {name: [N, ...]}; a batch has config.batch rows of them.

  Returns:
    (compiled step, optimiser). A state or a batch of another shape is an error
    when it is called: there is no second trace.
  """
  lowered, tx = lower_step(run, stage, state, arrays)
  return lowered.compile(), tx


def lower_step(run, stage, state, arrays, platforms=None):
  """(lowered step, optimiser); arguments as of `compile_step`.

  Shapes are enough everywhere: in `state`, in `run.params` and in `arrays`.
  Where they are arrays, only their shapes are looked at. platforms: ('tpu',)
  lowers for what is not there; None: for the devices of the mesh.
  """
  tx, _, at = layout(run, stage, theta_of(state))
  everywhere = sharding.replicated(run.mesh)
  b, place = run.config.batch, sharding.batch_sharding(run.mesh)
  batch = {k: jax.ShapeDtypeStruct((b, *v.shape[1:]), v.dtype, sharding=place)
           for k, v in arrays.items()}
  step = jax.jit(make_step(run, stage), donate_argnums=0,
                 out_shardings=(at, everywhere))
  pace = _pace(run, stage)
  traced = step.trace(
      _placed(state, at), _placed(run.params, run.params_at), batch,
      _placed(pace, dict.fromkeys(pace, everywhere)))
  return traced.lower(lowering_platforms=platforms), tx


def peak_bytes(compiled):
  """Most bytes that a device needs at once for a compiled step; 0: unknown."""
  m = compiled.memory_analysis()
  if m is None:
    return 0
  return (m.argument_size_in_bytes + m.output_size_in_bytes
          + m.temp_size_in_bytes - m.alias_size_in_bytes)


def blame(run, stage, tx, state, step, batch):
  """Words for where the first non-finite number of a failed step arises.

  Args:
    run: The run.
    stage: The stage.
    tx: Its optimiser.
    state: As the failed step found it, which it left it as.
    step: Number of the failed step.
    batch: Its batch.
  """
  rng = step_key(state['rng'], step)
  args, kwargs = run.task.inputs(batch)
  site = diagnose.nonfinite_site(
      run.model, stage.methods, run.params, theta_of(state), run.sites,
      *args, rng=rng, **kwargs)
  if site is not None:
    return f'in the output of {site!r}'
  differentiate = bilevel.value_and_grad(make_loss(run, stage), stage.methods)
  (loss, _), grads = jax.jit(differentiate)(
      state['trained'], state['frozen'], run.params, batch, rng, step)
  leaf = diagnose.nonfinite_leaf(grads)
  if leaf:
    return f'in the gradient of {leaf!r}'
  if not jnp.isfinite(loss):
    return 'in the loss, with finite outputs at every site'
  # The state has counted on since.
  trained, frozen, _ = update(stage, tx, dict(state, step=step), grads,
                              _pace(run, stage))
  leaf = diagnose.nonfinite_leaf(theta_lib.combine(trained, frozen))
  return f'in the new value of {leaf!r}'
