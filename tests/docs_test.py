"""The README's table and the methods' pages are what the code makes of them."""

import pathlib
import re

import pytest

from peftjax import capabilities
from peftjax import docs
from peftjax import method
from peftjax.methods import __main__ as methods_main

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize('name', method.names())
def test_count_formula_is_documented(name):
  assert capabilities.formula(name), (
      f"{name}: the module docstring has no line 'Count: ...'")


def test_every_method_has_a_page_and_a_line():
  """What they say is compared method by method, in conformance_test.py."""
  names = [n.replace('.', '_') for n in method.names()]
  assert {p.stem for p in (ROOT / 'docs/methods').glob('*.md')} == {
      'README', *names}, 'stale: run python -m peftjax.docs'
  head = capabilities.markdown(of=()).split('\n')
  for file, link, write in (
      ('README.md', 'docs/methods/', methods_main.replace),
      ('docs/methods/README.md', '', lambda _, table: docs.index(table))):
    text = (ROOT / file).read_text()
    table = re.search(r'^\| method \|.*\n(\|.*\n)*', text, re.M)[0].rstrip()
    lines = table.split('\n')
    assert lines[:2] == head
    assert [re.search(r'\]\((.*?)\.md\)', v)[1] for v in lines[2:]] == [
        link + n for n in names], f'{file} is stale'
    assert write(text, table) == text, f'{file} is stale'


def test_replace_wants_both_markers_once():
  begin, end = methods_main.BEGIN, methods_main.END
  assert methods_main.replace(f'a\n{begin}\nold\n{end}\nb', 'new') == (
      f'a\n{begin}\nnew\n{end}\nb')
  for text in ('', begin, f'{begin}{begin}{end}'):
    with pytest.raises(ValueError, match='marker'):
      methods_main.replace(text, 'new')


def test_capabilities_are_measured_and_not_believed():
  """A method's own claims do not reach the table."""
  lora = capabilities.measure('lowrank.lora')
  assert (lora.folds, lora.exact, lora.calibration, lora.int8) == (
      True, True, 'no', True)
  ssf = capabilities.measure('scaling.ssf')
  assert not ssf.exact
  int8 = capabilities.measure('quantised.int8')
  assert (int8.trained, int8.exact, int8.int8) == (0, False, None)


def test_a_keyword_without_a_default_is_shown_as_in_the_example():
  name = 'selective.trainable_tokens'
  row = capabilities.measure(name)
  assert row.trained is None and row.cells()[3:5] == ('-', '-')  # no table
  assert 'tokens=(2, 0)' in docs.example(name)
  assert '- `tokens`: Ids' in docs.arguments(method.factory(name))


def test_prose_keeps_equations_and_escapes_the_rest():
  doc = '''One line with a * b, d_in, `code_*` and alpha.<leaf>.

    y = x * K

  Where they differ:
    First. Some text
      that goes on.
    * Second.
  '''
  assert docs.prose(doc) == '\n'.join([
      r'One line with a \* b, d_in, `code_*` and alpha.\<leaf>.', '', '```', 'y = x * K', '```',
      '', 'Where they differ:', '', '- First. Some text', '  that goes on.',
      '- Second.'])


@pytest.mark.parametrize('page', [
    'analysis.md', 'backbones.md', 'data.md', 'calibrate.md'])
def test_examples_run(page, tmp_path, monkeypatch):
  """The python blocks of a page, one after the other, as a reader would."""
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(
      r'```python\n(.*?)```', (ROOT / 'docs' / page).read_text(), re.S)
  assert blocks
  names = {}
  for block in blocks:
    exec(block, names)  # pylint: disable=exec-used: our own page
