"""Training: THE loop, top to bottom.

  python -m peftjax.train --config=experiments/quickstart/lora_kmnist.py \
      --workdir=runs/lora [--config.optim.lr=3e-3 ...]

Writes into the work folder: checkpoints, metrics.jsonl, TensorBoard events, and
at the end summary.json and the folder adapter/. The same command again goes on
from the newest checkpoint and ends in the same theta, bit for bit; so does one
that was killed. SIGTERM saves a checkpoint and exits with code 0; a number that
is not finite stops the run with code 1 and is never saved. What one step does
stands in step.py.
"""

import collections
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import threading
import time

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from peftjax import checkpoint
from peftjax import config as config_lib
from peftjax import metrics as metrics_lib
from peftjax import phases
from peftjax import progress as progress_lib
from peftjax import sharding
from peftjax import step as step_lib
from peftjax import theta as theta_lib
from peftjax import trees
from peftjax.artifact import save_adapter
from peftjax.data import builders, pipeline
from peftjax.evaluate import evaluator
from peftjax.method import load
from peftjax.models.weights import load_weights, read_config
from peftjax.sites import describe
from peftjax.version import VERSION

SUMMARY, ADAPTER = 'summary.json', 'adapter'
# Steps that may be under way before the oldest one's metrics are fetched: the
# host never waits for the step that it has just started.
LAG = 8


# --------------------------------------------------------------------- loading
def load_base(config, classes):
  """(model, params) of `config.model`, with a new head of zeros."""
  name = config.model.name
  module = read_config(config.model.weights)['module']
  if module.split('.')[0] != name:
    raise ValueError(f'model.name={name!r}, but the weights '
                     f'{config.model.weights!r} are of {module!r}: expected '
                     f'model.name={module.split(".")[0]!r}')
  model, params = load_weights(
      config.model.weights, classes=classes, scan=config.model.scan)
  more = dict(dtype=jnp.dtype(config.dtype))
  if config.model.remat:
    more['remat'] = True
  for key in more:
    if key not in model.__dataclass_fields__:
      raise ValueError(f'model {name!r} has no {key!r} to set')
  return model.clone(**more), params


def load_arrays(config, split, first, size):
  """The first so many images of a split, all for 0."""
  name = config.data.name
  arrays = pipeline.load_split(name, split, size=size)
  n = len(arrays['label'])
  if first > n:
    raise ValueError(f'{first} images of {name} {split} are asked for, there '
                     f'are {n}; 0 takes all')
  return {k: v[:first or n] for k, v in arrays.items()}


@contextlib.contextmanager
def on_sigterm():
  """Yields `asked()`: whether SIGTERM came. Only the main thread can listen."""
  asked = threading.Event()
  main_thread = threading.current_thread() is threading.main_thread()
  if main_thread:
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
  try:
    yield asked.is_set
  finally:
    if main_thread:
      signal.signal(signal.SIGTERM, before)


def versions():
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  return dict(peftjax=VERSION, python=platform.python_version(),
              **{p: importlib.metadata.version(p) for p in packages})


# ----------------------------------------------------------------------- train
def train(config, workdir, progress=True):
  """Trains theta as a config says, or goes on with it.

  Args:
    config: ConfigDict with the keys of `config.defaults`.
    workdir: Folder to work in; holds one run.
    progress: Whether to report progress: a bar in a terminal, lines elsewhere.

  Returns:
    What summary.json holds: 'before' and 'after' (metrics on eval_split; with
    ema, those of the average), 'trained', 'stored', 'base' (counts),
    'steps_per_second', 'compile_seconds', 'peak_bytes' (of the largest step),
    'config', 'versions', 'devices', 'fingerprint', 'adapter'. After SIGTERM
    only dict(stopped_at=step).

  Raises:
    ValueError: a config, work folder, base or data that cannot be used, before
      any training; or a checkpoint of another config or base.
    FloatingPointError: a loss or an update that is not finite.
  """
  config_lib.check(config)
  with checkpoint.workdir(workdir) as place, checkpoint.manager(
      place, config.keep) as saved, on_sigterm() as stopped:
    return _train(config, place, progress, saved, stopped)


