"""The low-rank studies: configs that hold, rows into verdicts, figures."""

import json
import os

import jax
import numpy as np
import pytest

from experiments import rules
from experiments.lowrank import arms
from experiments.lowrank import decide
from experiments.lowrank import figures
from experiments.lowrank import forget
from experiments.lowrank import grid
from experiments.lowrank import intruders
from experiments.lowrank import pages
from experiments.lowrank import ranks
from experiments.lowrank import rates
from experiments.lowrank import stories
from experiments.lowrank import times
from experiments.lowrank import updated_base
from peftjax import bases
from peftjax import compare
from peftjax import config as config_lib
from peftjax import method as method_lib
from peftjax.data import sources
from peftjax.data import text

QUIET = lambda *_: None


@pytest.mark.parametrize('module', [
    grid, rates, forget, updated_base, ranks, times])
def test_every_cell_is_a_config(module):
  made = module.get_config()
  assert made.seeds in ((0, 1, 2), (0,)) and made.base.optim.warmup == 0.06
  for _, change in made.arms:
    for task in made.tasks:
      config = compare._cell(made.base, [*task[1].items(), *change.items()])
      config_lib.check(config)
      for method in config.method:
        method_lib.load(**dict(method))


def test_arms_are_searched_alike():
  made = grid.get_config('task=mpqa')
  assert made.search.rates == pytest.approx((10 ** -0.5, 1, 10 ** 0.5))
  names = [name for name, _ in made.arms]
  assert len(names) == len(set(names)) >= 32
  for name, change in made.arms:
    head = change.get('optim.groups.head.lr_abs', arms.HEAD_RATE)
    assert head == (None if name == 'head' else arms.HEAD_RATE)
  claimed = {a for c in decide.GRID for p in c.parts for a in (p.arm, p.other)}
  found = set(arms.of_ranks({'a': 1}))
  assert claimed <= set(names) | found


def test_a_part_of_the_arms():
  made = grid.get_config('task=mpqa,arms=dora+lora,steps=7')
  assert [n for n, _ in made.arms] == ['lora', 'dora'] and made.base.steps == 7
  assert [n for n, _ in grid.get_config().tasks] == ['clinc150', 'mpqa']
  with pytest.raises(ValueError, match="no 'doora'.*dora"):
    grid.get_config('arms=doora')
  with pytest.raises(ValueError, match="no 'mqpa'.*mpqa"):
    grid.get_config('task=mqpa')


def test_ranks_keep_their_sum():
  found = {f'block_{i}/k{j}': (i + j) % 3 for i in range(3) for j in range(4)}
  made = arms.of_ranks(found)
  total = sum(found.values())
  for name in ('auto_lora', 'auto_lora_permuted', 'lora_same'):
    method = made[name][0]
    assert sum(r for _, r in method['rank_pattern']) == total
    assert all(a == 2 * r for (_, r), (_, a) in zip(
        method['rank_pattern'], method['alpha_pattern']))
  assert made['adalora_same'][0]['target'] == max(1, total / 12)
  own = dict(made['auto_lora'][0]['rank_pattern'])
  assert own == {f'^{p}$': r for p, r in found.items() if r}
  assert {r for _, r in made['lora_same'][0]['rank_pattern']} == {1}


# --------------------------------------------------------------- local runs
@pytest.fixture(scope='module')
def local(tmp_path_factory):
  """(workdir, record, rows, grid) of two arms of the grid, run locally."""
  work = tmp_path_factory.mktemp('grid')
  made = grid.get_config('runlocal,arms=head+lora')
  file = str(work / 'cells.json')
  rows, failures = compare.run(made, str(work), QUIET, compare.Record(file))
  assert not failures
  return str(work), file, rows, made


def test_grid_runs_locally_and_is_read_from_its_record(local):
  work, _, rows, made = local
  assert [r['arm'] for r in rows] == ['head', 'lora']
  assert set(rows[0]['curve']) == {'1', '2'}
  again, missing = decide.recorded(made, '', work)
  assert again == rows and not missing
  made = grid.get_config('runlocal,arms=dora')
  assert decide.recorded(made, '', work) == ([], ['single-dora-s0'])


