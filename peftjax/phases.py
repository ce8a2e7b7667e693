"""Procedures as data: methods that change their form while they train.

A method that is trained in several steps of different kinds lists what follows
as `Method.phases`. `schedule` cuts a run into stages; between two of them the
training loop converts theta, and starts the optimiser and the compiled step
anew. There is one training loop, whatever the procedure.
"""

from collections.abc import Callable
import operator
from typing import NamedTuple

import jax

from peftjax.method import as_methods, Method


class Phase(NamedTuple):
  """A later phase of a method.

  Attributes:
    name: What it is called in logs.
    share: Fraction of all steps after which it starts, in [0, 1].
    method: The Method that takes over, with no phases of its own.
    start: `(theta, key, sites) -> theta`, from the previous method's theta
      {path: t} to this one's. Runs once, outside jit: shapes may depend on
      values. `sites` is what `describe` returned.
  """

  name: str
  share: float
  method: Method
  start: Callable


class Stage(NamedTuple):
  """Steps [start, end) of a run, all trained with the same methods.

  Attributes:
    start: First step.
    end: First step after the stage.
    methods: Tuple of the methods that act.
    convert: `(theta, key, sites) -> theta`, from the whole theta at the end of
      the stage before (identity in the first stage).
  """

  start: int
  end: int
  methods: tuple
  convert: Callable


def schedule(methods, steps):
  """Cuts a run of `steps` steps into stages.

  A phase starts at step round(share * steps). Phases that start at the same
  step are one change. The last stage always has every method's last phase, even
  where it is left with no steps (start == end), so that what a run ends with
  does not depend on its length; so may the first stage be empty.

  Args:
    methods: A Method or a sequence of them.
    steps: Number of steps of the run, at least 0.

  Returns:
    List of `Stage`s that cover [0, steps); one where no method has phases.

  Raises:
    ValueError: negative steps, shares outside [0, 1] or not increasing, or a
      phase whose method has phases of its own.
  """
  steps = operator.index(steps)
  if steps < 0:
    raise ValueError(f'steps={steps}: expected at least 0')
  current = list(as_methods(methods).values())
  changes = {}
  for i, m in enumerate(current):
    last = 0.0
    for phase in m.phases:
      if not last <= phase.share <= 1:
        raise ValueError(
            f'{m.name}: phase {phase.name!r} starts at share {phase.share}; '
            f'expected {last} to 1, as phases follow each other')
      if phase.method.phases:
        raise ValueError(f'{m.name}: phase {phase.name!r} has phases of its '
                         'own; list them all in the first method')
      last = phase.share
      changes.setdefault(round(phase.share * steps), []).append((i, phase))
  starts = sorted(changes)
  stages = [Stage(0, starts[0] if starts else steps, tuple(current), _same)]
  for start, end in zip(starts, [*starts[1:], steps]):
    before = tuple(current)
    for i, phase in changes[start]:
      current[i] = phase.method
    stages.append(Stage(start, end, tuple(current), _conversion(
        before, tuple(current), changes[start])))
  return stages


def _same(theta, key, sites):
  del key, sites
  return theta


def _conversion(before, after, changes):
  def convert(theta, key, sites):
    parts = [theta[name] for name in as_methods(before)]
    for n, (i, phase) in enumerate(changes):
      parts[i] = phase.start(parts[i], jax.random.fold_in(key, n), sites)
    return dict(zip(as_methods(after), parts))

  return convert
