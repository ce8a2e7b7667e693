"""Grids: resumable, failures reported, intervals right."""

import json
import os

import ml_collections
import numpy as np
import pytest

from experiments import rules
from peftjax import bases
from peftjax import compare
from peftjax import config as config_lib
from peftjax import report

HEAD = dict(name='selective.full', sites=dict(roles='head'))


def _grid(weights, arms, search=None):
  base = config_lib.defaults()
  base.steps, base.batch, base.eval_batch = 4, 8, 16
  base.model.weights = weights
  base.data.train, base.data.test = 32, 32
  base.checkpoint_every = 0
  grid = ml_collections.ConfigDict()
  grid.base, grid.arms, grid.search = base, arms, search
  grid.tasks, grid.seeds = (('kmnist', {}),), (0,)
  return grid


ARMS = (('head', {'method': (HEAD,)}),
        ('bias', {'method': (dict(name='selective.bitfit'), HEAD)}))


def test_grid_resumes_reports_and_draws(tiny_weights, tmp_path, monkeypatch):
  broken = ('broken', {'method': (dict(name='lowrank.lora', rank=999), HEAD)})
  grid = _grid(tiny_weights, (*ARMS, broken),
               dict(rates=(1.0, 3.0), fraction=0.5, seed=0))
  rows, failures = compare.run(grid, str(tmp_path), say=lambda *_: None)
  assert [r['arm'] for r in rows] == ['head', 'bias']
  assert failures == ['kmnist-broken-search']
  cells = os.listdir(tmp_path / 'cells')
  errors = [c for c in cells if 'broken' in c]
  assert '999' in (tmp_path / 'cells' / errors[0] / 'error.txt').read_text()
  for row in rows:
    assert len(row['search']) == 2
    best = max(row['search'], key=row['search'].get)
    assert row['search'][f'{row["lr"]:.3g}'] == row['search'][best]

  # What has finished is not run again; a new arm alone is.
  ran = []
  real = compare.train
  monkeypatch.setattr(
      compare, 'train',
      lambda config, path, **k: ran.append(path) or real(config, path, **k))
  more = ('lora', {'method': (dict(name='lowrank.lora', rank=1), HEAD)})
  grid = _grid(tiny_weights, (*ARMS, more))
  again, failures = compare.run(grid, str(tmp_path), say=lambda *_: None)
  assert not failures and len(again) == 3
  assert not [p for p in ran if 'lr' in os.path.basename(p)]
  seen = {os.path.basename(p).split('-')[1] for p in ran}
  assert 'lora' in seen

  paths = report.write(again, str(tmp_path / 'out'))
  assert json.loads(open(paths[0]).read())[0]['arm'] == 'head'
  lines = open(paths[1]).read().splitlines()
  assert len(lines) == 4 and lines[0].startswith('arm,task,seed')
  with open(paths[3], 'rb') as f:
    assert f.read(8) == b'\x89PNG\r\n\x1a\n'


def test_diverged_rate_is_recorded_and_the_base_is_read_once(
    tiny_weights, tmp_path, monkeypatch):
  read, real = [], bases.load
  monkeypatch.setattr(
      bases, 'load', lambda *a, **k: read.append(a) or real(*a, **k))
  grid = _grid(tiny_weights, ARMS[:1],
               dict(rates=(1.0, 1e41), fraction=0.5, seed=0))
  rows, failures = compare.run(grid, str(tmp_path), say=lambda *_: None)
  assert not failures and len(read) == 1
  assert [v is None for v in rows[0]['search'].values()] == [False, True]
  assert rows[0]['metric'] == 'accuracy'
  assert rows[0]['score'] == rows[0]['metrics']['accuracy']
  left = os.listdir(tmp_path / 'cells')
  assert not [c for c in left
              if 'checkpoints' in os.listdir(tmp_path / 'cells' / c)
              and 'summary.json' in os.listdir(tmp_path / 'cells' / c)]


