"""Conformance: the checks that every method must pass, on one method.

  from peftjax import conformance
  conformance.check(my_method, example=dict(rank=2))

runs them all and prints a table. A method is run in four forms of one small
model that knows nothing of this library: plain, scanned, rematerialised, both.
Methods on hooks need a backbone that calls them: a small decoder, or a vision
transformer where that has no site for them.
"""

import functools
from typing import NamedTuple

from peftjax.conformance.checks import CHECKS
from peftjax.conformance.factories import ONCE, Skip
from peftjax.conformance.runs import FORMS, named, Subject
from peftjax.method import Method


class Result(NamedTuple):
  """Outcome of one check: 'pass', 'skip' or 'fail', and why."""

  check: str
  form: str  # one of FORMS, or '' for checks of the factory
  outcome: str
  why: str = ''


@functools.lru_cache(maxsize=16)
def subject(name, phase=0):
  """The Subject of a method under peftjax/methods, shared by who asks."""
  return Subject(*named(name), phase)


def cases(phase=0, forms=FORMS):
  """[(check, form)] that apply to a method, or to a later phase of one."""
  out = [] if phase else [(check, '') for check in ONCE]
  for form in forms:
    for check in CHECKS:
      name = check.__name__
      if (phase and name == 'identity_at_init'
          or name.startswith('scanned') and 'scan' not in form
          or name.startswith('remat') and 'remat' not in form):
        continue
      out.append((check, form))
  return out


def outcome(of, check, form):
  """Runs one check of a Subject: a Result."""
  try:
    check(of.run(form) if form else of)
  except Skip as e:
    return Result(check.__name__, form, 'skip', str(e))
  except Exception as e:  # a method may fail in any way
    return Result(check.__name__, form, 'fail',
                  str(e) if isinstance(e, AssertionError) else
                  f'{type(e).__name__}: {e}')
  return Result(check.__name__, form, 'pass')


def check(method, example=None, forms=FORMS):
  """Runs every check on one method and prints a table.

  Args:
    method: A factory, a Method, or the name of one under peftjax/methods.
    example: Small hyper-parameters for the factory, for kernels of 8 x 8. By
      name: the module's own EXAMPLE.
    forms: Which forms of the model to run.

  Returns:
    A list of `Result`s, one a check and form; later phases follow the method.
  """
  if isinstance(method, str):
    make, given = named(method)
    example = given if example is None else example
  elif isinstance(method, Method):
    make = lambda: method
  else:
    make = method
  first = Subject(make, example or {})
  results = []
  for i, label in enumerate([first.method.name] + [
      p.name for p in first.method.phases]):
    of = Subject(make, example or {}, i) if i else first
    skip = ONCE if isinstance(method, Method) else ()
    found = [outcome(of, c, f) for c, f in cases(i, forms)
             if c not in skip]
    print(f'{label}\n{_table(found, forms)}\n')
    results += found
  return results


def _table(results, forms):
  """One line a check, one column a form, and the reasons below."""
  rows = {}
  for r in results:
    rows.setdefault(r.check, {})[r.form] = r.outcome
  width = max(map(len, rows))
  lines = [' '.join([f'{"":{width}}', *(f'{f:>10}' for f in forms)])]
  for name, by_form in rows.items():
    marks = [by_form.get(f, by_form.get('', '') if f == forms[0] else '')
             for f in forms]
    lines.append(' '.join([f'{name:{width}}', *(f'{m:>10}' for m in marks)]))
  why = {}
  for r in results:
    if r.why:
      why.setdefault((r.outcome, r.check, r.why), []).append(r.form)
  lines += [f'{o} {name} ({", ".join(filter(None, f)) or "factory"}): {text}'
            for (o, name, text), f in why.items()]
  return '\n'.join(lines)
