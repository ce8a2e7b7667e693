"""Several processes that train as one: how they start, agree and end.

  python -m peftjax.train --config=... --workdir=... \
      --coordinator=HOST:PORT --num_processes=2 --process_id=0

and the same with --process_id=1. Where jax finds the other processes itself
(TPU pods, Slurm, GKE) all of them run it with --distributed instead. Every
process runs the same program on its part of the data; what only one may do,
such as writing files, the chief does.

docs/pods.md has the commands for each kind of cluster.
"""

import collections
import contextlib
import hashlib
import os
import sys
import traceback

from absl import flags
import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from peftjax import sharding


FLAGS = ('coordinator', 'num_processes', 'process_id', 'distributed',
         'heartbeat_timeout')


# ----------------------------------------------------------------------- start
def define_flags():
  """Flags of a command that several processes may run together."""
  flags.DEFINE_string(
      'coordinator', None, 'HOST:PORT of process 0, where the processes meet.')
  flags.DEFINE_integer('num_processes', None, 'How many, with --coordinator.')
  flags.DEFINE_integer(
      'process_id', None, 'Which of them this one is, counted from 0.')
  flags.DEFINE_bool(
      'distributed', False,
      'Several processes that jax finds itself: TPU pods, Slurm, GKE.')
  flags.DEFINE_integer(
      'heartbeat_timeout', 100, 'Seconds without a sign of life after which a '
      'process counts as dead, and all others end.', lower_bound=1)


def start(coordinator=None, num_processes=None, process_id=None,
          distributed=False, heartbeat_timeout=100):
  """Meets the other processes, if there are any; before any device is touched.

  Args:
    coordinator: 'HOST:PORT' of process 0.
    num_processes, process_id: With `coordinator`.
    distributed: Whether jax is to find all three itself.
    heartbeat_timeout: Seconds after which a silent process counts as dead.

  Raises:
    ValueError: arguments that do not go together, or processes that do not
      meet.
  """
  if distributed and coordinator:
    raise ValueError('--distributed finds the processes itself: expected no '
                     '--coordinator')
  if not coordinator:
    for name, value in dict(
        num_processes=num_processes, process_id=process_id).items():
      if value is not None:
        raise ValueError(
            f'--{name}={value} needs --coordinator=HOST:PORT, the address of '
            'process 0; --distributed takes neither')
    if not distributed:
      return
  else:
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdigit():
      raise ValueError(f'--coordinator={coordinator!r}: expected HOST:PORT')
    if num_processes is None or process_id is None:
      raise ValueError(f'--coordinator={coordinator} needs --num_processes and '
                       '--process_id')
    if num_processes < 1:
      raise ValueError(f'--num_processes={num_processes}: expected 1 or more')
    if not 0 <= process_id < num_processes:
      raise ValueError(
          f'--process_id={process_id} with {num_processes} processes: expected '
          f'0 to {num_processes - 1}')
  # SIGTERM is ours to answer, in one way for one process and for many.
  jax.config.update('jax_enable_preemption_service', False)
  # Processors find the parts of a sum by their order, so programs run in turn.
  # Other devices have queues, which this is nothing to.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  try:
    jax.distributed.initialize(
        coordinator, num_processes, process_id,
        heartbeat_timeout_seconds=heartbeat_timeout)
  except (RuntimeError, ValueError) as e:
    hint = ('' if coordinator else '; --coordinator, --num_processes and '
            '--process_id say it by hand')
    raise ValueError(f'the processes cannot meet: {e}{hint}') from e


# ----------------------------------------------------------------------- agree
def is_chief():
  """Whether this is the process that writes files."""
  return jax.process_index() == 0


def together(asked, mesh, lag):
  """`() -> bool`, whether any process was asked to stop: the same in all.

  Every process calls it once a step. The answer is that of `lag` steps ago, so
  that nobody waits for the step that has just started. One process alone is
  asked directly.

  Args:
    asked: `() -> bool` of this process.
    mesh: From `sharding.make_mesh`.
    lag: Steps.
  """
  if jax.process_count() == 1:
    return asked
  place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  rows = len(mesh.local_devices)
  most = jax.jit(lambda v: v.max(), out_shardings=sharding.replicated(mesh))
  sent = collections.deque()

  def agreed():
    own = np.full(rows, asked(), np.int32)
    sent.append(most(jax.make_array_from_process_local_data(place, own)))
    return len(sent) > lag and bool(sent.popleft())

  return agreed


def all_of(flag):
  """Whether it is true in every process."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(multihost_utils.process_allgather(np.int32(flag)).all())


def same(number):
  """Whether all processes have the same number."""
  if jax.process_count() == 1:
    return True
  found = multihost_utils.process_allgather(np.int32(number))
  return bool((found == found[0]).all())


def check_same(what, text):
  """Raises a ValueError in all processes unless all have the same text."""
  if jax.process_count() == 1:
    return
  own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  found = multihost_utils.process_allgather(own.astype(np.int32))
  other = np.flatnonzero((found != found[0]).any(1))
  if other.size:
    raise ValueError(f'{what} of process {other[0]} is not that of process 0; '
                     'all processes are started with the same command')


def whole(tree):
  """Arrays of which every process has all: numpy, where parts lie elsewhere.

  Args:
    tree: Pytree of arrays; it goes by an array at a time.
  """
  return jax.tree.map(
      lambda v: v if not isinstance(v, jax.Array) or v.is_fully_addressable
      else multihost_utils.process_allgather(v, tiled=True), tree)


# ------------------------------------------------------------------------- end
@contextlib.contextmanager
def one_for_all():
  """An error in one of several processes ends this one at once, with code 1.

  The interpreter's own way out waits for the others, who may be waiting for a
  sum that this process will never add to. They end as soon as they miss it:
  when its connections close, or after --heartbeat_timeout.
  """
  try:
    yield
  except BaseException as e:
    ok = isinstance(e, SystemExit) and not e.code
    if ok or not jax.distributed.is_initialized():
      raise
    if isinstance(e, SystemExit):
      print(e.code, file=sys.stderr)
    else:
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