def _train(config, workdir, progress, saved, stopped):
  # ------------------------------------------------------- mesh, base, methods
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(mesh, config.batch)
  stages = phases.schedule(
      tuple(load(**dict(m)) for m in config.method), config.steps)
  classes = builders.prepared(
      config.data.name).info.features['label'].num_classes
  model, base = load_base(config, classes)
  shape = tuple(read_config(config.model.weights)['input'])
  sites = describe(model, jax.ShapeDtypeStruct(shape, jnp.float32))
  params_at = sharding.params_sharding(mesh, config.shard_rules, base)
  base = jax.tree.map(np.asarray, base)
  task = step_lib.Task(
      config, model, sharding.put_global(base, params_at), sites, mesh,
      params_at, jax.random.key(config.seed))
  fingerprint = trees.fingerprint(base)

  # ---------------------------------------------------------------------- data
  arrays = load_arrays(config, 'train', config.data.train, shape[1])
  batches = pipeline.train_iterator(
      arrays, config.batch, config.seed, jax.process_index(),
      jax.process_count())
  held_out = load_arrays(config, config.eval_split, config.data.test, shape[1])
  batch_at = sharding.batch_sharding(mesh)

  def evaluate_with(stage):
    run = evaluator(model, stage.methods, held_out, config.eval_batch, mesh)
    return lambda state: run(task.params, step_lib.best(state))

  # ----------------------------------------------------------- start or resume
  def abstract(meta):
    """Shapes and shardings of the state that a checkpoint holds."""
    theta = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(tuple(v[0]), v[1]), meta['theta'],
        is_leaf=lambda v: isinstance(v, list))
    _, shapes, at = step_lib.layout(task, stages[meta['stage']], theta)
    return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(
        v.shape, v.dtype, sharding=s), shapes, at)

  said = config_lib.to_json(config)
  found = checkpoint.restore(saved, abstract, said, fingerprint)
  if found:
    state, meta = found
    first, before, clock = meta['stage'], meta['before'], meta['clock']
    batches.set_state(meta['data'])
    evaluate = evaluate_with(stages[first])
  else:
    first, clock = 0, dict(
        seconds=0.0, steps=0, compile_seconds=0.0, peak_bytes=0)
    theta = theta_lib.init(
        stages[0].methods, jax.random.fold_in(task.key, 0), sites, base)
    state = step_lib.start(task, stages[0], theta, 0)
    evaluate = evaluate_with(stages[0])
    before = evaluate(state)
  step = int(state['step'])
  finished = _finished(workdir, step == config.steps)
  if finished:
    return finished

  # ---------------------------------------------------------------------- loop
  chief = jax.process_index() == 0
  with metrics_lib.writer(workdir, step, chief) as write, (
      progress_lib.reporter(config.steps, step, progress and chief)) as (
          advance, say):
    say(f'{"going on from" if found else "starting at"} step {step} of '
        f'{config.steps}')
    for index in range(first, len(stages)):
      stage = stages[index]
      if index > first:
        theta = stage.convert(step_lib.theta_of(state),
                              jax.random.fold_in(task.key, index), sites)
        state = step_lib.start(task, stage, theta, step)
        evaluate = evaluate_with(stage)
      if step == stage.end:
        continue
      tick = time.perf_counter()
      compiled, tx = step_lib.compile_step(task, stage, state, shape[1:])
      clock['compile_seconds'] += time.perf_counter() - tick
      clock['peak_bytes'] = max(
          clock['peak_bytes'], step_lib.peak_bytes(compiled))
      pending = collections.deque()
      tick = time.perf_counter()
      while step < stage.end:
        batch = sharding.put_batch(next(batches), batch_at)
        # Nothing is copied to or from a device behind our back.
        with jax.transfer_guard('disallow'):
          state, metrics = compiled(state, task.params, batch)
        step += 1
        pending.append((step, metrics, batch))
        stop = stopped()
        evaluate_now = config.eval_every and step % config.eval_every == 0
        save_now = stop or step == config.steps or (
            config.checkpoint_every and step % config.checkpoint_every == 0)
        settle = stop or evaluate_now or save_now or step == stage.end
        while len(pending) > (0 if settle else LAG):
          done, metrics, batch = pending.popleft()
          values = {k: v.item() for k, v in jax.device_get(metrics).items()}
          if values.pop('bad') >= 0:
            raise _not_finite(task, stage, tx, state, done - 1, batch, saved)
          if done % config.log_every == 0 or done == config.steps:
            write(done, values)
            say(f'step {done}/{config.steps} ' + ' '.join(
                f'{k} {v:.4g}' for k, v in values.items()))
          advance(done)
        if not settle:
          continue
        clock['seconds'] += time.perf_counter() - tick
        clock['steps'] = step
        if evaluate_now and step < config.steps:
          now = evaluate(state)
          write(step, {f'{config.eval_split}/{k}': now[k]
                       for k in ('accuracy', 'loss')})
          say(f'step {step}/{config.steps} {config.eval_split} accuracy '
              f'{now["accuracy"]:.4f}')
        if save_now:
          checkpoint.save(saved, step, state, dict(
              config=said, base=fingerprint, stage=index, before=before,
              clock=clock, data=batches.get_state(), theta=jax.tree.map(
                  lambda v: [list(v.shape), str(v.dtype)],
                  step_lib.theta_of(state))))
        if stop:
          say(f'SIGTERM: saved at step {step}; the same command goes on')
          return dict(stopped_at=step)
        tick = time.perf_counter()

    # ------------------------------------------------------------------- finish
    after = evaluate(state)
    write(step, {f'{config.eval_split}/{k}': after[k]
                 for k in ('accuracy', 'loss')})
    theta = step_lib.best(state)
    trained, _ = theta_lib.partition(stages[-1].methods, theta)
    adapter = os.path.join(workdir, ADAPTER)
    summary = dict(
        before=before, after=after, trained=trees.count(trained),
        stored=trees.count(theta), base=trees.count(base), steps=step,
        steps_per_second=clock['steps'] / clock['seconds']
        if clock['steps'] else None,
        compile_seconds=clock['compile_seconds'],
        peak_bytes=clock['peak_bytes'], fingerprint=fingerprint,
        adapter=adapter, config=said, versions=versions(),
        devices=[f'{len(mesh.devices.flat)} x '
                 f'{mesh.devices.flat[0].device_kind}'])
    if chief:
      save_adapter(adapter, stages[-1].methods, theta, sites, base, base=dict(
          weights=config.model.weights, classes=classes,
          scan=config.model.scan, data=config.data.name))
      _write_json(os.path.join(workdir, SUMMARY), summary)
    say(f'{config.eval_split} accuracy {before["accuracy"]:.4f} before, '
        f'{after["accuracy"]:.4f} after; {summary["trained"]} of '
        f'{summary["base"]} trained; adapter in {adapter}')
    return summary