def test_kernels_that_did_not_change_in_rank(local):
  work, *_ = local
  path = stories.adapters(work, 'single', 'lora')[0]
  found = intruders.measure(path, 8)
  assert found['rank'] <= 8 < found['rank_noise']
  assert found['intruders'] == 0 and found['moved'] < 0.1
  with pytest.raises(FileNotFoundError, match='single-boft-s'):
    stories.adapters(work, 'single', 'boft')
  assert [(a, s) for a, s, _ in stories.finished(
      work, 'single', ('boft', 'lora'))] == [('lora', 0)]


def test_rates_run_locally(tmp_path):
  made = rates.get_config('runlocal,arms=lora')
  rows, failures = compare.run(made, str(tmp_path), QUIET)
  assert not failures and [r['arm'] for r in rows] == ['lora@0.001']
  assert 'curve' not in rows[0]


def test_forgetting_locally(tmp_path):
  made = forget.get_config('runlocal,arms=lora,model.scan=True,eval_split=test')
  rows, failures = compare.run(made, str(tmp_path), QUIET)
  assert not failures
  samples = str(tmp_path / 'samples')
  stories.sample(samples, count=4, length=24)
  with open(f'{samples}/train.jsonl', encoding='utf-8') as f:
    one = json.loads(f.readline())
  assert one['source'] and one['target'] and one['ids'][0] == 1
  ids, mask = stories.samples(samples)
  assert ids.shape == mask.shape and len(ids) == 4 and mask[:, 0].all()
  assert ids.shape[1] <= 24
  path = stories.adapters(str(tmp_path), 'e2e', 'lora')[0]
  assert stories.losses(path)['loss'] == pytest.approx(
      rows[0]['loss'], abs=1e-4)
  # Two steps move the base a little, and a KL is not negative.
  assert 0 < stories.kept(path, (ids, mask)) < 0.1
  # Rows that are cut take nothing from the bytes they are counted by.
  ratio = lambda v: v['bits'] / v['loss']
  bare = stories.losses(path, folded=False)
  assert bare['loss'] != stories.losses(path)['loss']
  assert ratio(bare) == pytest.approx(ratio(stories.losses(path)))
  examples = sources.open_split(made.base.data.name, 'test').examples
  tokenizer = text.load_tokenizer(bases.load(stories.WEIGHTS, 'lm').folder)
  targets = [e['target'] for e in examples]
  tokens = sum(len(i) + 1 for i in tokenizer.encode(targets, special=False))
  size = sum(len(t.encode()) for t in targets)
  assert ratio(bare) == pytest.approx(tokens / size / np.log(2))
  # Attached to the base that it has, by name: the same loss.
  assert stories.losses(path, stories.WEIGHTS) == pytest.approx(
      stories.losses(path))


# ------------------------------------------------------------------ decisions
def _rates(**best):
  """Rows in which a method is good at rates from best[0] to best[1]."""
  return [dict(arm=rates.arm(m, rate), task='mpqa', seed=seed,
               score=0.9 if low <= i <= high else 0.7)
          for m, (low, high) in best.items() for seed in range(3)
          for i, rate in enumerate(rates.RATES)]


def test_width_of_rates():
  rows = _rates(lora=(3, 4), dora=(3, 4), delora=(1, 5))
  assert rates.widths(rows, 'delora') == {s: 2.5 for s in range(3)}
  verdict, texts = decide.robust(rows)
  assert verdict == 'shown' and 'lora 1.00' in texts[0]
  assert decide.robust(_rates(lora=(1, 4), dora=(3, 4), delora=(3, 4)))[0] == (
      'contradicted')
  # A rate that diverges has no row.
  assert decide.robust(rows[:24])[0] == 'not measured'
  some = [r for r in rows if r['seed'] or 'delora' in r['arm']]
  assert decide.robust(some) == (
      'not measured', ['the methods do not share all seeds'])


def _intruders(**arms_):
  return [dict(arm=a, task='mpqa', seed=s, score=.9, intruders=v + s / 100,
               subspace=v, intruders_random=2., intruders_noise=0., rank=100.,
               rank_noise=190., share=0.27 + s / 100, moved=0.1)
          for a, v in arms_.items() for s in range(3)]


