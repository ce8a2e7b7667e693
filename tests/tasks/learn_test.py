"""Every task through the training loop: it learns, and its adapter is judged
alike."""

import os

import pytest

from peftjax import evaluate
from peftjax import metrics
from peftjax import train as train_lib

CLASSIFY = [dict(text=f'{adj} {noun} {n}', label=['bad', 'good'].index(adj))
            for adj in ('good', 'bad') for noun in ('film', 'book', 'cat')
            for n in ('one', 'two', 'three', 'four')]
REGRESS = [dict(text=' '.join(['good'] * n + ['bad'] * (5 - n)), label=n * 1.0)
           for n in range(6)] * 3
TAG = [dict(tokens=['cat', 'ran', 'from', 'rome', 'to', 'lily'],
            tags=['O', 'O', 'O', 'B-LOC', 'O', 'B-PER'])] * 8 + [
           dict(tokens=['lily', 'red', 'ran'],
                tags=['B-PER', 'I-PER', 'O'])] * 4
LM = [dict(text='one two three four ' * 4)] * 12
ANSWER = [dict(source=f'{c} {n}', target=f'{n} {c}', answer=c)
          for c in ('red', 'blue') for n in ('cat', 'dog')] * 3
RETRIEVE = [dict(text=f'red {w}', text_b=f'blue {w}')
            for w in ('cat', 'dog', 'film', 'book', 'one', 'two', 'a', 'b')] * 2

# checkpoint, task, rows, config, metric, least value
CASES = {
    'classify': ('bert', 'classify', CLASSIFY, dict(
        task__head='mean', task__buckets=2), 'accuracy', 0.95),
    'regress': ('bert', 'regress', REGRESS, dict(steps=50), 'pearson', 0.9),
    'tag': ('bert', 'tag', TAG, {}, 'f1', 0.95),
    'packed': ('llama', 'lm', LM, dict(
        steps=50, batch=4, task__packed=True, task__length=40),
               'token_accuracy', 0.9),
    'answers': ('llama', 'seq2seq', ANSWER, dict(
        steps=50, task__max_new_tokens=4), 'exact_match', 0.95),
    't5': ('t5', 'seq2seq', ANSWER, dict(
        steps=60, task__max_new_tokens=4), 'exact_match', 0.95),
    'retrieve': ('bert', 'retrieve', RETRIEVE, {}, 'recall_at_5', 0.9),
}
# An adapter is evaluated by itself where a task adds something to that.
ALONE = ('classify', 'answers')


def run(case, make_config, folders, write, tmp_path, **more):
  weights, task, rows, given, metric, bar = CASES[case]
  config = make_config(folders[weights], task, write(rows), **(given | more))
  summary = train_lib.train(config, str(tmp_path / 'run'), False)
  return summary, metric, bar


@pytest.mark.parametrize('case', CASES)
def test_task_learns_and_its_adapter_is_judged_alike(
    case, make_config, folders, write, tmp_path):
  summary, metric, bar = run(case, make_config, folders, write, tmp_path)
  after = summary['after']
  assert after[metric] >= bar
  assert after['loss'] < summary['before']['loss'] / 2
  assert summary['main'] in after
  lines = metrics.read(tmp_path / 'run')
  assert lines[-1][f'test/{summary["main"]}'] == after[summary['main']]
  if case in ALONE:
    found = evaluate.evaluate_adapter(
        os.path.join(tmp_path, 'run', 'adapter'), batch=8)
    assert found['adapted'] == pytest.approx(after, rel=1e-5, abs=1e-6)
