"""Training from streams: the same batches, bounded memory, exact resuming."""

import os
import signal
import time

import jax
import numpy as np
import pytest

import peftjax
from peftjax import case as case_lib
from peftjax import config as config_lib
from peftjax import evaluate
from peftjax import train as train_lib
from peftjax.data import images, pipeline, stream
from peftjax.data.chat import encode_messages
from peftjax.data.text import load_tokenizer
from peftjax.fold import fold_adapter

WORDS = 'good bad film book red blue cat dog one two three four'.split()
CLASSIFY = [dict(text=' '.join(WORDS[:1 + n % 9]), label=n % 2)
            for n in range(22)]
PAIRS = [dict(r, text_b='red cat', label=n / 2) for n, r in enumerate(CLASSIFY)]
TAG = [dict(tokens=WORDS[:2 + n % 5], tags=['O', 'B-X', 'I-X', 'O', 'O', 'O'][
    :2 + n % 5]) for n in range(22)]
ANSWER = [dict(source=' '.join(WORDS[:1 + n % 4]), target=WORDS[n % 12],
               answer=WORDS[n % 12]) for n in range(22)]
LM = [dict(text=r['text']) for r in CLASSIFY]
CHATS = [dict(messages=[dict(role='user', content=' '.join(WORDS[:n % 11])),
                        dict(role='assistant', content='cat dog')])
         for n in range(22)]

CASES = {
    'classify': ('bert', 'classify', CLASSIFY),
    'regress': ('bert', 'regress', PAIRS),
    'tag': ('bert', 'tag', TAG),
    'lm': ('llama', 'lm', LM),
    'answers': ('llama', 'seq2seq', ANSWER),
    't5': ('t5', 'seq2seq', ANSWER),
    'image': ('vit', 'image', None),
    'weight_file': ('tiny', 'image', None),
}


@pytest.fixture
def config_of(make_config, folders, vit_folder, tiny_weights, write):
  """config_of(case, **settings); the data of a case are written once."""
  weights, written = dict(folders, vit=vit_folder, tiny=tiny_weights), {}

  def one(case, **more):
    name, task, rows = CASES[case]
    if rows and case not in written:
      written[case] = write(rows, case)
    given = dict(steps=6, data__stream=True, log_every=1)
    if not rows:
      given |= dict(data__train=22, data__test=13, model__scan=False)
    return make_config(weights[name], task, written.get(case, 'digits'),
                       **(given | more))

  return one


def equal(a, b, **tolerance):
  assert set(a) == set(b)
  for name, value in a.items():
    np.testing.assert_allclose(value, b[name], err_msg=name, **tolerance)


def cut(batch, like):
  """A batch of full length in the columns of `like`; the rest is padding."""
  out = {}
  for name, value in batch.items():
    width = like[name].shape[1:2]
    out[name] = value[:, :width[0]] if width else value
    rest = value[:, width[0]:] if width else value[:0]
    assert not rest.any() or name == 'labels' and (rest == -1).all(), name
  return out


# --------------------------------------------------------------------- batches
@pytest.mark.parametrize('case', CASES)
def test_batches_are_those_of_arrays_in_memory(case, config_of):
  streamed = case_lib.load(config_of(case), ('train', 'test'))
  # A text a row, as lm packs them, of which the held-out ones stay apart.
  memory = case_lib.load(config_of(
      case, data__stream=False, task__packed=case == 'lm'), ('train', 'test'))
  assert isinstance(streamed.arrays['train'], stream.Split)
  close = dict(rtol=0, atol=1e-6 if case == 'weight_file' else 0)
  if case != 'lm':
    one, many = (case_lib.batches(config_of(case), c.arrays['train'])[0]
                 for c in (memory, streamed))
    for _ in range(5):  # more than one epoch
      want = next(one)
      equal(cut(next(many), want), want, **close)
  got = list(stream.eval_batches(streamed.arrays['test'], 8))
  want = list(pipeline.eval_batches(memory.arrays['test'], 8))
  assert len(got) == len(want) == (2 if case in ('image', 'weight_file') else 3)
  for a, b in zip(got, want):
    np.testing.assert_array_equal(a['valid'], b['valid'])
    n = b['valid'].sum()
    equal(cut({k: v[:n] for k, v in a.items()}, b),
          {k: v[:n] for k, v in b.items()}, **close)
  assert {v.shape for v in got[0].values()} == {
      v.shape for v in got[-1].values()}
  sample = streamed.sample('train')
  assert {k: v.dtype for k, v in sample.items()} == {
      k: v.dtype for k, v in memory.sample('train').items()
      if k not in ('segments', 'positions')}


