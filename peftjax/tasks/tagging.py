"""A tag for every word: named entities (BIO tags), parts of speech.

Batches: ids int32 [B, T], mask bool [B, T], labels int32 [B, T], the tag of a
word at its first token, -1 elsewhere. Entities are scored as conlleval does;
words that did not fit into a row are not scored, and the encoder's report says
how many there are.
"""

import jax.numpy as jnp

from peftjax import measures
from peftjax.data import text
from peftjax.tasks import base as base_lib
from peftjax.tasks import classification
from peftjax.tasks.base import Task

KINDS, HEAD, CALL = ('tagging',), 'tag', 'ids'
ENTITIES = ('f1', 'precision', 'recall', 'accuracy')
PLAIN = ('accuracy', 'macro_f1')


def outputs(source):
  """Outputs of the head."""
  return len(source.labels)


def is_bio(labels):
  """Whether names of tags are 'O', 'B-x', 'I-x'."""
  return 'O' in labels and all(
      t == 'O' or t[:2] in ('B-', 'I-') for t in labels)


def task(spec, source, classes, base):
  """The `Task`; arguments as of `classification.task`."""
  del base
  names = source.labels
  entities = is_bio(names)
  known = ENTITIES if entities else PLAIN
  if classes != len(names):
    raise ValueError(f'{source.name} has {len(names)} tags, the head '
                     f'{classes} outputs')

  def loss(out, batch, smoothing=None):
    return base_lib.token_loss(
        out, batch['labels'], batch['labels'] >= 0, smoothing)

  def measure(out, batch):
    return dict(guess=out.argmax(-1).astype(jnp.int32), label=batch['labels'])

  def metrics(kept):
    there = kept['label'] >= 0
    label, guess = kept['label'][there], kept['guess'][there]
    found = dict(accuracy=measures.accuracy(label, guess))
    if not entities:
      return dict(found, macro_f1=measures.f1(label, guess, 'macro'))
    tags = [[[names[t] for t in row[real]] for row, real in zip(
        kept[k], there)] for k in ('label', 'guess')]
    return found | measures.entity_f1(*tags)

  return Task('tag', base_lib.main_metric(spec.metric, known[0], known),
              classification.inputs, loss, measure, metrics)


def encoder(spec, source, base, tokenizer, classes):
  """Examples -> (arrays, Report); see `classification.encoder`."""
  del base, classes
  return lambda examples: text.encode_tagging(
      examples, tokenizer, spec.length, source.labels)


def arrays(spec, source, base, tokenizer, classes, train):
  """{ids, mask, labels}; arguments as of `classification.arrays`."""
  del train
  encode = encoder(spec, source, base, tokenizer, classes)
  return base_lib.trimmed(encode(source.examples)[0])
