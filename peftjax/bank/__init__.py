"""A bank: many adapters on one base, trained at once in one program.

  python -m peftjax.bank --config=experiments/quickstart/lora_kmnist.py \
      --workdir=runs/bank --seeds=0,1,2 --lrs=1e-3,3e-3

trains six adapters, the members. Each is the run that `peftjax.train` would
make of the config with its seed and learning rate, and ends in the same theta
but for rounding: it has its own key, order of the data, optimiser, clipping and
average. The base is held once and multiplies the rows of all members together
(step.py).

--members=FILE names members in a JSON list of {config key: value}; with --seeds
and --lrs each of them is trained with each of these. Members may differ in what
leaves the program the same: `members.CHANGEABLE`, where other data must have
batches of the same shapes and as many classes.

Every member has a folder in the work folder, as `peftjax.train` writes it but
for the checkpoints, which are of the whole bank. The same command again goes on
from the newest one. A member whose numbers are not finite stops alone, with an
'error' in its summary.json and no adapter; the command ends with code 1 then.

Not here: methods that change on the way (phases), task.buckets, training by
several processes.
"""

import collections
import contextlib
import json
import os
import time

import jax
import numpy as np

from peftjax import case as case_lib
from peftjax import checkpoint
from peftjax import config as config_lib
from peftjax import method as method_lib
from peftjax import metrics as metrics_lib
from peftjax import progress as progress_lib
from peftjax import step as run_step
from peftjax import theta as theta_lib
from peftjax import train as train_lib
from peftjax.bank import members as members_lib
from peftjax.bank import step as step_lib
from peftjax.data import stream
from peftjax.evaluate import evaluator


class _Batches:
  """Iterators of all members as one, of batches [K, B, ...]."""

  def __init__(self, iterators):
    self._iterators = iterators

  def __next__(self):
    rows = [next(it) for it in self._iterators]
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}

  def get_state(self):
    return [it.get_state() for it in self._iterators]

  def set_state(self, states):
    for it, state in zip(self._iterators, states):
      it.set_state(state)


# ----------------------------------------------------------------------- train
def train(config, members, workdir, progress=True, cache=None):
  """Trains the members of a bank, or goes on with it.

  Args:
    config: ConfigDict with the keys of `config.defaults`.
    members: [{config key: value}], what each member changes of it.
    workdir: Folder to work in; holds one bank.
    progress, cache: As of `train.train`.

  Returns:
    {folder: summary}, as the members' summary.json have them: what
    `train.train` returns, where speed, compilation and memory are the bank's,
    and 'members', its size; of a member that stopped dict(error, step, ...).
    After SIGTERM only dict(stopped_at=step).

  Raises:
    ValueError: as `train.train` and `members.expand`; methods with phases,
      buckets, several processes, or members whose data differ in shape.
  """
  configs = members_lib.expand(config, members)
  if config.task.buckets > 1:
    raise ValueError(f'task.buckets={config.task.buckets}: the batches of a '
                     "bank's members have one length; expected 0")
  if jax.process_count() > 1:
    raise ValueError(f'a bank is trained by one process, not by '
                     f'{jax.process_count()}; it may have several devices')
  said = dict(config_lib.to_json(config),
              members=json.loads(json.dumps(members)))
  with checkpoint.workdir(workdir) as place, checkpoint.manager(
      place, config.keep) as saved, train_lib.on_sigterm() as stopped:
    return _train(configs, said, place, progress, cache, saved, stopped)


