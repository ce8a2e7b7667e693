"""Every method under peftjax/methods passes every check, in every form.

Methods are found by walking the package: a new file is tested without a change
here. `peftjax/conformance` says what is checked.
"""

import pathlib

import pytest

from peftjax import capabilities
from peftjax import conformance
from peftjax import docs
from peftjax import method

ROOT = pathlib.Path(__file__).parent.parent


def _subjects():
  """(name, phase, label) of every method and of its later phases."""
  for name in method.names():
    make, example = conformance.named(name)
    yield name, 0, name
    for i, phase in enumerate(make(**example).phases, 1):
      yield name, i, f'{name}:{phase.name}'


def page_and_lines_are_fresh(subject):
  """What was measured of a method, and its docstrings, are what is written."""
  name, = subject.make.args
  row = capabilities.measure(name)
  page = ROOT / 'docs/methods' / f'{name.replace(".", "_")}.md'
  assert page.read_text() == docs.page(name), (
      f'{page.name} is stale: run python -m peftjax.docs')
  for file, link in (('README.md', 'docs/methods/'),
                     ('docs/methods/README.md', '')):
    assert capabilities.line(row, link) in (ROOT / file).read_text(), (
        f'{file} is stale: run python -m peftjax.methods --write, '
        'python -m peftjax.docs')


# A method's cases stand together, so that what one compiled serves the next.
CASES = [
    pytest.param(name, phase, check, form, id='-'.join(
        filter(None, (label, form, check.__name__))))
    for name, phase, label in _subjects()
    for check, form in (
        *conformance.cases(phase),
        *(() if phase else [(page_and_lines_are_fresh, '')]))]


@pytest.mark.parametrize('name, phase, check, form', CASES)
def test_conforms(name, phase, check, form):
  subject = conformance.subject(name, phase)
  try:
    check(subject.run(form) if form else subject)
  except conformance.Skip as e:
    pytest.skip(str(e))
