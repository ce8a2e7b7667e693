"""The small backbones of the repository are those that their card describes."""

import hashlib
import pathlib

import pytest

from peftjax import bases
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
