"""The notebooks run, in their small mode, and are kept without outputs."""

import pathlib

import pytest

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')

COLABS = sorted((pathlib.Path(__file__).parents[1] / 'colabs').glob('*.ipynb'))


@pytest.fixture(params=COLABS, ids=lambda p: p.stem, name='notebook')
def _notebook(request):
  return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks():
  assert {p.stem for p in COLABS} >= {'first_adapter', 'add_a_method'}


def test_outputs_are_stripped(notebook):
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      assert not cell.outputs and cell.execution_count is None


def test_first_cell_installs(notebook):
  code = [c.source for c in notebook.cells if c.cell_type == 'code']
  assert '%pip install' in code[0] and 'peftjax' in code[0]


def test_runs(notebook, tmp_path, monkeypatch):
  monkeypatch.setenv('PEFTJAX_SMALL', '1')
  monkeypatch.setenv('MPLBACKEND', 'agg')
  client = nbclient.NotebookClient(
      notebook, timeout=600, kernel_name='python3',
      resources={'metadata': {'path': str(tmp_path)}})
  client.execute()
