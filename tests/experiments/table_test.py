"""The table of a grid, from rows made by hand; its grids run locally."""

import os
import pathlib

import pytest

from experiments.table import images
from experiments.table import pivot
from experiments.table import text
from experiments.table import times
from peftjax import case as case_lib
from peftjax import compare


def row(arm, task, seed, score):
  return dict(arm=arm, task=task, seed=seed, score=score, metric='accuracy',
              lr=1e-3, trained=1200 if task == 'x' else 1300, stored=1500,
              step_seconds=0.25, peak_bytes=3 * 2**20)


ROWS = [row('a', 'x', 0, .5), row('a', 'x', 1, .7), row('b', 'x', 0, .9),
        row('a', 'y', 0, .8), row('b', 'y', 0, .8)]


def test_pivot():
  a, b = pivot.pivot(ROWS)
  assert a[''] == 'a' and a['x (accuracy)'] == '60.0 ± 14.1'
  assert b['x (accuracy)'] == '90.0' and b['y (accuracy)'] == '80.0'
  assert (a['mean rank'], b['mean rank']) == ('1.8', '1.2')  # y is a tie
  assert a['trained'] == '1,200' and a['peak MiB'] == '3'


def test_an_arm_without_a_task_has_no_rank():
  lines = pivot.pivot(ROWS[:4])
  assert [line['mean rank'] for line in lines] == ['1.0', '']
  assert lines[1]['y (accuracy)'] == ''


@pytest.mark.parametrize('module', [text, images])
def test_grid_runs_locally(module, tmp_path):
  grid = module.get_config('runlocal')
  grid.arms = grid.arms[:1]  # the suites run the others
  rows, failures = compare.run(grid, str(tmp_path))
  assert not failures and len(rows) == len(grid.tasks)
  assert pivot.pivot(rows)


@pytest.mark.parametrize('module', [text, images])
def test_grids_are_whole(module):
  grid = module.get_config()
  assert len(grid.arms) == 8 and len(grid.tasks) == 5 and len(grid.seeds) == 3
  assert len(grid.search.rates) == 3


_ROOT = pathlib.Path(__file__).parents[2]
_DATA = os.environ.get('PEFTJAX_DATA') or str(_ROOT.parent / 'shared' / 'data')


@pytest.mark.skipif(not os.path.exists(os.path.join(_DATA, 'manifest.json')),
                    reason='needs the data sets of $PEFTJAX_DATA')
@pytest.mark.parametrize('module', [text, images])
def test_sets_are_as_large_as_the_grids_ask(module, monkeypatch):
  # Final cells open the test part hours after the search began.
  monkeypatch.setenv('PEFTJAX_DATA', _DATA)
  grid = module.get_config()
  for name, change in grid.tasks:
    config = compare._cell(grid.base, change.items())
    if config.data.name.startswith('file:'):  # what halves.py writes
      config.data.name = f'data:{name}'
    for split in ('train', 'validation', 'test'):
      assert case_lib._open(config.data, split).examples


def test_steps_are_timed_by_themselves():
  grid = times.get_config('images')
  assert grid.search is None and len(grid.tasks) == 1 and grid.base.steps == 24
  assert len(grid.arms) == 8
  with pytest.raises(ValueError, match='expected times.py:text or'):
    times.get_config('videos')
  timed = [dict(r, step_seconds=0.125) for r in ROWS if r['arm'] == 'a']
  a, b = pivot.pivot(ROWS, timed)
  assert (a['s/step'], b['s/step']) == ('0.12', '0.25')
