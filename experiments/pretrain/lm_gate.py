r"""Gate of the small decoders: better than a 5-gram model on the same pieces.

  python -m experiments.pretrain.lm_gate --data_dir=DATA weights/dec_s ...

prints, for every folder, the perplexity a piece and the bits a byte on the test
novels, of the decoder (windows of 128 pieces, as in training, the first 64 of
each as context alone) and of the 5-gram model with Kneser-Ney smoothing that was fitted
on all that the folder's versions have seen.
"""

import json
import os

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from experiments.pretrain import books
from experiments.pretrain import ngram
from peftjax.interop import huggingface


WINDOW, CONTEXT = 128, 64
# Which chapters each has seen.
SEEN = dict(dec_s_v1=('first',), dec_s=('first', 'rest'), books_1m=('all',))


def decoder_nats(folder, stream):
  """Mean nats of the pieces of a stream but the first window's context."""
  model, params, _ = huggingface.load(folder)

  @jax.jit
  def nats(rows):
    logits = model.apply({'params': params}, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), rows[:, 1:])[:, CONTEXT:]

  stride = WINDOW - CONTEXT
  n = (len(stream) - 1 - CONTEXT) // stride
  at = np.arange(n)[:, None] * stride + np.arange(WINDOW + 1)
  rows = stream[np.minimum(at, len(stream) - 1)]
  # Whole batches: the few windows left over at the end are not counted.
  return float(np.mean([nats(rows[i:i + 32]) for i in range(0, n - 31, 32)]))


def gate(folder, data_dir):
  """Perplexities of one folder."""
  tokenizer = tokenizers.Tokenizer.from_file(
      os.path.join(folder, 'tokenizer.json'))
  name = os.path.basename(folder.rstrip('/'))
  text = [r['text'] for r in books.read(data_dir, 'lm/books/test')]
  test = books.encode(tokenizer, text)
  seen = np.concatenate([
      books.encode(tokenizer, books.chapters(data_dir, part))
      for part in SEEN[name]])
  p = ngram.probabilities(ngram.fit(seen, books.VOCABULARY), test)
  nats = decoder_nats(folder, test)
  bytes_a_piece = sum(len(t.encode()) for t in text) / len(test)
  return dict(
      name=name, pieces=len(test), perplexity=float(np.exp(nats)),
      bits_a_byte=nats / np.log(2) / bytes_a_piece,
      five_gram=float(np.exp(-np.mean(np.log(p[CONTEXT:])))))


def main(argv):
  for folder in argv[1:]:
    found = gate(folder, _DATA.value)
    print(json.dumps(found | dict(
        passed=found['perplexity'] < found['five_gram'])))


if __name__ == '__main__':
  _DATA = flags.DEFINE_string('data_dir', '../shared/data', 'Holds lm/.')
  app.run(main)
