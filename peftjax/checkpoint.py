"""Checkpoints: everything a run needs to go on as if it had never stopped.

  WORKDIR/checkpoints/<step>/state    arrays, by orbax
  WORKDIR/checkpoints/<step>/meta     JSON: config, fingerprint of the base,
                                      data position, names, shapes, digest
  WORKDIR/unreadable/                 what could not be read, moved away

Saving is asynchronous: orbax copies the arrays before `save` returns and writes
them while training goes on; a checkpoint that was not written to its end is
never taken for one. Reading verifies a digest over every byte of the arrays, so
what is read is what was saved, or it is not used: then the one before is.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
import tempfile

from absl import logging
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from peftjax import config as config_lib
from peftjax import distributed
from peftjax import trees

FORMAT = 1


# ------------------------------------------------------------------- folders
@contextlib.contextmanager
def workdir(path):
  """Makes a folder to work in, and keeps other runs out of it meanwhile.

  Raises:
    ValueError: it is no folder, cannot be written, or is not the same for all
      processes of a run; or another run works in it.
  """
  path = os.fspath(path)
  if '://' in path:
    raise ValueError(f'workdir {path!r}: expected a folder; a bucket is one '
                     'where it is mounted')
  try:
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
    lock = open(os.path.join(path, '.lock'), 'a+', encoding='utf-8')
  except OSError as e:
    raise ValueError(f'workdir {path!r} cannot be written: {e}; choose a '
                     'folder that can be, by --workdir') from e
  with lock:
    if distributed.is_chief():
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as e:
        raise ValueError(f'workdir {path!r} is in use by another process; wait '
                         'for it, or choose another by --workdir') from e
    if jax.process_count() > 1:
      _check_shared(path)
    yield os.path.abspath(path)


def _check_shared(path):
  """Raises in all processes unless what the chief writes is there for all."""
  mark = os.path.join(path, '.shared')
  if distributed.is_chief():
    with open(mark, 'w', encoding='utf-8') as f:
      f.write(str(secrets.randbelow(2 ** 31)))
  distributed.all_of(True)  # it is written
  try:
    with open(mark, encoding='utf-8') as f:
      seen = int(f.read())
  except (OSError, ValueError):
    seen = -1
  if not distributed.same(seen):
    raise ValueError(f'workdir {path!r} is not the same folder for all '
                     'processes: choose one of a file system that they share')


@contextlib.contextmanager
def manager(path, keep):
  """Checkpoints below a work folder; leaving waits until all are written.

  Args:
    path: The work folder.
    keep: How many of the newest are kept.
  """
  options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, cleanup_tmp_directories=True)
  before = logging.get_verbosity()
  if before == logging.INFO:  # orbax says dozens of lines a save
    logging.set_verbosity(logging.WARNING)
  try:
    found = ocp.CheckpointManager(
        os.path.join(path, 'checkpoints'), options=options)
    try:
      yield found
    except BaseException:
      if jax.process_count() == 1:  # others may never come to close theirs
        found.close()
      raise
    found.close()
  finally:
    logging.set_verbosity(before)


# ---------------------------------------------------------------------- save
def _flat(tree):
  """{'opt/0/mu/...': leaf} for any pytree."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): v for path, v in leaves}


def _stored(flat):
  """What orbax is given: it takes no arrays without entries."""
  return {name: v for name, v in flat.items() if v.size}


def _digest(flat):
  """Fingerprint of the arrays, however many devices and processes hold them."""
  return trees.fingerprint(flat)