def test_recorded_cells_are_not_run_again(tiny_weights, tmp_path, monkeypatch):
  grid = _grid(tiny_weights, ARMS[:1],
               dict(rates=(1.0, 3.0), fraction=0.5, seed=0))
  file = tmp_path / 'cells.json'
  run = lambda place, grid: compare.run(
      grid, str(tmp_path / place), say=lambda *_: None,
      record=compare.Record(str(file)))
  rows, failures = run('a', grid)
  assert not failures and len(file.read_text().splitlines()) == 2 + 2 + len(rows)

  def no_training(*args, **kwargs):
    raise RuntimeError('trained')
  monkeypatch.setattr(compare, 'train', no_training)
  again, failures = run('b', grid)  # another machine, with the file alone
  assert not failures and again == rows
  grid.base.optim.clip = 0.5  # another grid: its cells are not those of the record
  assert run('c', grid)[1] and not run('c', grid)[0]
  file.write_text('[1]')
  with pytest.raises(ValueError, match='no record of cells'):
    compare.Record(str(file))


def test_scores_of_several_tasks_are_told_apart():
  rows = [dict(arm='a', task=t, seed=0, lr=1e-3, metric=m, score=v, trained=10,
               stored=10, step_seconds=0.1, peak_bytes=2**20)
          for t, m, v in (('x', 'accuracy', 0.5), ('y', 'perplexity', 12.0))]
  lines = report.table(rows)
  assert [(v['metric'], v['score']) for v in lines] == [
      ('accuracy %', '50.00'), ('perplexity', '12.00')]
  assert report.table(rows[:1])[0]['accuracy %'] == '50.00'


def test_unknown_key_of_an_arm_is_refused(tiny_weights, tmp_path):
  grid = _grid(tiny_weights, (('x', {'optim.rate': 1.0}),))
  with pytest.raises(ValueError, match='optim.rate'):
    compare.run(grid, str(tmp_path))


def _rows(**arms):
  return [dict(arm=a, task='t', seed=s, metric='accuracy', score=v,
               trained=len(a))
          for a, values in arms.items() for s, v in enumerate(values)]


def test_interval_is_the_t_interval():
  mean, width = report.interval([1.0, 2.0, 4.0])
  # 4.302653 is the 97.5 % point of t with 2 degrees of freedom.
  assert mean == pytest.approx(7 / 3)
  assert width == pytest.approx(
      4.302653 * np.std([1, 2, 4], ddof=1) / np.sqrt(3), rel=1e-6)
  assert np.isnan(report.interval([1.0])[1])


def test_pairs_are_matched_by_seed_and_tasks_averaged_first():
  rows = _rows(a=[0.5, 0.7, 0.9], b=[0.4, 0.6, 0.8])
  mean, low, high, n = report.paired(rows, 'a', 'b')
  assert (mean, n) == (pytest.approx(0.1), 3)
  assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
  with pytest.raises(ValueError, match="no rows of arm 'c'"):
    report.paired(rows, 'a', 'c')
  with pytest.raises(ValueError, match='seed 2'):
    report.paired(rows[:-1], 'a', 'b')


@pytest.mark.parametrize('other, rule, margin, verdict', [
    ([0.50, 0.51, 0.52], 'SUP', 0, 'shown'),
    ([0.70, 0.71, 0.72], 'SUP', 0, 'contradicted'),
    ([0.50, 0.60, 0.70], 'SUP', 0, 'not shown'),
    ([0.605, 0.615, 0.625], 'NI', 1.0, 'shown'),
    ([0.62, 0.63, 0.64], 'NI', 1.0, 'contradicted')])
def test_decision_rules(other, rule, margin, verdict):
  rows = _rows(a=[0.60, 0.61, 0.62], b=other)
  part = rules.Part(rule, 'a', 'b', margin)
  assert rules.decide_part(part, rows)[0] == verdict


