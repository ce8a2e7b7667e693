"""Plans a run: compiles its training step for devices that are not there.

  python -m peftjax.compile --topology=v5e:4x4 \
      --config=experiments/scale/llama3_8b.py:method=lora [--sweep=batch]

compiles the step that `peftjax.train` runs, for the chips of a TPU slice, and
prints what every chip needs: memory, FLOPs, communication, and whether it fits.
Weights are never read and data hardly ever: a folder with config.json is enough
of a base, and tasks lm, classify and image follow from the config (the number
of classes from the data, from --classes or from the base's own head).

--topology needs libtpu and no TPU (pip install 'peftjax[tpu]'). Without it the
step is lowered for TPUs, which finds what they cannot do, but not compiled.
--devices=8 compiles for so many CPU devices instead.
--sweep=batch looks for the largest batch that fits.

Exit codes: 0 it compiles and fits, 1 the input is wrong, 3 it does not fit,
4 it was lowered and not compiled.
"""

import importlib.metadata
import json
import os
import re
import sys
import time
from typing import Any, NamedTuple

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
from ml_collections import config_flags

from peftjax import case as case_lib
from peftjax import config as config_lib
from peftjax import phases
from peftjax import program as program_lib
from peftjax import sharding
from peftjax import step as step_lib
from peftjax import topologies
from peftjax import trees
from peftjax.method import load
from peftjax.sites import describe, FUSED_RULES

GIB = 2**30
TOO_LARGE, LOWERED = 3, 4  # exit codes
MOST = 2**20  # rows that a sweep goes to


class Setup(NamedTuple):
  """All that a step is lowered from; shapes everywhere."""

  run: step_lib.Run
  stage: phases.Stage
  stages: int  # how many there are
  state: Any
  row: Any  # {name: [1, ...]}


def setup(config, devices, classes=None):
  """The `Setup` of a config, as `peftjax.train` would have it.

  Args:
    config: ConfigDict with the keys of `config.defaults`.
    devices: To make the mesh of.
    classes: As of `case.shapes`.

  Raises:
    FileNotFoundError, ValueError: a config that cannot be used.
  """
  config_lib.check(config)
  mesh = sharding.make_mesh(config.mesh, devices)
  stages = phases.schedule(
      tuple(load(**dict(m)) for m in config.method), config.steps)
  case = case_lib.shapes(config, classes)
  row, base = case.arrays['train'], case.base
  # One row, which is small; `describe` takes shapes for positional inputs only.
  args, kwargs = case.task.inputs(
      jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), row))
  sites = describe(base.model, *args, fused=FUSED_RULES[config.model.fused],
                   **kwargs)
  params_at = sharding.params_sharding(mesh, config.shard_rules, base.params)
  run = step_lib.Run(config, case.task, base.model, base.params, sites, mesh,
                     params_at, jax.random.key(config.seed))
  return Setup(run, stages[0], len(stages), step_lib.abstract(run, stages[0]),
               row)


def lower(found, batch=None, platforms=None):
  """The lowered step of a `Setup`; batch: in the place of the config's."""
  run = found.run
  if batch is not None:
    config = run.config.copy_and_resolve_references()
    config.batch = batch
    run = run._replace(config=config)
  sharding.check_batch(run.mesh, run.config.batch)
  return step_lib.lower_step(
      run, found.stage, found.state, found.row, platforms)[0]


def compile_step(found, batch=None, usable=None):
  """Compiles the step of a `Setup` and says what it needs.

  Args:
    found: A `Setup`.
    batch: In the place of the config's.
    usable: Bytes of memory of a device; None: not known.

  Returns:
    JSON values: 'batch', 'fits' (None: not known), 'seconds' to compile, and
    what `costs` has; where the compiler itself refuses, 'needed', the bytes
    that it says it needs, and 'refusal', its words.
  """
  lowered = lower(found, batch)
  out = dict(batch=batch or found.run.config.batch)
  tick = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return dict(out, fits=False, needed=needed(str(e)),
                refusal=str(e).splitlines()[0],
                seconds=time.perf_counter() - tick)
  out['seconds'] = time.perf_counter() - tick
  out |= costs(program_lib.read(compiled))
  fits = None if usable is None else out['memory']['peak'] <= usable
  return dict(out, fits=fits)


