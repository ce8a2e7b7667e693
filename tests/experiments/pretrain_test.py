"""Pretraining of the small text models, two steps on made-up text."""

import gzip
import json

import jax
import numpy as np
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers

from experiments.pretrain import books
from experiments.pretrain import dec_s
from experiments.pretrain import minilm_mlm
from experiments.pretrain import train_lm
from experiments.pretrain import train_mlm
import peftjax
from peftjax import trees
from peftjax.interop import families
from peftjax.interop import huggingface
from peftjax.models.encoder import Encoder

WORDS = ('the', 'old', 'house', 'stood', 'near', 'a', 'river', 'and', 'slept')


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with gzip.open(path, 'wt', encoding='utf-8') as f:
    f.writelines(json.dumps(r) + '\n' for r in rows)


def data(folder):
  rng = np.random.RandomState(0)
  often = np.array([8, *[1] * (len(WORDS) - 1)]) / (len(WORDS) + 7)
  text = lambda n: ' '.join(rng.choice(WORDS, n, p=often)) + '.'
  for name in ('books', 'wikitext2_small'):
    for split in ('train', 'validation', 'test'):
      write(folder / 'lm' / name / f'{split}.jsonl.gz',
            [dict(text=text(300), doc='a') for _ in range(3)])
  write(folder / 'nlg' / 'e2e' / 'train.jsonl.gz',
        [dict(source=text(5), target=text(5))])
  return str(folder)


def config(get, arg, folder):
  c = get(arg)
  c.data_dir = folder
  return c


def test_decoder_and_the_version_that_goes_on_from_it(tmp_path):
  folder = data(tmp_path / 'data')
  first, second = str(tmp_path / 'v1'), str(tmp_path / 'v2')
  loss = train_lm.train(
      config(dec_s.get_config, 'v1-runlocal', folder), first)
  model, before, said = huggingface.load(first)
  assert np.isfinite(loss) and model.head == 'lm' and model.width == 16
  assert said['model_type'] == 'llama' and said['eos_token_id'] == books.EOS
  train_lm.train(config(dec_s.get_config, 'v2-runlocal', folder), second,
                 init=first)
  after = huggingface.load(second).params
  moved = trees.difference(before, after)[0]
  assert 0 < moved < 0.1  # it went on from there, and moved
  with open(f'{first}/tokenizer.json', 'rb') as f, open(
      f'{second}/tokenizer.json', 'rb') as g:
    assert f.read() == g.read()


def test_killed_and_done_again(tmp_path, monkeypatch):
  folder = data(tmp_path / 'data')
  c = config(dec_s.get_config, 'v1-runlocal', folder)
  c.steps, c.save_every = 4, 2
  train_lm.train(c, str(tmp_path / 'whole'))
  save, calls = huggingface.save, []
  monkeypatch.setattr(huggingface, 'save', lambda *a, **k: calls.append(a))
  # Its last saved state is of step 2: what comes after is lost.
  c.save_every = 3
  train_lm.train(c, str(tmp_path / 'cut'))
  monkeypatch.setattr(huggingface, 'save', save)
  c.save_every = 2
  train_lm.train(c, str(tmp_path / 'cut'))
  a, b = (huggingface.load(str(tmp_path / n)).params for n in ('whole', 'cut'))
  assert calls and trees.difference(a, b)[0] == 0


def test_parts_are_disjoint_and_whole(tmp_path):
  folder = data(tmp_path / 'data')
  parts = {p: books.chapters(folder, p) for p in ('first', 'rest', 'all')}
  assert len(parts['first']) == 2 and len(parts['rest']) == 1 + 3
  assert sorted(parts['first'] + parts['rest'][:1]) == sorted(parts['all'])


def test_windows_predict_every_piece_once():
  rows = books.windows(np.arange(23), 5)
  assert rows.tolist()[1] == [5, 6, 7, 8, 9, 10]
  assert rows[:, 1:].ravel().tolist() == list(range(1, 21))


def test_masked_language_model(tmp_path):
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS, '.']
  core = tokenizers.Tokenizer(models.WordPiece(
      {w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
  core.pre_tokenizer = pre_tokenizers.Whitespace()
  model = Encoder(vocab=len(words), width=16, depth=2, heads=2, mlp_dim=24,
                  positions=32)
  params = jax.jit(model.init)(
      jax.random.key(0), np.zeros((1, 4), np.int32))['params']
  base = tmp_path / 'base'
  huggingface.save(base, model, params, model_type='bert')
  core.save(str(base / 'tokenizer.json'))
  c = config(minilm_mlm.get_config, 'runlocal', data(tmp_path / 'data'))
  c.steps, c.lr, c.warmup = 60, 3e-2, 2
  c.batch, c.log_every = 8, 60
  top1 = train_mlm.train(c, str(base), str(tmp_path / 'adapter'))
  assert top1 > 0.4  # half of all words are 'the', chance is one in 15
  headed, params, said = huggingface.load(base, head='mlm')
  sites = peftjax.describe(headed, *families.example(headed, said))
  adapter = peftjax.load_adapter(tmp_path / 'adapter', sites, params)
  assert [m.name for m in adapter.methods] == ['lora', 'full']


def test_masking():
  rows = np.arange(40).reshape(4, 10).astype(np.int32)
  new, at, want = train_mlm.masked(rows, 3, 99, 50, np.random.RandomState(0))
  assert at.shape == (4, 3) and at.min() >= 1 and at.max() <= 8
  np.testing.assert_array_equal(np.take_along_axis(rows, at, 1), want)
  other = np.ones((4, 10), bool)
  np.put_along_axis(other, at, False, 1)
  np.testing.assert_array_equal(new[other], rows[other])
  assert (new == 99).sum() >= 6
