"""The small backbones of the repository are those that their card describes."""

import hashlib
import os
import pathlib

import numpy as np
import pytest
import tokenizers

from experiments.pretrain import books
from experiments.pretrain import train_mlm
import peftjax
from peftjax import bases
from peftjax import models
from peftjax import trees
from peftjax.data import text

ROOT = pathlib.Path(__file__).parents[2] / 'weights'
FOLDERS = sorted(p.parent.name for p in ROOT.glob('*/config.json'))


def test_all_are_there_and_small():
  assert FOLDERS == ['books_1m', 'dec_s', 'dec_s_v1']
  kept = [p for p in ROOT.rglob('*') if p.is_file() and '.work' not in str(p)]
  assert sum(p.stat().st_size for p in kept) < 30e6


@pytest.mark.parametrize('name', FOLDERS)
def test_card(name):
  card = (ROOT / 'README.md').read_text()
  file = (ROOT / name / 'model.safetensors').read_bytes()
  assert f'`{hashlib.sha256(file).hexdigest()[:8]}…`' in card
  base = bases.load(str(ROOT / name), head='lm')
  assert f'{trees.count(base.params):,}' in card
  tokenizer = text.load_tokenizer(str(ROOT / name))
  text.check_fits(tokenizer, base.model.vocab, bases.positions(base), 128)
  ids = tokenizer.encode(['It was a dark and stormy night.'])[0]
  assert tokenizer.decode(ids).strip() == 'It was a dark and stormy night.'


def test_masked_language_model_passes_its_gate():
  """On 64 rows of text that nobody was trained on; the card has 640."""
  data = pathlib.Path(os.environ.get('PEFTJAX_DATA') or
                      ROOT.parent.parent / 'shared' / 'data')
  folder = data / 'checkpoints' / 'all-MiniLM-L6-v2'
  if not folder.is_dir():
    pytest.skip(f'{folder.name} is not there; set PEFTJAX_DATA')
  model, params, config = models.load(folder, head='mlm')
  sites = peftjax.describe(model, *models.example(model, config))
  methods, theta, _ = peftjax.load_adapter(ROOT / 'minilm_mlm', sites, params)
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokenizer.no_truncation()
  tokenizer.no_padding()
  novel = books.read(str(data), 'lm/books/test')[0]['text']
  rows, at, want = train_mlm.masked(
      train_mlm.rows_of(tokenizer, [novel], 64)[:64], 9,
      tokenizer.token_to_id('[MASK]'), model.vocab, np.random.RandomState(0))
  logits = train_mlm.logits_at(model, methods, params, theta, rows, at)
  assert (logits.argmax(-1) == want).mean() > 0.25