def test_claim_needs_every_part():
  rows = _rows(a=[0.60, 0.61, 0.62], bb=[0.50, 0.51, 0.52],
               ccc=[0.5, 0.6, 0.7])
  better = rules.Part('SUP', 'a', 'bb')
  fewer, more = rules.Part('FEWER', 'a', 'bb'), rules.Part('FEWER', 'bb', 'a')
  open_ = rules.Part('SUP', 'a', 'ccc')
  verdict = lambda *parts: rules.decide(rules.Claim('', '', parts), rows)[0]
  assert verdict(better, fewer) == 'shown'
  assert verdict(better, open_) == 'not shown'
  assert verdict(better, more, open_) == 'contradicted'
  twice = rules.Part('FEWER', 'a', 'bb', 2)
  assert verdict(twice) == 'contradicted'  # 1 number against 2: not above it


def test_of_losses_the_smaller_is_better():
  rows = [dict(r, loss=r['score']) for r in _rows(
      a=[0.60, 0.61, 0.62], b=[0.50, 0.51, 0.52])]
  verdict = lambda *part: rules.decide_part(rules.Part(*part), rows)[0]
  assert verdict('SUP', 'b', 'a', 0, 'loss') == 'shown'
  assert verdict('SUP', 'a', 'b', 0, 'loss') == 'contradicted'
  assert verdict('NI', 'a', 'b', 0.2, 'loss') == 'shown'
  assert verdict('NI', 'a', 'b', 0.05, 'loss') == 'contradicted'


def test_tasks_that_two_arms_do_not_share_are_left_out_and_said():
  values = [0.60, 0.61, 0.62]
  rows = _rows(a=values, b=[0.5, 0.5, 0.5])
  rows += [dict(r, task='u') for r in _rows(a=values, c=[0.1, 0.1, 0.1])]
  verdict, text = rules.decide_part(rules.Part('SUP', 'a', 'b'), rows)
  assert verdict == 'shown' and text.endswith(', on t alone')
  assert 'alone' not in rules.decide_part(
      rules.Part('SUP', 'a', 'b', tasks=('t',)), rows)[1]
  with pytest.raises(ValueError):
    rules.decide_part(rules.Part('SUP', 'b', 'c'), rows)


def test_speed_up_is_told_from_the_curves():
  slow = {'10': 1.0, '20': 0.8, '30': 0.6}
  assert rules.steps_to(slow, 0.7) == pytest.approx(25)
  assert rules.steps_to(slow, 2.0) == 10
  rows = [dict(arm=a, task='t', seed=s, curve=c) for s in (0, 1) for a, c in (
      ('slow', slow), ('fast', {'10': 0.7, '20': 0.5, '30': 0.5}),
      ('never', {'10': 1.0, '20': 1.0, '30': 1.0}))]
  # The loss of 0.6 in 30 steps, against 15.
  assert rules.speed_up(rows, 'fast', 'slow') == pytest.approx([2.0, 2.0])
  decide = lambda arm: rules.decide_part(
      rules.Part('FASTER', arm, 'slow', 1.2), rows)[0]
  assert decide('fast') == 'shown' and decide('never') == 'contradicted'
  assert decide('slow') == 'not shown'


def test_curves_of_another_split_are_kept(tiny_weights, tmp_path):
  grid = _grid(tiny_weights, ARMS[:1])
  grid.base.eval_every, grid.base.watch_split = 2, 'validation'
  file = str(tmp_path / 'cells.json')
  run = lambda place, **k: compare.run(
      grid, str(tmp_path / place), say=lambda *_: None,
      record=compare.Record(file, **k))
  (row,), _ = run('a')
  assert set(row['curve']) == {'2', '4'} and row['curve']['2'] > 0
  assert run('b', only=True)[0] == [row]
  grid.seeds = (1,)
  assert run('c', only=True)[1] == ['kmnist-head-s1']  # and nothing is trained
