"""docs/add_a_method.md works, word for word."""

import pathlib
import re

import pytest

import peftjax
from peftjax import capabilities
from peftjax import docs
from peftjax import method
from peftjax.methods import scaling

PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'add_a_method.md'


@pytest.fixture(scope='module')
def blocks():
  return re.findall(r'^```python\n(.*?)^```', PAGE.read_text(), re.M | re.S)


@pytest.fixture
def in_package(blocks, tmp_path):
  """The example as a file of its family, for one test."""
  (tmp_path / 'my_scale.py').write_text(blocks[0])
  scaling.__path__.append(str(tmp_path))
  yield
  scaling.__path__.remove(str(tmp_path))


def _run(blocks, *which):
  names = {}
  for i in which:
    code = compile(blocks[i], f'add_a_method.md, block {i}', 'exec')
    exec(code, names)  # pylint: disable=exec-used
  return names


def test_there_are_four_blocks(blocks):
  assert len(blocks) == 4


def test_method_passes_the_checks(blocks):
  results = _run(blocks, 0, 1)['results']
  assert {r.form for r in results} >= {'plain', 'scan', 'remat', 'scan_remat'}


def test_oracle(blocks):
  _run(blocks, 0, 2)['test_scales_what_the_layer_puts_out']()


def test_file_is_all_it_takes(blocks, in_package):
  del in_package
  assert 'scaling.my_scale' in method.names()
  config = _run(blocks, 3)['get_config']('runlocal')
  first, head = (peftjax.load(**m) for m in config.method)
  assert (first.name, head.name) == ('my_scale', 'full')
  assert capabilities.formula('scaling.my_scale') == 'd_out a kernel'
  row = capabilities.measure('scaling.my_scale')
  assert (row.folds, row.exact, row.int8) == (True, True, True)
  assert '`init_scale=1.0`' in docs.page('scaling.my_scale')
