"""Every method under peftjax/methods passes every check, in every form.

Methods are found by walking the package: a new file is tested without a change
here. `peftjax/conformance` says what is checked.
"""

import pytest

from peftjax import conformance
from peftjax import method


def _subjects():
  """(name, phase, label) of every method and of its later phases."""
  for name in method.names():
    make, example = conformance.named(name)
    yield name, 0, name
    for i, phase in enumerate(make(**example).phases, 1):
      yield name, i, f'{name}:{phase.name}'


# A method's cases stand together, so that what one compiled serves the next.
CASES = [
    pytest.param(name, phase, check, form, id='-'.join(
        filter(None, (label, form, check.__name__))))
    for name, phase, label in _subjects()
    for check, form in conformance.cases(phase)]


@pytest.mark.parametrize('name, phase, check, form', CASES)
def test_conforms(name, phase, check, form):
  subject = conformance.subject(name, phase)
  try:
    check(subject.run(form) if form else subject)
  except conformance.Skip as e:
    pytest.skip(str(e))
