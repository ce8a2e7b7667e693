"""The table of a grid, from rows made by hand; its grids run locally."""

import pytest

from experiments.table import images
from experiments.table import pivot
from experiments.table import text
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