def test_intruders_are_decided():
  rows = _intruders(full=0.5, lora_r1=3., rslora_r64=1.)
  pairs = (('lora_r1', 'full'), ('lora_r1', 'rslora_r64'))
  assert decide.compared(rows, 'intruders', pairs)[0] == 'shown'
  assert decide.compared(rows, 'intruders', pairs[::-1])[0] == 'shown'
  swapped = tuple((b, a) for a, b in pairs)
  assert decide.compared(rows, 'intruders', swapped)[0] == 'contradicted'
  assert decide.compared(rows, 'intruders', (('lora', 'full'),))[0] == (
      'not measured')
  assert decide.compared([r for r in rows if r['seed'] or r['arm'] == 'full'],
                         'intruders', pairs) == (
      'not measured', ['lora_r1 and full do not share all seeds'])
  verdict, texts = decide.high_rank(rows)
  assert verdict == 'shown' and '1.90 times' in texts[1]
  assert intruders.lines(rows)[1]['intruders of 10'] == '3.01'


def test_controls_have_the_rank_and_the_norm():
  delta = np.asarray(intruders.random(jax.random.key(0), (20, 30), 3, 5.))
  assert np.linalg.matrix_rank(delta) == 3
  assert np.linalg.norm(delta) == pytest.approx(5, rel=1e-5)


def test_of_unlike_sizes_the_worst_ratio_counts():
  sizes = ((10, 100), (40, 100), (30, 60))
  rows = [_row(a, n, seed=s) for s, pair in enumerate(sizes)
          for a, n in zip(('x', 'lora'), pair)]
  for factor, verdict in ((0, 'shown'), (2, 'contradicted'), (1.9, 'shown')):
    got, said = rules.decide_part(
        rules.Part('FEWER', 'x', 'lora', factor, 'adapter'), rows)
    assert got == verdict and said.startswith('x 30 against lora 60')


def test_what_is_not_recorded_is_said(tmp_path):
  lines = decide.all_lines(str(tmp_path))
  assert len(lines) == len(decide.GRID + decide.FORGET + decide.UPDATE) + 3
  assert {line['verdict'] for line in lines} == {'**not measured**'}


# --------------------------------------------------------------- pages, plots
def _row(arm, adapter, task='mpqa', seed=0):
  return dict(arm=arm, task=task, seed=seed, score=.8, metric='accuracy',
              trained=adapter + 10, stored=adapter + 10, adapter=adapter,
              file=adapter, step_seconds=.1, peak_bytes=2**20, lr=1e-3,
              curve={'1': 1., '2': .5})


def test_pages():
  rows = [_row('lora', 1000), _row('lora_xs_r96', 1020), _row('vera', 50)]
  assert {r['arm'] for r in pages.same_size(rows)} == {'lora', 'lora_xs_r96'}
  assert pages.same_size(rows[1:]) == []
  assert '| 1,020 |' in pages.compared(rows)
  # Of ranks that were found, the mean counts, and all seeds stay.
  found = [_row('lora', 1000), *(
      _row('adalora', n, seed=i) for i, n in enumerate((1030, 1050, 1061)))]
  assert len(pages.same_size(found)) == 4
  assert '| 1,047 |' in pages.compared(found)
  assert pages.absent([]) == ''
  assert pages.absent(['mpqa-dora-search', 'mpqa-vera-s1', 'mpqa-vera-s2']) == (
      'Not run: mpqa without `dora`, `vera`.')
  rows = [dict(arm='a', seed=s, bits=1., keep=.1, bits_v1=.9)
          for s in range(2)]
  assert '0.1000 ± 0.0000' in pages.forgotten(rows)
  assert '| 0.9000 ± 0.0000 |' in pages.updated(rows)
  assert '| none | 0.9000 | 1.0000 |' in pages.updated(
      [dict(rows[0], arm='none'), *rows])


def test_figures(tmp_path):
  rows = [_row(a, n, seed=s) for s in range(2)
          for a, n in (('lora', 100), ('full', 1000))]
  figures.curves(rows, str(tmp_path))
  figures.rates(_rates(lora=(3, 4), dora=(3, 4)), str(tmp_path))
  both = [dict(arm=a, seed=s, bits=1., keep=.1, **more)
          for s in range(2) for a, more in (
              ('lora', dict(bits_v1=.9)), ('lora_v2', {}))]
  figures.scatter(both, str(tmp_path))
  figures.versions(both, str(tmp_path))
  figures.bars(_intruders(full=1., lora=2.), str(tmp_path))
  assert sorted(os.listdir(tmp_path)) == [
      f'{n}.png' for n in ('curves', 'forget', 'intruders', 'rates',
                           'updated_base')]
  figures.draw(str(tmp_path), str(tmp_path))  # nothing recorded there
