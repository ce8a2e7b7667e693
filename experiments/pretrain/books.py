"""The text that the small decoders read, and the pieces it is cut into."""

import gzip
import json
import os

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

SPECIAL = ('<pad>', '<s>', '</s>')
PAD, BOS, EOS = range(3)
VOCABULARY = 2048
_CONFIG = dict(tokenizer_class='PreTrainedTokenizerFast', pad_token='<pad>',
               bos_token='<s>', eos_token='</s>', model_max_length=512)


def read(data_dir, name):
  """Rows of 'lm/books/train' and the like."""
  path = os.path.join(data_dir, f'{name}.jsonl.gz')
  with gzip.open(path, 'rt', encoding='utf-8') as f:
    return [json.loads(line) for line in f]


def fit_tokenizer(data_dir, folder):
  """Fits the byte-level BPE and writes tokenizer.json and its config."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  text = [r['text'] for r in read(data_dir, 'lm/books/train')]
  text += [f'{r["source"]}\n{r["target"]}'
           for r in read(data_dir, 'nlg/e2e/train')]
  bpe.train_from_iterator(text, trainers.BpeTrainer(
      vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  os.makedirs(folder, exist_ok=True)
  bpe.save(os.path.join(folder, 'tokenizer.json'))
  with open(os.path.join(folder, 'tokenizer_config.json'), 'w') as f:
    json.dump(_CONFIG, f, indent=1)
    f.write('\n')
  return bpe


def chapters(data_dir, part):
  """Texts to train on: 'first' two thirds, the 'rest', or 'all' chapters.

  The rest comes with WikiText's training articles. Which chapters are first is
  drawn once, with seed 0.
  """
  books = [r['text'] for r in read(data_dir, 'lm/books/train')]
  order = np.random.RandomState(0).permutation(len(books))
  cut = 2 * len(books) // 3
  if part == 'first':
    return [books[i] for i in order[:cut]]
  if part == 'all':
    return books
  wiki = [r['text'] for r in read(data_dir, 'lm/wikitext2_small/train')]
  return [books[i] for i in order[cut:]] + wiki


def encode(tokenizer, texts):
  """Texts -> one stream of ids, each text between <s> and </s>."""
  pieces = tokenizer.encode_batch(texts)
  return np.concatenate([[BOS, *p.ids, EOS] for p in pieces]).astype(np.int32)


def windows(stream, length):
  """Stream -> [N, length + 1] rows that overlap in one id."""
  n = (len(stream) - 1) // length
  at = np.arange(n)[:, None] * length + np.arange(length + 1)
  return stream[at]
