"""Metrics of a run: JSON lines and TensorBoard events, continued on resume."""

import contextlib
import json
import os

FILE = 'metrics.jsonl'


@contextlib.contextmanager
def writer(workdir, step, chief=True):
  """Yields write(step, {name: number}), which appends to both.

  What an earlier run wrote after `step` is dropped: those steps are done again.

  Args:
    workdir: Folder of 'metrics.jsonl' and of the events.
    step: The step that the run goes on from.
    chief: False writes nothing: another process does.
  """
  if not chief:
    yield lambda step, values: None
    return
  import tensorboardX  # slow to import
  path = os.path.join(workdir, FILE)
  seen = _drop_after(path, step)
  board = tensorboardX.SummaryWriter(
      os.path.join(workdir, 'tensorboard'), purge_step=step + 1)
  with open(path, 'a', encoding='utf-8') as f:

    def write(step, values):
      line = (step, frozenset(values))
      if line in seen:  # written before the run was cut off
        return
      seen.add(line)
      f.write(json.dumps(dict(step=step, **values)) + '\n')
      f.flush()
      for name, value in values.items():
        board.add_scalar(name, value, step)

    try:
      yield write
    finally:
      board.close()


def read(workdir):
  """The lines of metrics.jsonl; a last one that was cut off is left out."""
  lines = []
  try:
    with open(os.path.join(workdir, FILE), encoding='utf-8') as f:
      for line in f:
        if line.endswith('\n'):
          lines.append(json.loads(line))
  except FileNotFoundError:
    pass
  return lines


def _drop_after(path, step):
  """Rewrites the file without later lines; what the others are about."""
  keep = [v for v in read(os.path.dirname(path)) if v['step'] <= step]
  part = f'{path}.part'
  with open(part, 'w', encoding='utf-8') as f:
    f.writelines(json.dumps(v) + '\n' for v in keep)
  os.replace(part, path)
  return {(v['step'], frozenset(v) - {'step'}) for v in keep}
