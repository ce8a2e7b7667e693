"""Arrays and losses of tasks by hand, and inputs that no run can use."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from peftjax import case as case_lib
from peftjax import train as train_lib
from peftjax.fold import fold_adapter
from peftjax.tasks import base as base_lib
from peftjax.tasks import lm
from peftjax.tasks import retrieval
from peftjax.tasks import seq2seq

ROWS = [dict(text='good film', label=1), dict(text='bad book one', label=0)]
PAIRS = [dict(text='red cat', text_b='blue cat', label=4.0),
         dict(text='one', text_b='two three', label=0.5)]
ANSWER = [dict(source='red', target='cat dog'), dict(source='a', target='b')]


def log_softmax(x):
  x = np.asarray(x, np.float64)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ---------------------------------------------------------------------- losses
def test_answers_alone_are_trained_on(make_config, folders, write):
  config = make_config(folders['llama'], 'seq2seq', write(ANSWER))
  case = case_lib.load(config, ('test',))
  batch = case.arrays['test']
  weights = batch['weights'].astype(bool)
  answers = [list(ids[w]) for ids, w in zip(batch['ids'], weights)]
  tokenizer = case_lib.text.load_tokenizer(folders['llama'])
  one = lambda text: (
      tokenizer.encode([text], special=False)[0] + [tokenizer.eos])
  assert answers == [one('cat dog'), one('b')]
  logits = jax.random.normal(
      jax.random.key(0), (*batch['ids'].shape, case.base.model.vocab))
  loss, weight = case.task.loss(logits, batch)
  log_p = log_softmax(logits)
  for n in range(2):
    places = np.flatnonzero(weights[n])
    expected = -sum(log_p[n, t - 1, batch['ids'][n, t]] for t in places)
    assert loss[n] == pytest.approx(expected, rel=1e-5)
    assert weight[n] == len(places)
  smooth, _ = case.task.loss(logits, batch, 0.2)
  places = np.flatnonzero(weights[0])
  even = -sum(log_p[0, t - 1].mean() for t in places)
  assert smooth[0] == pytest.approx(
      0.8 * float(loss[0]) + 0.2 * even, rel=1e-5)
  kept = case.task.measure(logits, batch)
  assert case.task.metrics(jax.tree.map(np.asarray, kept))['perplexity'] == (
      pytest.approx(float(jnp.exp(loss.sum() / weight.sum())), rel=1e-5))


def test_packed_rows_cost_what_their_texts_cost(make_config, folders, write):
  rows = [dict(text=t) for t in ('one two three', 'red cat', 'a b c d', 'dog')]
  config = make_config(folders['llama'], 'lm', write(rows), task__packed=True,
                       task__length=16)
  case = case_lib.load(config, ('train', 'test'))
  sums = []
  for packed in (False, True):
    # What is trained on is packed, what is held out is not.
    batch = case.arrays['train' if packed else 'test']
    assert ('segments' in batch) == packed
    args, kwargs = case.task.inputs(batch)
    out = jax.jit(case.base.model.apply)(
        {'params': case.base.params}, *args, **kwargs)
    loss, weight = case.task.loss(out, batch)
    sums.append((len(loss), float(loss.sum()), float(weight.sum())))
  assert sums[0][0] == 4 and sums[1][0] < 4
  assert sums[0][1:] == pytest.approx(sums[1][1:], rel=1e-5)


def test_contrastive_loss_by_hand():
  a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (
      np.random.default_rng(0).normal(size=(2, 3, 4))))
  scores = a @ b.T / 0.5
  rows, columns = log_softmax(scores), log_softmax(scores.T)
  expected = -(np.diagonal(rows) + np.diagonal(columns)) / 2
  np.testing.assert_allclose(
      retrieval.contrastive(a, b, 0.5), expected, rtol=1e-5)
  # A row that only fills a batch up is nobody's negative, whatever it holds.
  fill = np.ones((1, 4)) / 2
  found = retrieval.contrastive(
      np.concatenate([a, fill]), np.concatenate([b, fill]), 0.5,
      np.array([True] * 3 + [False]))
  np.testing.assert_allclose(found[:3], expected, rtol=1e-5)
  # Both texts of a pair come back in the order they went in.
  (ids,), kwargs = retrieval.inputs(dict(
      ids=jnp.zeros((2, 1)), ids_b=jnp.ones((2, 1)),
      mask=jnp.ones((2, 1)), mask_b=jnp.ones((2, 1))))
  u, v = retrieval.vectors(jnp.concatenate([ids, 1 - ids], axis=1))
  assert kwargs['mask'].shape == (4, 1)
  np.testing.assert_allclose(u, [[0, 1]] * 2, atol=1e-5)
  np.testing.assert_allclose(v, [[1, 0]] * 2, atol=1e-5)


def test_tokens_without_weight_cost_nothing():
  logits = jnp.zeros((1, 2, 3)).at[0, 1].set(jnp.nan)
  loss, weight = base_lib.token_loss(
      logits, np.array([[1, -1]]), np.array([[1., 0.]]))
  assert (loss[0], weight[0]) == (pytest.approx(np.log(3)), 1)
  assert lm.metrics(dict(loss=np.float32([2, 4]), weight=np.float32([1, 2]),
                         right=np.float32([1, 0]))) == dict(
                             perplexity=pytest.approx(np.exp(2)),
                             token_accuracy=pytest.approx(1 / 3))


# ---------------------------------------------------------------------- arrays
def test_columns_of_padding_are_cut(make_config, folders, write):
  config = make_config(folders['bert'], 'classify', write(ROWS))
  batch = case_lib.load(config, ('test',)).arrays['test']
  assert batch['ids'].shape == (2, 8)  # 5 tokens, a multiple of 8
  assert batch['mask'].sum(1).tolist() == [4, 5]
  assert batch['label'].tolist() == [1, 0] and 'types' not in batch
  config = make_config(
      folders['bert'], 'regress', write(PAIRS, 'pairs'))
  batch = case_lib.load(config, ('test',)).arrays['test']
  assert batch['types'][0].tolist() == [0] * 4 + [1] * 3 + [0]
  assert batch['label'].dtype == np.float32


def test_first_examples_of_each_split(make_config, folders, write):
  config = make_config(folders['bert'], 'classify', write(ROWS * 5),
                       data__train=6, data__validation=4, data__test=2)
  case = case_lib.load(config, ('train', 'validation', 'test'))
  assert [len(a['label']) for a in case.arrays.values()] == [6, 4, 2]
  config.data.splits.test = 'train[2:5]'
  assert len(case_lib.load(config, ('test',)).arrays['test']['label']) == 2


@pytest.mark.parametrize('short, target, kind', [
    (['7', '1,200'], 'x', 'number'), (['true', 'no'], 'it is {}', 'last'),
    (['a b', 'c'], 'is it {} ?', 'text'), (None, '{}', 'text')])
def test_kind_of_answer(short, target, kind):
  examples = [dict(target=target.format(s)) for s in short or ['a']]
  assert seq2seq.answer_kind('', short, examples) == kind
  assert seq2seq.answer_kind('line', short, examples) == 'line'


# ------------------------------------------------------------------- bad input
def wide(folders, tmp_path):
  """A tokenizer with more words than the model has."""
  with open(os.path.join(folders['bert'], 'tokenizer.json')) as f:
    data = json.load(f)
  data['model']['vocab']['extra'] = len(data['model']['vocab'])
  (tmp_path / 'wide.json').write_text(json.dumps(data))
  return str(tmp_path / 'wide.json')


@pytest.mark.parametrize('weights, task, rows, more, words', [
    ('bert', 'clasify', ROWS, {}, "task.name='clasify'.*'classify'"),
    ('bert', 'tag', ROWS, {}, "'tag' needs data of the kind tagging.*is "
     "classification, which fits 'classify'"),
    ('bert', 'classify', ROWS, dict(task__metric='acuracy'),
     "task.metric='acuracy'.*'accuracy'"),
    ('bert', 'classify', ROWS, dict(task__head='men'), "'men'.*'mean'"),
    ('bert', 'classify', ROWS, dict(task__length=17),
     'length 17 is longer than the 16 positions'),
    ('bert', 'classify', ROWS, dict(data__options=dict(labels=('bad',))),
     'label.*outside the label set'),
    ('bert', 'classify', ROWS, dict(data__train=3), '3 examples of .*are 2'),
    ('bert', 'classify', ROWS, dict(model__name='decoder'),
     "model.name='decoder'.*'encoder'"),
    ('bert', 'regress', PAIRS, dict(loss__label_smoothing=0.1),
     "label_smoothing=0.1: task 'regress' has no classes"),
    ('bert', 'retrieve', PAIRS, dict(task__scale=3.0),
     'similarities from 0.5 to 4; expected 0 to task.scale=3'),
    ('bert', 'lm', [dict(text='a b')], {}, "'lm'"),
    ('vit_s', 'classify', ROWS, {}, "'classify' needs a text model.*ViT"),
    ('llama', 'image', None, {}, "'image' needs an image model.*Decoder"),
    ('llama', 'seq2seq', ANSWER, dict(task__answer='numbr'), "'numbr'"),
    ('llama', 'seq2seq', ANSWER, dict(task__metric='blue'), "'blue'.*'bleu'"),
])
def test_what_does_not_fit_is_refused(
    make_config, folders, write, weights, task, rows, more, words):
  data = write(rows) if rows else 'kmnist'
  config = make_config(folders.get(weights, weights), task, data, **more)
  with pytest.raises(ValueError, match=words):
    case_lib.load(config, ('train', 'test'))


def test_tokenizer_that_does_not_fit_is_refused(
    make_config, folders, write, tmp_path):
  config = make_config(folders['bert'], 'classify', write(ROWS),
                       task__tokenizer=wide(folders, tmp_path))
  with pytest.raises(ValueError, match='embedding table'):
    case_lib.load(config, ('test',))


def test_buckets_need_one_length(make_config, folders, write):
  config = make_config(folders['bert'], 'retrieve', write(PAIRS * 4),
                       task__buckets=2)
  case = case_lib.load(config, ('train',))
  with pytest.raises(ValueError, match='task.buckets=2.*mask_b'):
    case_lib.batches(config, case.arrays['train'])


# ----------------------------------------------------------------- resume, fold
def test_buckets_resume_and_a_folder_folds_into_a_folder(
    make_config, folders, write, tmp_path, monkeypatch):
  data = write([dict(text=t, label=i % 2) for i, t in enumerate(
      ['good', 'bad film'] + ['a b c d one two three four red'] * 6)] * 2)
  config = make_config(
      folders['bert'], 'classify', data, task__buckets=2, steps=6, batch=4,
      log_every=1, eval_before=False)
  config.method = (dict(name='lowrank.lora', rank=2, sites=dict(roles='qv')),
                   dict(name='selective.full', sites=dict(roles='head')))
  whole = train_lib.train(config, str(tmp_path / 'whole'), False)
  assert whole['before'] is None
  real = case_lib.batches

  def stopping(*args):
    batches, lengths = real(*args)
    assert lengths == (6, 12)

    class Batches:
      get_state, set_state = batches.get_state, batches.set_state
      seen = 0

      def __next__(self):
        self.seen += 1
        if self.seen == 3:
          os.kill(os.getpid(), signal.SIGTERM)
        return next(batches)

    return Batches(), lengths

  with monkeypatch.context() as patch:
    patch.setattr(case_lib, 'batches', stopping)
    assert train_lib.train(config, str(tmp_path / 'run'), False) == dict(
        stopped_at=3)
  again = train_lib.train(config, str(tmp_path / 'run'), False)
  assert again['after'] == whole['after']
  one, two = (peftjax.load_adapter(str(tmp_path / n / 'adapter')).theta
              for n in ('whole', 'run'))
  jax.tree.map(np.testing.assert_array_equal, one, two)

  adapter, out = str(tmp_path / 'run' / 'adapter'), str(tmp_path / 'folded')
  with pytest.raises(ValueError, match='the base is a folder'):
    fold_adapter(adapter, out + '.safetensors')
  report = fold_adapter(adapter, out)
  assert report['max_abs'] < 1e-5 < report['largest']
  config.model.weights = out
  case = case_lib.load(config, ('test',))
  args, kwargs = case.task.inputs(case.arrays['test'])
  logits = jax.jit(case.base.model.apply)(
      {'params': case.base.params}, *args, **kwargs)
  found = case.task.metrics(jax.tree.map(
      np.asarray, case.task.measure(logits, case.arrays['test'])))
  assert found['accuracy'] == whole['after']['accuracy']
