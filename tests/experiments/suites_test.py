"""Every config of every suite: what it says, and that it runs locally."""

import importlib
import pathlib

import ml_collections
import pytest

from experiments import suites
from experiments.vtab import averages
from peftjax import config as config_lib
from peftjax.data import vtab
from peftjax.train import train

ROOT = pathlib.Path(suites.__file__).parent
SHARED = ('__init__', 'suite', 'averages')
CONFIGS = [f'{s}.{p.stem}' for s in ('glue', 'vtab', 'ner', 'e2e')
           for p in sorted((ROOT / s).glob('*.py')) if p.stem not in SHARED]
# What a suite's methods have in common is run with one of them alone.
TASKS = ['glue.linear_probe:task=cola', 'glue.linear_probe:task=stsb']


def get(name, arg=''):
  return importlib.import_module(f'experiments.{name}').get_config(arg)


def run(name, tmp_path):
  name, _, arg = name.partition(':')
  config = get(name, ','.join(filter(None, (arg, 'runlocal'))))
  config.model.scan = True  # faster to compile
  return train(config, str(tmp_path / 'run'), progress=False)


@pytest.mark.parametrize('name', CONFIGS + TASKS)
def test_runs_locally(name, tmp_path):
  summary = run(name, tmp_path)
  assert summary['steps'] == 2 and summary['trained'] > 0
  main = summary['main']
  assert main in summary['after'] and summary['after']['n'] > 0


def test_there_are_configs_for_every_suite():
  methods = {'full', 'lora', 'oft', 'boft', 'bitfit', 'ssf', 'diff_pruning'}
  for suite in ('glue', 'vtab', 'ner', 'e2e'):
    found = {n.split('.')[1] for n in CONFIGS if n.startswith(suite)}
    assert found >= methods, suite


@pytest.mark.parametrize('name', CONFIGS)
def test_configs_are_whole(name):
  config = get(name)
  assert isinstance(config, ml_collections.ConfigDict)
  config_lib.check(config)
  text = importlib.import_module(f'experiments.{name}').__doc__
  suite, file = name.split('.')
  assert f'--config=experiments/{suite}/{file}.py' in text
  assert 'TPU' in text and ':runlocal' in text


def test_arguments(monkeypatch):
  config = get('glue.lora', 'task=stsb,backbone=roberta_large,seed=3,lr=1e-3')
  assert config.model.weights == 'FacebookAI/roberta-large'
  assert config.task.name == 'regress' and config.data.name == 'tfds:glue/stsb'
  assert config.seed == 3 and config.optim.lr == 1e-3
  assert config.data.train == 0  # all of them
  assert config.steps == 40 * 5749 // 16
  assert get('glue.lora', 'backbone=org/other').model.weights == 'org/other'
  search = get('vtab.lora', 'task=dtd,stage=search')
  assert search.data.splits.train == 'train800'
  assert search.eval_split == 'validation'
  final = get('vtab.lora', 'task=dtd')
  assert final.data.splits.train == 'train800val200'
  assert final.eval_split == 'test'


def test_a_local_folder_is_taken_where_there_is_one(tmp_path, monkeypatch):
  folder = tmp_path / 'checkpoints' / 'roberta-base'
  folder.mkdir(parents=True)
  monkeypatch.setenv('PEFTJAX_DATA', str(tmp_path))
  assert suites.backbone('roberta_base') == 'FacebookAI/roberta-base'
  (folder / 'config.json').write_text('{}')
  assert suites.backbone('roberta_base') == str(folder)


@pytest.mark.parametrize('name, arg, match', [
    ('glue.lora', 'task=colaa', "task='colaa'.*cola"),
    ('glue.lora', 'backbone=roberta_bas', "'roberta_bas'.*roberta_base"),
    ('glue.lora', 'stepps=3', 'stepps=3.*steps'),
    ('ner.oft', 'task=conll', "task='conll'.*conll2003"),
    ('vtab.oft', 'task=svhnn', "task='svhnn'.*svhn")])
def test_bad_arguments(name, arg, match):
  with pytest.raises(ValueError, match=match):
    get(name, arg)


def test_both_averages():
  def score(task):
    return {'natural': .9, 'specialized': .6, 'structured': .3}[
        next(g for g, names in vtab.GROUPS.items() if task in names)]

  rows = [dict(arm='a', task=t, seed=s, score=score(t) + d)
          for t in vtab.VTAB for s, d in ((0, -.1), (1, .1))]
  (line,) = averages.averages(rows)
  sizes = {g: len(names) for g, names in vtab.GROUPS.items()}
  assert sum(sizes.values()) == line['tasks'] == 19
  assert line['mean_of_groups'] == pytest.approx((.9 + .6 + .3) / 3)
  assert line['mean_of_tasks'] == pytest.approx(
      (7 * .9 + 4 * .6 + 8 * .3) / 19)
  few = averages.averages([r for r in rows if r['task'] == 'svhn'])
  assert few[0]['mean_of_groups'] is None and few[0]['tasks'] == 1
  with pytest.raises(ValueError, match='no_such'):
    averages.averages([dict(rows[0], task='no_such')])
