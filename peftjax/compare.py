"""Runs a grid of arms x tasks x seeds and compares them: table, CSV, plot.

  python -m peftjax.compare --config=experiments/quickstart/all_methods.py \
      --workdir=runs/all_methods

A grid config holds

  base    the training config that every cell starts from
  arms    ((name, {config key: value}), ...): what each arm changes
  tasks   ((name, {config key: value}), ...)
  seeds   (0, 1, 2)
  search  dict(rates=(1/3, 1, 3), fraction=0.5, seed=0), or None: every arm and
          task first tries its learning rate times each of `rates`, for that
          fraction of the steps, on that seed, judged on the validation part

The test part is read by the final cells alone. A grid is resumable: a cell that
has finished is not run again, a killed one continues from its checkpoint, a
failed one is reported and does not stop the others. What a cell is judged by is
its task's metric, `config.task.metric`.

With --record=FILE every finished cell is also kept in that file, a few numbers a
cell, small enough to commit: another machine takes them from there, as long as
their configs say the same, and runs what is missing. Where `eval_every` is on,
cells also keep the loss of the split that was looked at, step by step.

Cells of one arm and task differ in learning rate, steps and seed, which are
arguments of the compiled programs: they are compiled once and found again in
jax's compilation cache, by default below $PEFTJAX_CACHE or ~/.cache/peftjax.
The base and the encoded data are kept from one cell to the next.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import traceback

from absl import app
from absl import flags
import jax
import ml_collections
from ml_collections import config_flags
import rich
from rich import table as rich_table

from peftjax import config as config_lib
from peftjax import measures
from peftjax import metrics as metrics_lib
from peftjax import report
from peftjax import trees
from peftjax.data import builders
from peftjax.train import train, watched


def _cell(base, overrides, **more):
  """The training config of one cell."""
  config = ml_collections.ConfigDict(base.to_dict())
  for key, value in [*overrides, *more.items()]:
    node, *rest = key.split('.')
    target = config
    while rest:
      target, node, rest = target[node], rest[0], rest[1:]
    if node not in target:
      raise ValueError(
          f'grid: the base config has no key {key!r}; it has {sorted(target)}')
    with target.unlocked(), target.ignore_type():
      target[node] = value
  return config


def _name(*parts):
  return '-'.join(str(p) for p in parts if p != '').replace('/', '_')


def changes(config):
  """{dotted key: value} of what a config (a dict) sets to other than defaults.

  Keys that change no result are left out; so a config that was recorded before
  a key existed is still the same one.
  """
  data = os.path.join(os.environ.get('PEFTJAX_DATA') or '', '')
  here = lambda v: f'$PEFTJAX_DATA/{v[len(data):]}' if (  # on any machine
      data and isinstance(v, str) and v.startswith(data)) else v
  flat = lambda d: {
      k.replace('/', '.'): v for k, v in trees.flatten(d).items()}
  usual = flat(config_lib.to_json(config_lib.defaults()))
  return {k: here(v) for k, v in flat(json.loads(json.dumps(config))).items()
          if v != usual.get(k) and k not in config_lib.COSMETIC}


def shorten(summary):
  """What --record keeps of a cell's summary."""
  keys = ('after', 'main', 'trained', 'stored', 'steps_per_second',
          'peak_bytes', 'compile_seconds')
  return {'config': changes(summary['config']),
          **{k: summary[k] for k in keys},
          **{k: summary[k] for k in ('curve',) if k in summary}}


def _with_curve(summary, config, path):
  """A run's summary with {step: loss} of what it looked at on its way."""
  if not config.eval_every:
    return summary
  name = f'{watched(config)}/loss'
  return dict(summary, curve={
      str(line['step']): round(line[name], 5)
      for line in metrics_lib.read(path) if name in line})


class Record:
  """The file of --record: {label: shortened summary}, one line each.

  Attributes:
    path: The file, or None.
    cells: What it holds.
    only: Whether a cell that is missing has failed, and is not run.

  Raises:
    ValueError: a file that is there and is no such record.
  """

  def __init__(self, path=None, only=False):
    self.path, self.cells, self.only = path, {}, only
    if path and os.path.exists(path):
      with open(path, encoding='utf-8') as f:
        try:
          self.cells = json.load(f)
          for cell in self.cells.values():
            _ = cell['config']
        except (ValueError, AttributeError, TypeError, KeyError) as e:
          raise ValueError(f'{path} is no record of cells: {e!r}') from e

  def find(self, label, config):
    found = self.cells.get(label)
    same = found and found['config'] == changes(config_lib.to_json(config))
    return found if same else None

  def add(self, label, summary):
    if not self.path or not summary:
      return
    self.cells[label] = shorten(summary)
    lines = (f'{json.dumps(n)}: {json.dumps(c)}'
             for n, c in sorted(self.cells.items()))
    with open(f'{self.path}.part', 'w', encoding='utf-8') as f:
      f.write('{\n' + ',\n'.join(lines) + '\n}\n')
    os.replace(f'{self.path}.part', self.path)


def run_cell(config, workdir, label, cache=None, record=None):
  """Summary of one cell, run unless it has finished before; None if it fails.

  A finished cell keeps its summary, metrics and adapter, but no checkpoints.

  Args:
    config: Its training config.
    workdir: Folder of the grid.
    label: Its name, the first part of its folder's.
    cache: As for `train`.
    record: A `Record`, or None.
  """
  record = record or Record()
  found = record.find(label, config)
  if found or record.only:
    return found
  summary = _run_cell(config, workdir, label, cache)
  record.add(label, summary)
  return summary