def _seal(meta):
  """Digest of a description, so that a damaged one is not taken at its word."""
  rest = {k: v for k, v in meta.items() if k != 'seal'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def save(found, step, state, meta):
  """Saves, unless there is a checkpoint of this step.

  Args:
    found: From `manager`.
    step: Number of steps done.
    state: Pytree of arrays. It may be donated once this returns.
    meta: Mapping of JSON values (lists, no tuples) with the entries 'config'
      and 'base', which `restore` checks.
  """
  if step in found.all_steps():
    return
  flat = _flat(state)
  shapes = {n: [list(v.shape), str(v.dtype)] for n, v in flat.items()}
  meta = dict(meta, format=FORMAT, step=step, arrays=shapes,
              digest=_digest(flat))
  meta['seal'] = _seal(meta)
  found.save(step, force=True, args=ocp.args.Composite(
      state=ocp.args.StandardSave(_stored(flat)),
      meta=ocp.args.JsonSave(meta)))


# ------------------------------------------------------------------- restore
def restore(found, abstract, config, base):
  """The newest checkpoint that can be read.

  One that cannot be is reported and moved to 'unreadable' beside the others'
  folder, and the one before is tried.

  Args:
    found: From `manager`.
    abstract: `meta -> pytree of ShapeDtypeStructs` with shardings, of the state
      as it was saved.
    config: The run's config as JSON values.
    base: Fingerprint of the run's base.

  Returns:
    (state, meta), or None where there is none.

  Raises:
    ValueError: the checkpoint is of another config, base or format.
  """
  for step in sorted(found.all_steps(), reverse=True):
    meta = _attempt(found, step, functools.partial(_read_meta, found, step))
    if meta is None:
      continue
    _check(found, meta, config, base)
    tree = abstract(meta)
    _check_arrays(found, meta, tree)
    state = _attempt(found, step, functools.partial(
        _read_state, found, meta, tree))
    if state is not None:
      return state, meta
  return None


def _attempt(found, step, read):
  out, error = None, None
  try:
    out = read()
  except Exception as e:  # pylint: disable=broad-except
    # Whatever a damaged file makes orbax raise: there are many kinds.
    error = e
  if distributed.all_of(error is None):
    return out
  text = str(error).split('\n', 1)[0][:300]
  if distributed.is_chief():
    place = _set_aside(found, step)
    logging.warning(
        'checkpoint %s cannot be read and was moved to %s (%s: %s); falling '
        'back to the one before', step, place, type(error).__name__, text)
  distributed.all_of(True)  # it was moved
  found.reload()
  return None


def _set_aside(found, step):
  folder = os.path.join(os.path.dirname(found.directory), 'unreadable')
  os.makedirs(folder, exist_ok=True)
  place = tempfile.mkdtemp(prefix=f'{step}-', dir=folder)
  shutil.move(os.path.join(found.directory, str(step)), place)
  return place


def _read_meta(found, step):
  meta = found.restore(
      step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
  if meta.get('seal') != _seal(meta):
    raise ValueError('its description is not the one that was saved')
  return meta


def _check(found, meta, config, base):
  place = os.path.join(found.directory, str(meta['step']))
  if meta['format'] != FORMAT:
    raise ValueError(
        f'{place} has format {meta["format"]}, this version reads {FORMAT}')
  differing = config_lib.differences(meta['config'], config)
  if differing:
    raise ValueError(
        f'{place} was made with another config:\n  ' + '\n  '.join(differing)
        + '\nchoose another --workdir, or the config that it was made with')
  if meta['base'] != base:
    raise ValueError(
        f'{place} was made with another base: fingerprint '
        f'{meta["base"][:12]}..., now {base[:12]}...; choose another '
        '--workdir, or the weights that it was made with')


def _check_arrays(found, meta, tree):
  have = {n: [list(v.shape), str(v.dtype)] for n, v in _flat(tree).items()}
  want = meta['arrays']
  odd = [n for n in sorted({*have, *want}) if have.get(n) != want.get(n)]
  if odd:
    raise ValueError(
        f'{os.path.join(found.directory, str(meta["step"]))} holds '
        f'{want.get(odd[0], "nothing")} for {odd[0]}, this version of the code '
        f'expects {have.get(odd[0], "nothing")}; choose another --workdir')


def _read_state(found, meta, tree):
  flat = _flat(tree)
  out = found.restore(meta['step'], args=ocp.args.Composite(
      state=ocp.args.StandardRestore(_stored(flat))))['state']
  out = {n: out[n] if v.size else jax.device_put(
      jnp.zeros(v.shape, v.dtype), v.sharding) for n, v in flat.items()}
  if meta['digest'] and _digest(out) != meta['digest']:
    raise ValueError('its arrays are not those that were saved')
  return jax.tree.unflatten(jax.tree.structure(tree), out.values())