def needed(text):
  """Bytes that a program needs, out of XLA's refusal; None: it does not say."""
  found = re.search(r'(?:Used |\()([\d.]+)([KMGT])\b', text)
  return found and int(float(found[1]) * 1024 ** (' KMGT'.index(found[2])))


def costs(program):
  """JSON values of a `program.Program`, of one device.

  'collectives': {kind: {count, bytes}}; 'moved': the same by shape, the largest
  first, each with a place in the model that one of them comes from.
  """
  sizes = ('arguments', 'outputs', 'aliased', 'temp', 'peak')
  groups = {}
  for a in program.moved:
    group = groups.setdefault((a.op, a.dtype, a.shape), dict(
        kind=a.op, dtype=a.dtype, shape=list(a.shape), count=0, bytes=0,
        place=a.name))
    group['count'] += a.times
    group['bytes'] += a.times * a.bytes
  return dict(
      memory={k: getattr(program, k) for k in sizes}, flops=program.flops,
      xla_flops=program.xla_flops, xla_bytes=program.bytes_accessed,
      endless=program.endless,
      collectives={k: v._asdict() for k, v in program.collectives.items()},
      moved=sorted(groups.values(), key=lambda g: -g['bytes']))


def largest(fits, unit, most=MOST):
  """The largest multiple of `unit` that fits, by doubling, then by halves.

  Args:
    fits: `n -> bool`.
    unit: What n is a multiple of.
    most: No n larger than this is tried.

  Returns:
    n; 0: not even `unit` fits.
  """
  good, bad = 0, None
  while bad is None and max(2 * good, unit) <= most:
    n = max(2 * good, unit)
    good, bad = (n, None) if fits(n) else (good, n)
  while bad is not None and bad - good > unit:
    n = (good + bad) // 2 // unit * unit
    good, bad = (n, bad) if fits(n) else (good, n)
  return good


# ---------------------------------------------------------------------- report
def facts(found, topology=''):
  """JSON values about what is compiled."""
  run, state = found.run, found.state
  versions = ('peftjax', 'jax', 'jaxlib', 'libtpu')
  device = lambda tree: sum(
      s.dtype.itemsize * _size(s.sharding.shard_shape(s.shape))
      for s in jax.tree.leaves(tree))
  theta = step_lib.theta_of(state)
  placed = jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(
      v.shape, v.dtype, sharding=s), run.params, run.params_at)
  mesh = run.mesh
  return dict(
      topology=topology, devices=mesh.size,
      device=mesh.devices.flat[0].device_kind, mesh=dict(mesh.shape),
      stages=found.stages, method=config_lib.to_json(run.config)['method'],
      base=trees.count(run.params), trained=trees.count(state['trained']),
      # Bytes of all devices together, and of one.
      base_bytes=trees.size(run.params), theta_bytes=trees.size(theta),
      base_bytes_here=device(placed), theta_bytes_here=device(theta),
      batch_of={k: [list(v.shape[1:]), str(v.dtype)]
                for k, v in found.row.items()},
      versions={p: _version(p) for p in versions})


def _size(shape):
  out = 1
  for n in shape:
    out *= n
  return out


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def show(record, most=8):
  """Prints the costs of one program, of each device."""
  if 'refusal' in record:
    print(f'  does not fit: {record["refusal"]}')
    return
  m = record['memory']
  print('  HBM GiB: ' + ', '.join(f'{k} {v / GIB:.2f}' for k, v in m.items()))
  print(f'  GFLOP: {record["flops"] / 1e9:,.1f} in products, loops as they run '
        f'(XLA counts them once: {record["xla_flops"] / 1e9:,.1f}; and '
        f'{record["xla_bytes"] / GIB:.2f} GiB of memory read and written)')
  if record['endless']:
    print(f'  {record["endless"]} loops of unknown length count as one round')
  for kind, v in record['collectives'].items():
    print(f'  {kind}: {v["count"]}, {v["bytes"] / 2**20:,.1f} MiB')
  for g in record['moved'][:most]:
    shape = ','.join(map(str, g['shape']))
    print(f'    {g["bytes"] / 2**20:10,.1f} MiB  {g["count"]:4} x {g["kind"]} '
          f'{g["dtype"]}[{shape}]  {g["place"]}')