def _finished(workdir, done):
  """The summary of a run that has nothing left to do, or None."""
  path = os.path.join(workdir, SUMMARY)
  if done and os.path.exists(path) and os.path.isdir(
      os.path.join(workdir, ADAPTER)):
    with open(path, encoding='utf-8') as f:
      return json.load(f)
  return None


def _write_json(path, value):
  with open(f'{path}.part', 'w', encoding='utf-8') as f:
    json.dump(value, f, indent=1)
    f.write('\n')
  os.replace(f'{path}.part', path)


def _not_finite(task, stage, tx, state, step, batch, saved):
  where = step_lib.blame(task, stage, tx, state, step, batch)
  saved.wait_until_finished()
  last = saved.latest_step()
  kept = 'there is no checkpoint yet' if last is None else (
      f'the last checkpoint is of step {last}')
  return FloatingPointError(
      f'not finite in step {step} (counted from 0): first {where}. Nothing of '
      f'this step was kept; {kept}. Lower optim.lr ({task.config.optim.lr}) or '
      f'optim.clip ({task.config.optim.clip})')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; see --help')
  try:
    train(_CONFIG.value, _WORKDIR.value)
  except (OSError, ValueError, FloatingPointError) as e:
    logging.debug('where it was raised', exc_info=True)  # with --verbosity=1
    raise SystemExit(f'train: {e}') from e


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file(
      'config', None, 'Config file.', lock_config=True)
  _WORKDIR = flags.DEFINE_string(
      'workdir', None, 'Folder to work in.', required=True)
  flags.mark_flag_as_required('config')
  app.run(main)
