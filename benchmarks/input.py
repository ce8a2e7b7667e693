"""Input pipelines against a training step: do they keep it busy?

  python -m benchmarks.input --step_ms=150
  python -m benchmarks.input --data=data:sst2 --path=data \
      --tokenizer=data/checkpoints/all-MiniLM-L6-v2

Every pipeline is drained for a while without any step beside it. Prints JSON:
for each the examples and batches a second and `ratio`, the step's time over the
time of a batch; below 1 the step would wait. `real` is the part of a batch's
tokens that is no padding. Without --data the texts are random words and the
tokenizer is made of their syllables; the images are random always.
"""

import json
import time

from absl import app
from absl import flags
import jax
from jax.sharding import SingleDeviceSharding
import numpy as np
import tokenizers

from peftjax.data import images
from peftjax.data import packing
from peftjax.data import pipeline
from peftjax.data import sources
from peftjax.data import stream
from peftjax.data import text
from peftjax.data.tokenizer import load_tokenizer
from peftjax.data.tokenizer import Tokenizer

_STEP = flags.DEFINE_float('step_ms', 100., 'Time of a training step.',
                           lower_bound=0.)
_BATCH = flags.DEFINE_integer('batch', 32, 'Examples a step.', lower_bound=1)
_LENGTH = flags.DEFINE_integer('length', 64, 'Tokens a row.', lower_bound=3)
_DATA = flags.DEFINE_string('data', '', 'Texts to classify; see open_split.')
_PATH = flags.DEFINE_string('path', '', 'Folder of --data.')
_TOKENIZER = flags.DEFINE_string('tokenizer', '', 'Folder or tokenizer.json.')
_PIXELS = flags.DEFINE_integer('pixels', 32, 'Side of an image as the model '
                               'reads it.', lower_bound=1)
_STORED = flags.DEFINE_integer('stored', 64, 'Side of a stored image.',
                               lower_bound=1)
_THREADS = flags.DEFINE_integer('threads', 2, 'That prepare batches.',
                                lower_bound=0)
_SECONDS = flags.DEFINE_float('seconds', 2., 'For each pipeline.',
                              lower_bound=0.)
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')

SYLLABLES = [c + v for c in 'bdfgklmnprstvz' for v in 'aeiou']


def random_texts(n=4000, words=2000):
  """n sentences of 3 to 40 words; few words are frequent, most are rare."""
  rng = np.random.default_rng(0)
  known = [''.join(rng.choice(SYLLABLES, rng.integers(1, 5)))
           for _ in range(words)]
  rank = 1 / np.arange(1, words + 1)
  return [dict(text=' '.join(rng.choice(known, rng.integers(3, 41),
                                        p=rank / rank.sum())), label=i % 2)
          for i in range(n)]


def syllable_tokenizer():
  """A WordPiece of `SYLLABLES`."""
  pieces = ['[PAD]', '[UNK]', '[CLS]', '[SEP]']
  pieces += SYLLABLES + ['##' + s for s in SYLLABLES]
  core = tokenizers.Tokenizer(tokenizers.models.WordPiece(
      {p: i for i, p in enumerate(pieces)}, unk_token='[UNK]'))
  core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  core.post_processor = tokenizers.processors.TemplateProcessing(
      single='[CLS] $A [SEP]', pair=None,
      special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
  return Tokenizer(core, len(pieces), pad=0)


def text_pipelines():
  """{name: endless batches}, tokenised while the step runs and before it."""
  tokenizer = syllable_tokenizer()
  if _TOKENIZER.value:
    tokenizer = load_tokenizer(_TOKENIZER.value)
  examples = random_texts()
  if _DATA.value:
    examples = sources.open_split(_DATA.value, 'train', _PATH.value).examples
  encode = lambda e: text.encode_classification(e, tokenizer, _LENGTH.value)
  arrays, _ = encode(examples)
  on_the_fly = lambda: stream.stream(
      examples, encode, batch_size=_BATCH.value, seed=0,
      threads=_THREADS.value)
  return {
      'text, tokenised on the fly': on_the_fly(),
      'text, tokenised on the fly, to device': stream.DevicePrefetch(
          on_the_fly(), SingleDeviceSharding(jax.devices()[0])),
      'text, tokenised before': pipeline.train_iterator(
          arrays, _BATCH.value, seed=0),
      'text, tokenised before, buckets': packing.bucket_iterator(
          arrays, _BATCH.value, 0, packing.bucket_lengths(_LENGTH.value)),
  }


def image_pipelines(n=512):
  """{name: endless batches}, resized while the step runs and before it."""
  side = (_PIXELS.value, _PIXELS.value)
  how = images.Preprocessor(resize=side)
  shape = (n, _STORED.value, _STORED.value, 3)
  pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  examples = [dict(image=x, label=i % 10) for i, x in enumerate(pixels)]
  augment = lambda example, rng: dict(
      image=images.preprocess(
          example['image'], how, seed=int(rng.integers(2 ** 31))),
      label=np.int32(example['label']))
  return {
      'images, augmented on the fly': stream.stream(
          examples, augment=augment, batch_size=_BATCH.value, seed=0,
          threads=_THREADS.value),
      'images, resized before': pipeline.train_iterator(
          images.encode_images(examples, how), _BATCH.value, seed=0),
  }


def rate(batches):
  """Drains batches for a while -> dict of figures."""
  for _ in range(8):  # what was prepared ahead would be too cheap
    next(batches)
  count, real, start = 0, [], time.perf_counter()
  while count < 8 or time.perf_counter() - start < _SECONDS.value:
    batch = jax.block_until_ready(next(batches))
    count += 1
    if 'mask' in batch and count <= 200:
      real.append(batch['mask'])
  ms = 1000 * (time.perf_counter() - start) / count
  row = dict(examples_per_s=round(_BATCH.value * 1000 / ms, 1),
             batches_per_s=round(1000 / ms, 1), batch_ms=round(ms, 3),
             ratio=round(_STEP.value / ms, 2))
  if real:
    row['real'] = round(float(sum(m.sum() for m in real)
                              / sum(m.size for m in real)), 3)
  return row


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; see --help')
  runs = {**text_pipelines(), **image_pipelines()}
  found = dict(step_ms=_STEP.value, batch=_BATCH.value, length=_LENGTH.value,
               pixels=_PIXELS.value, threads=_THREADS.value,
               pipelines={name: rate(b) for name, b in runs.items()})
  print(json.dumps(found, indent=1))
  if _OUT.value:
    with open(_OUT.value, 'w', encoding='utf-8') as f:
      json.dump(found, f, indent=1)
      f.write('\n')


if __name__ == '__main__':
  app.run(main)