def test_shards_together_are_the_whole_with_augmentation(config_of):
  config = config_of('image', data__augment='crop_flip')
  arrays = case_lib.load(config, ('train', 'test')).arrays['train']
  whole, _ = case_lib.batches(config, arrays)
  parts = [case_lib.batches(config, arrays, i, 2)[0] for i in range(2)]
  for _ in range(4):
    a, b = (next(p) for p in parts)
    equal(next(whole), {k: np.concatenate([a[k], b[k]]) for k in a})


@pytest.mark.parametrize('case, augment', [
    ('image', 'crop'), ('image', 'crop_flip'), ('weight_file', 'crop_flip')])
def test_training_images_are_augmented_and_no_others(config_of, case, augment):
  config = config_of(case, data__augment=augment, batch=22)
  loaded = case_lib.load(config, ('train', 'test'))
  train, test = loaded.arrays['train'], loaded.arrays['test']
  assert train.augment and test.augment is None
  batches, _ = case_lib.batches(config, train)
  epochs = [next(batches)['image'] for _ in range(8)]
  assert len({e.tobytes() for e in epochs}) == 8
  side = 12 if case == 'image' else 8
  assert all(e.shape == (22, side, side, 3) for e in epochs)
  if case == 'image':  # every one a crop of the resized image
    how = images.load_preprocessor(config.model.weights)
    # With room for a crop anywhere: 3 x 3 places, mirrored or not.
    for i in range(3):
      whole = images.pixels(
          train.examples[i]['image'], how._replace(crop=None))
      crops = {whole[y:y + 12, x:x + 12][:, ::d].tobytes()
               for y in range(3) for x in range(3) for d in (1, -1)}
      seen = {e[j].tobytes() for e in epochs for j in range(22)} & crops
      assert len(seen) > 2


def test_few_batches_are_read_ahead():
  encoded = []

  def encode(examples):
    encoded.append(len(examples))
    return dict(x=np.array(examples))

  split = stream.Split(np.arange(200), encode)
  batches = stream.eval_batches(split, 8)
  for taken in range(1, 4):
    next(batches)
    time.sleep(0.1)  # whatever would be read is read by now
    assert taken <= len(encoded) <= taken + 3
  assert set(encoded) == {8}


def test_conversations_without_an_answer_left_keep_their_row(
    make_config, folders, write):
  config = make_config(folders['llama'], 'seq2seq', write(CHATS),
                       data__stream=True, task__length=8)
  case = case_lib.load(config, ('train', 'test'))
  assert case.task.generate is None
  got = np.concatenate([b['weights'].sum(1) for b in stream.eval_batches(
      case.arrays['test'], 8)])[:22]
  want, report = encode_messages(
      CHATS, load_tokenizer(folders['llama']), 8, 'plain')
  assert 0 < report.dropped < 22
  assert (got == 0).sum() == report.dropped
  np.testing.assert_array_equal(got[got > 0], want['weights'].sum(1))


# -------------------------------------------------------------------- training
def theta(workdir):
  return peftjax.load_adapter(os.path.join(workdir, 'adapter')).theta


def stopping(monkeypatch, at):
  """SIGTERM when batch `at` (from 0) is asked for."""
  real = case_lib.batches

  def batches(*args):
    inner, lengths = real(*args)

    class Batches:
      get_state, set_state = inner.get_state, inner.set_state
      seen = 0

      def __next__(self):
        if self.seen == at:
          os.kill(os.getpid(), signal.SIGTERM)
        self.seen += 1
        return next(inner)

    return Batches(), lengths

  monkeypatch.setattr(case_lib, 'batches', batches)