def _verdict(record, chip):
  if record['fits'] is None:
    return
  if record['fits']:
    share = record['memory']['peak'] / (chip.usable * GIB)
    print(f'fits: {share:.0%} of the {chip.usable} GiB that programs may use '
          f'of {chip.hbm} GiB')
  else:
    print(f'does not fit into {chip.usable} of {chip.hbm} GiB')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; see --help')
  try:
    code = plan(_CONFIG.value, _TOPOLOGY.value, _DEVICES.value, _SWEEP.value,
                _CLASSES.value, _OUT.value)
  except (OSError, ValueError) as e:
    logging.debug('where it was raised', exc_info=True)  # with --verbosity=1
    raise SystemExit(f'compile: {e}') from e
  sys.exit(code)


def plan(config, topology, count, sweep, classes, out):
  """The command; arguments as its flags, count: --devices. The exit code."""
  if bool(topology) == bool(count):
    raise ValueError(f'topology={topology!r}, devices={count}: expected one of '
                     'the two')
  if sweep and not topology:
    raise ValueError('--sweep needs --topology: memory of CPUs has no end')
  chip, n = topologies.parse(topology) if topology else (None, count)
  can = not topology or topologies.installed()
  topologies.prepare(1 if topology and can else n, topology)
  devices = topologies.devices(topology) if topology and can else (
      jax.devices()[:n])
  if len(devices) < n:
    raise ValueError(f'devices={n}, but jax started with {len(devices)} before')
  found = setup(config, devices, classes)
  said = facts(found, topology)
  print(f'{said["devices"]} x {said["device"]}, mesh {said["mesh"]}; base '
        f'{said["base"]:,} parameters, {said["base_bytes_here"] / GIB:.2f} GiB '
        f'on each; {said["trained"]:,} trained, theta '
        f'{said["theta_bytes_here"] / 2**20:.2f} MiB on each')
  if found.stages > 1:
    print(f'the first of {found.stages} stages')
  if not can:
    lower(found, platforms=('tpu',))
    print(f'compile: {topologies.INSTALL}\nThe step lowers for TPUs; it was '
          'not compiled, so nothing is known of memory and communication.')
    return _write(out, dict(said, compiled=False), LOWERED)
  usable = chip and chip.usable * GIB
  tries = []

  def attempt(batch=None):
    record = compile_step(found, batch, usable)
    tries.append(record)
    print(f'batch {record["batch"]}, compiled in {record["seconds"]:.1f} s')
    show(record)
    _verdict(record, chip)
    return record['fits']

  if sweep:
    best = largest(attempt, found.run.mesh.shape['data'])
    print(f'largest batch that fits: {best or "none"}')
    said |= dict(sweep='batch', largest=best, tries=tries)
    return _write(out, dict(said, compiled=True), 0 if best else TOO_LARGE)
  fits = attempt()
  return _write(out, dict(said, compiled=True, **tries[0]),
                TOO_LARGE if fits is False else 0)


def _write(path, value, code):
  """Writes JSON where a path is given; returns the exit code."""
  if path:
    with open(f'{path}.part', 'w', encoding='utf-8') as f:
      json.dump(value, f, indent=1)
      f.write('\n')
    os.replace(f'{path}.part', path)
  return code


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file(
      'config', None, 'Config file.', lock_config=True)
  _TOPOLOGY = flags.DEFINE_string(
      'topology', '', 'TPU slice to compile for, such as v5e:4x4.')
  _DEVICES = flags.DEFINE_integer(
      'devices', None, 'CPU devices to compile for.', lower_bound=1)
  _SWEEP = flags.DEFINE_enum(
      'sweep', '', ['', 'batch'], 'What to find the largest fitting value of.')
  _CLASSES = flags.DEFINE_integer(
      'classes', None, 'Outputs of the head.', lower_bound=1)
  _OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
  flags.mark_flag_as_required('config')
  app.run(main)