def _run_cell(config, workdir, label, cache):
  text = json.dumps(config.to_dict(), sort_keys=True, default=str)
  code = hashlib.sha256(text.encode()).hexdigest()[:8]
  path = os.path.join(workdir, 'cells', f'{label}-{code}')
  done = os.path.join(path, 'summary.json')
  if os.path.exists(done):
    with open(done) as f:
      return _with_curve(json.load(f), config, path)
  failed = os.path.join(path, 'error.txt')
  if os.path.exists(failed):
    os.remove(failed)
  try:
    summary = train(config, path, progress=False, cache=cache)
    if 'stopped_at' in summary:  # SIGTERM: the cell is saved, the grid ends
      raise SystemExit(f'stopped at step {summary["stopped_at"]} of {label}; '
                       'the same command goes on from there')
    shutil.rmtree(os.path.join(path, 'checkpoints'), ignore_errors=True)
    return _with_curve(summary, config, path)
  except Exception:  # pylint: disable=broad-except: the other cells go on
    os.makedirs(path, exist_ok=True)
    with open(failed, 'w') as f:
      f.write(traceback.format_exc())
    rich.print(f'[red]failed[/red] {label}: {failed}')
    return None
  finally:
    jax.clear_caches()  # a grid would else keep every compiled step


def _rate(config, factor):
  return float(config.optim.lr * factor)


def search(grid, arm, task, workdir, say, cache=None, record=None):
  """The learning rate that does best on the validation part, and all scores.

  Returns:
    (rate, or None if every cell failed; {rate: score, or None if it failed}).
  """
  base = _cell(grid.base, [*task[1].items(), *arm[1].items()])
  scores, ranks = {}, {}
  for factor in grid.search.rates:
    lr = _rate(base, factor)
    config = _cell(base, [], **{
        'optim.lr': lr, 'seed': grid.search.seed,
        'steps': max(1, round(base.steps * grid.search.fraction)),
        'eval_every': 0, 'eval_split': 'validation'})
    say(f'{arm[0]} {task[0]} lr {lr:.3g} (search)')
    summary = run_cell(
        config, workdir, _name(task[0], arm[0], f'lr{lr:.3g}'), cache, record)
    scores[lr] = summary and summary['after'][summary['main']]
    if summary and not math.isnan(scores[lr]):
      # Of equal ones the smallest rate.
      ranks[lr] = (measures.better(summary['main']) * scores[lr], -lr)
  return max(ranks, key=ranks.get, default=None), scores


def run(grid, workdir, say=print, record=None):
  """Runs what is missing of a grid and returns its rows and the failures.

  record: A `Record`, or None.

  Returns:
    ([{arm, task, seed, lr, metric, score, ...}], [label of a failed cell]).
  """
  os.makedirs(workdir, exist_ok=True)
  rows, failures, cache = [], [], {}
  for task in grid.tasks:
    for arm in grid.arms:
      config = _cell(grid.base, [*task[1].items(), *arm[1].items()])
      lr, scores = float(config.optim.lr), {}
      if grid.search:
        lr, scores = search(grid, arm, task, workdir, say, cache, record)
        if lr is None:
          failures.append(_name(task[0], arm[0], 'search'))
          continue
      for seed in grid.seeds:
        label = _name(task[0], arm[0], f's{seed}')
        say(f'{arm[0]} {task[0]} seed {seed} lr {lr:.3g}')
        summary = run_cell(_cell(config, [], **{
            'optim.lr': lr, 'seed': seed}), workdir, label, cache, record)
        if summary is None:
          failures.append(label)
          continue
        after, metric = summary['after'], summary['main']
        rows.append(dict(
            arm=arm[0], task=task[0], seed=seed, lr=lr, metric=metric,
            score=after[metric], loss=after['loss'],
            trained=summary['trained'], stored=summary['stored'],
            step_seconds=1 / summary['steps_per_second'],
            peak_bytes=summary['peak_bytes'], metrics=after,
            **{k: summary[k] for k in ('curve',) if k in summary},
            search={f'{k:.3g}': v if v is None else round(v, 4)
                    for k, v in scores.items()}))
  return rows, failures


def keep_compiled(folder=None):
  """Lets jax keep compiled programs on disk, unless it does so already.

  folder: Where; None: 'xla' below $PEFTJAX_CACHE or ~/.cache/peftjax.
  """
  if jax.config.jax_compilation_cache_dir:
    return
  folder = folder or builders.cache_folder() / 'xla'
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


def show(rows):
  """Prints the comparison as a table."""
  table = rich_table.Table(title='mean and 95 % interval over seeds')
  lines = report.table(rows)
  for name in lines[0]:
    table.add_column(name, justify='left' if name in ('task', 'arm') else 'right')
  for line in lines:
    table.add_row(*(str(v) for v in line.values()))
  rich.print(table)


def main(argv):
  del argv
  grid, workdir = _CONFIG.value, _WORKDIR.value
  keep_compiled()
  rows, failures = run(grid, workdir, record=Record(_RECORD.value))
  if rows:
    paths = report.write(rows, workdir)
    show(rows)
    rich.print('wrote ' + ', '.join(paths))
  if failures:
    sys.exit(f'{len(failures)} cell(s) failed: {", ".join(failures)}')


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file('config', lock_config=False)
  _WORKDIR = flags.DEFINE_string('workdir', None, 'Where results are kept.',
                                 required=True)
  _RECORD = flags.DEFINE_string(
      'record', None, 'JSON file of finished cells, read and added to.')
  app.run(main)