@pytest.mark.parametrize('case, more', [
    ('answers', dict(task__max_new_tokens=3)),
    ('image', dict(data__augment='crop_flip'))])
def test_stopped_and_resumed_is_the_same_to_the_bit(
    config_of, tmp_path, monkeypatch, case, more):
  config = config_of(case, steps=7, **more)
  whole = train_lib.train(config, str(tmp_path / 'whole'), False)
  with monkeypatch.context() as patch:
    stopping(patch, 4)
    first = train_lib.train(config, str(tmp_path / 'run'), False)
  assert 0 < first['stopped_at'] < 7
  again = train_lib.train(config, str(tmp_path / 'run'), False)
  assert again['after'] == whole['after']
  jax.tree.map(np.testing.assert_array_equal,
               *(theta(tmp_path / n) for n in ('whole', 'run')))

  if case == 'answers':
    # What a run in memory ends in, and writes, but for the padding.
    config.data.stream = False
    memory = train_lib.train(config, str(tmp_path / 'memory'), False)
    assert set(memory['after']) == set(whole['after'])
    assert whole['after'] == pytest.approx(memory['after'], rel=1e-4)
    assert whole['after']['loss'] < whole['before']['loss'] - 0.1
    for a, b in zip(*(jax.tree.leaves(theta(tmp_path / n))
                      for n in ('whole', 'memory')), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    found = evaluate.evaluate_adapter(
        str(tmp_path / 'whole' / 'adapter'), batch=8)
    assert found['adapted'] == pytest.approx(whole['after'], rel=1e-5)


def test_an_adapter_is_judged_by_the_rows_that_its_run_was(config_of, tmp_path):
  """A text a row, not the chunks that a run in memory makes of all texts."""
  after = train_lib.train(
      config_of('lm', steps=2), str(tmp_path / 'run'), False)['after']
  adapter = str(tmp_path / 'run' / 'adapter')
  assert after['n'] == 22
  assert evaluate.evaluate_adapter(adapter, batch=8)['adapted'] == (
      pytest.approx(after, rel=1e-5))
  report = fold_adapter(adapter, str(tmp_path / 'folded'))
  assert report['max_abs'] < 1e-5 < report['largest']


# ------------------------------------------------------------------- bad input
@pytest.mark.parametrize('case, more, words', [
    ('classify', dict(task__buckets=2), 'task.buckets=2.*expected 0, or'),
    ('lm', dict(task__packed=True), 'task.packed=True.*expected False, or'),
    ('classify', dict(task__name='retrieve'), "stream=True: task 'retrieve'"),
    ('image', dict(data__augment='crop', data__stream=False),
     "augment='crop'.*expected data.stream=True"),
    ('image', dict(data__augment='flip'), "augment='flip'.*'crop_flip'"),
    ('classify', dict(data__augment='crop'), "'classify' has no images"),
    ('image', dict(batch=24), 'batch_size 24 with 22 examples'),
    ('answers', dict(task__answer='numbr'), "'numbr'"),
    ('image', dict(data__stream=1), 'data.stream=1: expected a bool')])
def test_what_a_stream_cannot_do_is_refused_before_training(
    config_of, tmp_path, monkeypatch, case, more, words):
  monkeypatch.setattr(train_lib.step_lib, 'start', None)
  config = config_of(case)
  for key, value in more.items():
    node, key = key.split('__') if '__' in key else (None, key)
    with config.ignore_type():
      (config[node] if node else config)[key] = value
  with pytest.raises(ValueError, match=words):
    train_lib.train(config, str(tmp_path / 'run'), False)


def test_a_checkpoint_of_before_there_were_streams_goes_on():
  now = config_lib.to_json(config_lib.defaults())
  before = dict(now, data={k: v for k, v in now['data'].items()
                           if k not in ('stream', 'augment')})
  assert config_lib.differences(before, now) == []
  now['data'] = dict(now['data'], stream=True)
  assert config_lib.differences(before, now) == [
      'data.stream: False in the checkpoint, True now']