def _train(configs, said, workdir, progress, cache, saved, stopped):
  names, config = list(configs), next(iter(configs.values()))
  folders = {name: os.path.join(workdir, name) for name in names}
  everyone = range(len(names))

  # ------------------------------------------------- base, data, runs, batches
  cache = {} if cache is None else cache
  for m in config.method:
    if method_lib.load(**dict(m)).calibration:
      raise ValueError(f'a bank cannot train {m["name"]!r}, which starts from '
                       'statistics of each member\'s data: train them apart')
  run, stages, case = train_lib.prepare(config, cache)
  if len(stages) > 1:
    raise ValueError('a bank cannot train methods that change on the way '
                     f'({len(stages) - 1} phases): train them apart')
  stage, base = stages[0], case.base.params
  key_of = lambda c: json.dumps(config_lib.to_json(c)['data'], sort_keys=True)
  kept = {key_of(config): case}
  for c in configs.values():
    if key_of(c) not in kept:
      kept[key_of(c)] = case_lib.load(
          c, ('train', c.eval_split), cache=cache, mesh=run.mesh)
  cases = [kept[key_of(c)] for c in configs.values()]
  members_lib.check_alike(names, cases)
  runs = [run._replace(config=c, key=jax.random.key(c.seed))
          for c in configs.values()]
  batches = stream.DevicePrefetch(
      _Batches([case_lib.batches(r.config, case.arrays['train'])[0]
                for r, case in zip(runs, cases)]),
      step_lib.batch_sharding(run.mesh), 2 if config.data.stream else 0)
  judges = {key: evaluator(
      run.model, stage.methods, case.arrays[config.eval_split],
      config.eval_batch, run.mesh, case.task) for key, case in kept.items()}

  # ----------------------------------------------------------- start or resume
  def abstract(meta):
    theta = jax.eval_shape(lambda base: theta_lib.init(
        stage.methods, run.key, run.sites, base), base)
    _, shapes, at = step_lib.layout(
        run, stage, theta, meta['shared'], len(names))
    return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(
        v.shape, v.dtype, sharding=s), shapes, at)

  def evaluate(state, i, write=False):
    return judges[key_of(runs[i].config)](
        run.params, run_step.best(member(state, i)), write)

  found = checkpoint.restore(saved, abstract, said, case.base.fingerprint)
  if found:
    state, meta = found
    shared, before, clock = meta['shared'], meta['before'], meta['clock']
    errors = {int(i): v for i, v in meta['errors'].items()}
    batches.set_state(meta['data'])
    member = step_lib.take(shared)
  else:
    state, shared = step_lib.start(
        runs, stage, _first_thetas(runs, stage, base))
    member = step_lib.take(shared)
    clock = dict(seconds=0.0, steps=0, compile_seconds=0.0, peak_bytes=0)
    errors = {}  # member -> dict(step, error) once it has stopped
    before = [evaluate(state, i) if config.eval_before else None
              for i in everyone]
  step = int(state['step'][0])
  alive = lambda: [i for i in everyone if i not in errors]
  finished = _finished(folders, step == config.steps)
  if finished:
    return finished

  # ---------------------------------------------------------------------- loop
  for folder in folders.values():
    os.makedirs(folder, exist_ok=True)
  with contextlib.ExitStack() as stack:
    writers = [stack.enter_context(metrics_lib.writer(folder, step))
               for folder in folders.values()]
    advance, say = stack.enter_context(
        progress_lib.reporter(config.steps, step, progress))
    say(f'{"going on from" if found else "starting at"} step {step} of '
        f'{config.steps}, {len(names)} members')
    pace = step_lib.pace_of(runs, stage)
    tick = time.perf_counter()
    compiled = step_lib.lower_step(
        run, stage, state, shared, case.sample('train'), pace).compile()
    clock['peak_bytes'] = run_step.peak_bytes(compiled)
    clock['compile_seconds'] += time.perf_counter() - tick
    pending = collections.deque()
    tick = time.perf_counter()
    while step < config.steps and alive():
      batch = next(batches)
      with jax.transfer_guard('disallow'):
        state, metrics = compiled(state, run.params, batch, pace)
      step += 1
      pending.append((step, metrics, batch))
      stop = stopped()
      evaluate_now = config.eval_every and step % config.eval_every == 0
      save_now = stop or step == config.steps or (
          config.checkpoint_every and step % config.checkpoint_every == 0)
      settle = evaluate_now or save_now
      while len(pending) > (0 if settle else train_lib.LAG):
        done, metrics, batch = pending.popleft()
        values = jax.device_get(metrics)
        for i in np.flatnonzero(values.pop('bad') >= 0).tolist():
          if i not in errors:
            errors[i] = dict(step=done - 1, error=_not_finite(
                runs[i], stage, member(state, i), done - 1,
                {k: v[i] for k, v in batch.items()}))
            say(f'{names[i]}: {errors[i]["error"]}')
        if done % config.log_every == 0 or done == config.steps:
          for i in alive():
            writers[i](done, {k: v[i].item() for k, v in values.items()})
          say(f'step {done}/{config.steps} loss ' + ' '.join(
              f'{v:.4g}' for v in values['loss']))
        advance(done)
      if not settle:
        continue
      clock['seconds'] += time.perf_counter() - tick
      clock['steps'] = step
      if evaluate_now and step < config.steps:
        for i in alive():
          writers[i](step, train_lib.named(
              config.eval_split, evaluate(state, i)))
      if save_now:
        checkpoint.save(saved, step, state, dict(
            config=said, base=case.base.fingerprint, before=before,
            clock=clock, shared=shared, data=batches.get_state(),
            errors={str(i): v for i, v in errors.items()}))
      if stop:
        say(f'SIGTERM: saved at step {step}; the same command goes on')
        return dict(stopped_at=step)
      tick = time.perf_counter()

    # ------------------------------------------------------------------- finish
    out = {}
    for i, name in enumerate(names):
      if i in errors:
        out[name] = dict(
            errors[i], before=before[i], main=cases[i].task.main,
            config=config_lib.to_json(runs[i].config), members=len(names),
            fingerprint=case.base.fingerprint, versions=train_lib.versions())
        train_lib.write_json(
            os.path.join(folders[name], train_lib.SUMMARY), out[name])
        continue
      after = evaluate(state, i, write=True)
      writers[i](step, train_lib.named(config.eval_split, after))
      out[name] = train_lib.conclude(
          folders[name], runs[i], stage, cases[i], member(state, i), clock,
          before=before[i], after=after, members=len(names))
      say(f'{name}: {train_lib.described(cases[i].task, after)}; adapter in '
          f'{out[name]["adapter"]}')
    return out


def _first_thetas(runs, stage, base):
  """Theta of every member before the first step, one after the other."""
  theta, seed = None, None
  for run in runs:
    if run.config.seed != seed:  # as it is in neighbours, which differ in rates
      theta, seed = train_lib.first_theta(run, stage, base), run.config.seed
    yield theta


def _not_finite(run, stage, state, step, batch):
  tx, *_ = run_step.layout(run, stage, run_step.theta_of(state))
  where = run_step.blame(run, stage, tx, state, step, batch)
  return (f'not finite in step {step} (counted from 0): first {where}. This '
          f'member stopped there. Lower optim.lr ({run.config.optim.lr}) or '
          f'optim.clip ({run.config.optim.clip})')


def _finished(folders, done):
  """The summaries of a bank that has nothing left to do, or None."""
  paths = {n: os.path.join(f, train_lib.SUMMARY) for n, f in folders.items()}
  if not done or not all(map(os.path.exists, paths.values())):
    return None
  out = {}
  for name, path in paths.items():
    with open(path, encoding='utf-8') as f:
      out[name] = json.load(f)
  return out
