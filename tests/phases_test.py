"""phases.schedule: where stages begin, and what converts theta."""

import jax
import jax.numpy as jnp
import pytest

from peftjax.method import Method
from peftjax.phases import Phase
from peftjax.phases import schedule


def method(name, phases=()):
  return Method(name, lambda site: True, lambda key, site, p, stats: {},
                phases=tuple(phases))


def phase(name, share, label, to='m'):
  """A phase that appends its label to every leaf's history."""
  def start(theta, key, sites):
    return {p: {**t, label: (key, sites)} for p, t in theta.items()}

  return Phase(name, share, method(to), start)


def spans(stages):
  return [(s.start, s.end) for s in stages]


def test_one_stage_without_phases():
  a, b = method('a'), method('b')
  (start, end, methods, convert), = schedule((a, b), 7)
  assert (start, end, methods) == (0, 7, (a, b))
  theta = {'a': {}, 'b': {}}
  assert convert(theta, None, None) is theta
  assert schedule(a, 7)[0].methods == (a,)


@pytest.mark.parametrize('steps, share, at', [
    (150, 0.5, 75), (3, 0.5, 2), (10, 0.25, 2), (10, 0.26, 3), (1, 0.5, 0),
    (0, 0.5, 0), (5, 1.0, 5), (5, 0.0, 0)])
def test_boundaries(steps, share, at):
  first = method('m', [phase('second', share, 'x')])
  stages = schedule(first, steps)
  assert spans(stages) == [(0, at), (at, steps)]
  assert stages[0].methods == (first,)
  assert stages[1].methods == (first.phases[0].method,)  # even with no steps


def test_methods_change_at_their_own_steps():
  a = method('a', [phase('a2', 0.2, 'a2', 'a'), phase('a3', 0.6, 'a3', 'a')])
  b, c = method('b'), method('c', [phase('c2', 0.6, 'c2', 'late')])
  stages = schedule((a, b, c), 10)
  assert spans(stages) == [(0, 2), (2, 6), (6, 10)]
  a2, a3, c2 = a.phases[0].method, a.phases[1].method, c.phases[0].method
  assert [s.methods for s in stages] == [(a, b, c), (a2, b, c), (a3, b, c2)]
  theta = {n: {'site': {}} for n in 'abc'}
  for i, stage in enumerate(stages):
    theta = stage.convert(theta, jax.random.key(i), 'sites')
  assert list(theta) == ['a', 'b', 'late']  # named by the new method
  assert list(theta['a']['site']) == ['a2', 'a3']
  assert theta['b']['site'] == {}
  assert theta['late']['site']['c2'][1] == 'sites'
  keys = [theta['a']['site']['a3'][0], theta['late']['site']['c2'][0]]
  assert not jnp.array_equal(*map(jax.random.key_data, keys))


def test_phases_of_one_step_follow_each_other():
  """Shares that round to one step are one change, in order."""
  a = method('m', [phase('a2', 0.50, 'a2'), phase('a3', 0.51, 'a3')])
  stages = schedule(a, 10)
  assert spans(stages) == [(0, 5), (5, 10)]
  theta = stages[1].convert({'m': {'site': {}}}, jax.random.key(0), None)
  assert list(theta['m']['site']) == ['a2', 'a3']
  assert stages[1].methods == (a.phases[1].method,)


def test_two_methods_of_one_name():
  m = method('m', [phase('second', 0.5, 'x')])
  stages = schedule((m, m._replace(phases=())), 4)
  theta = stages[1].convert(
      {'m': {'s': {}}, 'm_2': {'s': {}}}, jax.random.key(0), None)
  assert [list(theta[n]['s']) for n in ('m', 'm_2')] == [['x'], []]


def test_errors():
  with pytest.raises(ValueError, match='steps=-1: expected at least 0'):
    schedule(method('a'), -1)
  with pytest.raises(TypeError):
    schedule(method('a'), 1.5)
  for shares in ((0.6, 0.5), (-0.1,), (1.1,)):
    bad = method('a', [phase(f'p{s}', s, 'x') for s in shares])
    with pytest.raises(ValueError, match=f"'p{shares[-1]}' starts at share"):
      schedule(bad, 10)
  nested = Phase('p', 0.5, method('m', [phase('q', 0.7, 'x')]), None)
  with pytest.raises(ValueError, match="'p' has phases of its own"):
    schedule(method('a', [nested]), 10)
