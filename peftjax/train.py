"""Training: THE loop, top to bottom.

  python -m peftjax.train --config=experiments/quickstart/lora_kmnist.py \
      --workdir=runs/lora [--config.optim.lr=3e-3 ...]

and with --coordinator or --distributed, by several processes (distributed.py).

Writes into the work folder: checkpoints, metrics.jsonl, TensorBoard events, and
at the end summary.json and the folder adapter/. The same command again goes on
from the newest checkpoint and ends in the same theta, bit for bit; so does one
that was killed. SIGTERM saves a checkpoint and exits with code 0; a number that
is not finite stops the run with code 1 and is never saved. Of several processes
all stop at the same step. What one step does stands in step.py.
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
from ml_collections import config_flags

from peftjax import artifact
from peftjax import calibrate
from peftjax import case as case_lib
from peftjax import checkpoint
from peftjax import config as config_lib
from peftjax import distributed
from peftjax import metrics as metrics_lib
from peftjax import phases
from peftjax import progress as progress_lib
from peftjax import sharding
from peftjax import step as step_lib
from peftjax import theta as theta_lib
from peftjax import trees
from peftjax.data import stream
from peftjax.evaluate import evaluator
from peftjax.method import load
from peftjax.sites import describe, FUSED_RULES
from peftjax.version import VERSION

SUMMARY, ADAPTER = 'summary.json', 'adapter'
# Steps that may be under way before the oldest one's metrics are fetched: the
# host never waits for the step that it has just started.
LAG = 8


# ------------------------------------------------------------------- around it
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


# ------------------------------------------------------- before and after it
def prepare(config, cache=None, workdir=''):
  """Mesh, methods, data and base of a config that was checked.

  Args:
    config, cache: As of `train`.
    workdir: Where the statistics of methods that start from data are kept.

  Returns:
    (`step.Run`, list of `phases.Stage`, `case.Case`).
  """
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(mesh, config.batch)
  methods = tuple(load(**dict(m)) for m in config.method)
  phases.schedule(methods, config.steps)  # says what is wrong with them
  # A folder is read straight into its shards. Several processes read it whole:
  # the fingerprint, theta's start and the adapter need arrays of one process.
  case = case_lib.load(
      config, ('train', watched(config), config.eval_split), cache=cache,
      mesh=mesh if jax.process_count() == 1 else None)
  base = case.base.params
  args, kwargs = case.example()
  sites = describe(case.base.model, *args,
                   fused=FUSED_RULES[config.model.fused], **kwargs)
  params_at = sharding.params_sharding(mesh, config.shard_rules, base)
  params, key = sharding.put_global(base, params_at), jax.random.key(config.seed)
  methods, stats = calibrate.of_run(
      methods, config, case, params, sites, case.base.fingerprint, workdir,
      jax.random.fold_in(key, 1))
  run = step_lib.Run(config, case.task, case.base.model, params, sites, mesh,
                     params_at, key, stats)
  return run, phases.schedule(methods, config.steps), case


def first_theta(run, stage, base):
  """Theta of the first stage, as it is before the first step."""
  init = lambda params: theta_lib.init(
      stage.methods, jax.random.fold_in(run.key, 0), run.sites, params,
      run.stats)
  start = run.config.start
  return init(base) if not start else artifact.start_from(
      start, stage.methods, jax.eval_shape(init, base), run.sites, base)


def conclude(workdir, run, stage, case, state, clock, **found):
  """Writes adapter and summary of a finished run.

  Args:
    workdir: Folder of the run.
    run, stage, case: The run, its last stage, its case.
    state: The last state.
    clock: dict(seconds, steps, compile_seconds, peak_bytes).
    **found: What else the summary says: 'before', 'after'.

  Returns:
    The summary.
  """
  config, mesh, base = run.config, run.mesh, case.base.params
  said = config_lib.to_json(config)
  theta = distributed.whole(step_lib.best(state))
  trained, _ = theta_lib.partition(stage.methods, theta)
  adapter = os.path.join(workdir, ADAPTER)
  summary = dict(
      found, main=case.task.main, trained=trees.count(trained),
      stored=trees.count(theta), base=trees.count(base),
      steps=int(state['step']),
      steps_per_second=clock['steps'] / clock['seconds']
      if clock['steps'] else None,
      compile_seconds=clock['compile_seconds'],
      peak_bytes=clock['peak_bytes'], fingerprint=case.base.fingerprint,
      adapter=adapter, config=said, versions=versions(),
      devices=[f'{len(mesh.devices.flat)} x '
               f'{mesh.devices.flat[0].device_kind}'])
  if distributed.is_chief():
    artifact.save_adapter(
        adapter, stage.methods, theta, run.sites, base, base=dict(
            weights=config.model.weights, classes=case.classes,
            scan=config.model.scan, fused=config.model.fused,
          param_dtype=config.model.param_dtype,
            data=config.data.name, path=config.data.path,
            stream=config.data.stream,
            options=said['data']['options'],
            splits=said['data']['splits'], split=config.eval_split,
            task=said['task'], head=case.head))
    write_json(os.path.join(workdir, SUMMARY), summary)
  return summary


# ----------------------------------------------------------------------- train
def train(config, workdir, progress=True, cache=None):
  """Trains theta as a config says, or goes on with it.

  Args:
    config: ConfigDict with the keys of `config.defaults`.
    workdir: Folder to work in; holds one run.
    progress: Whether to report progress: a bar in a terminal, lines elsewhere.
    cache: Mapping that keeps the base and the encoded data for the next call,
      as a grid makes many; see `case.keep`.

  Returns:
    What summary.json holds: 'before' and 'after' (metrics on eval_split; with
    ema, those of the average; before is None without eval_before), 'main'
    (the name of the one that the task is judged by), 'trained', 'stored',
    'base' (counts), 'steps_per_second', 'compile_seconds', 'peak_bytes' (of
    the largest step), 'config', 'versions', 'devices', 'fingerprint',
    'adapter'. After SIGTERM only dict(stopped_at=step).

  Raises:
    ValueError: a config, work folder, base or data that cannot be used, before
      any training; or a checkpoint of another config or base.
    FloatingPointError: a loss or an update that is not finite.
  """
  config_lib.check(config)
  distributed.check_same('the config', json.dumps(config_lib.to_json(config)))
  with checkpoint.workdir(workdir) as place, checkpoint.manager(
      place, config.keep) as saved, on_sigterm() as stopped:
    return _train(config, place, progress, cache, saved, stopped)


def _train(config, workdir, progress, cache, saved, stopped):
  run, stages, case = prepare(config, cache, workdir)
  task, model, mesh, sites = run.task, run.model, run.mesh, run.sites
  base, fingerprint = case.base.params, case.base.fingerprint

  # ---------------------------------------------------------------------- data
  row, watch = case.sample('train'), watched(config)
  batches, lengths = case_lib.batches(
      config, case.arrays['train'], *sharding.data_shard(mesh))
  # What is in memory is gathered when it is asked for, and not before.
  batches = stream.DevicePrefetch(
      batches, sharding.batch_sharding(mesh), 2 if config.data.stream else 0)

  def evaluate_with(stage):
    judges = {split: evaluator(
        model, stage.methods, case.arrays[split], config.eval_batch, mesh, task)
              for split in {config.eval_split, watch}}
    return lambda state, split=config.eval_split, write=False: judges[split](
        run.params, step_lib.best(state), write)

  # ----------------------------------------------------------- start or resume
  def abstract(meta):
    """Shapes and shardings of the state that a checkpoint holds."""
    theta = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(tuple(v[0]), v[1]), meta['theta'],
        is_leaf=lambda v: isinstance(v, list))
    _, shapes, at = step_lib.layout(run, stages[meta['stage']], theta)
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
    state = step_lib.start(
        run, stages[0], first_theta(run, stages[0], base), 0)
    evaluate = evaluate_with(stages[0])
    before = evaluate(state) if config.eval_before else None
  run = run._replace(stats={})  # theta has been made of them
  step = int(state['step'])
  finished = _finished(workdir, step == config.steps)
  if finished:
    return finished

  # ---------------------------------------------------------------------- loop
  chief = distributed.is_chief()
  stopped = distributed.together(stopped, mesh, LAG)
  with metrics_lib.writer(workdir, step, chief) as write, (
      progress_lib.reporter(config.steps, step, progress and chief)) as (
          advance, say):
    say(f'{"going on from" if found else "starting at"} step {step} of '
        f'{config.steps}')
    for index in range(first, len(stages)):
      stage = stages[index]
      if index > first:
        # What no step follows is made of the theta that is kept: the average.
        found = (step_lib.best if stage.start == stage.end
                 else step_lib.theta_of)(state)
        theta = stage.convert(distributed.whole(found),
                              jax.random.fold_in(run.key, index), sites)
        state = step_lib.start(run, stage, theta, step)
        evaluate = evaluate_with(stage)
      if step == stage.end:
        continue
      pace = step_lib.pace_of(run, stage)
      tick = time.perf_counter()
      compiled = {}
      for length in lengths:
        compiled[length], tx = step_lib.compile_step(
            run, stage, state, case_lib.cut(row, length))
        clock['peak_bytes'] = max(
            clock['peak_bytes'], step_lib.peak_bytes(compiled[length]))
      clock['compile_seconds'] += time.perf_counter() - tick
      pending = collections.deque()
      tick = time.perf_counter()
      while step < stage.end:
        batch = next(batches)
        # Nothing is copied to or from a device behind our back.
        with jax.transfer_guard('disallow'):
          length = batch['mask'].shape[1] if len(lengths) > 1 else lengths[0]
          state, metrics = compiled[length](state, run.params, batch, pace)
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
            raise _not_finite(run, stage, tx, state, done - 1, batch, saved)
          if done % config.log_every == 0 or done == config.steps:
            write(done, values)
            say(f'step {done}/{config.steps} ' + ' '.join(
                f'{k} {v:.4g}' for k, v in values.items()))
          advance(done)
        if not settle:
          continue
        clock['seconds'] += time.perf_counter() - tick
        clock['steps'] = step
        if evaluate_now and (step < config.steps or watch != config.eval_split):
          now = evaluate(state, watch)
          write(step, named(watch, now))
          say(f'step {step}/{config.steps} {watch} ' + described(task, now))
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
    after = evaluate(state, write=True)
    write(step, named(config.eval_split, after))
    summary = conclude(workdir, run, stages[-1], case, state, clock,
                       before=before, after=after)
    say(f'{config.eval_split} {described(task, before)} before, '
        f'{described(task, after)} after; {summary["trained"]} of '
        f'{summary["base"]} trained; adapter in {summary["adapter"]}')
    return summary


def watched(config):
  """The split that is looked at every `eval_every` steps."""
  return (config.eval_every and config.watch_split) or config.eval_split


def named(split, found):
  """{'test/accuracy': ...} of metrics, without the number of examples."""
  return {f'{split}/{k}': v for k, v in found.items() if k != 'n'}


def described(task, found):
  """'accuracy 0.9000', or of the loss where the metric is not measured."""
  if found is None:
    return 'not measured'
  name = task.main if task.main in found else 'loss'
  return f'{name} {found[name]:.4f}'


def _finished(workdir, done):
  """The summary of a run that has nothing left to do, or None."""
  path = os.path.join(workdir, SUMMARY)
  if done and os.path.exists(path) and os.path.isdir(
      os.path.join(workdir, ADAPTER)):
    with open(path, encoding='utf-8') as f:
      return json.load(f)
  return None


def write_json(path, value):
  with open(f'{path}.part', 'w', encoding='utf-8') as f:
    json.dump(value, f, indent=1)
    f.write('\n')
  os.replace(f'{path}.part', path)


def _not_finite(run, stage, tx, state, step, batch, saved):
  where = step_lib.blame(run, stage, tx, state, step, batch)
  saved.wait_until_finished()
  last = saved.latest_step()
  kept = 'there is no checkpoint yet' if last is None else (
      f'the last checkpoint is of step {last}')
  return FloatingPointError(
      f'not finite in step {step} (counted from 0): first {where}. Nothing of '
      f'this step was kept; {kept}. Lower optim.lr ({run.config.optim.lr}) or '
      f'optim.clip ({run.config.optim.clip})')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; see --help')
  with distributed.one_for_all():
    try:
      distributed.start(**{f: flags.FLAGS[f].value for f in distributed.FLAGS
                           if f in flags.FLAGS})
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
  distributed.define_flags()
  app.run(main)
