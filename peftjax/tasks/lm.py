"""Causal language models on running text.

Batches: ids int32 [B, T], mask bool [B, T], weights float32 [B, T], the weight
of predicting token t from those before it; segments and positions int32 [B, T]
where several texts share a row.
"""

import jax.numpy as jnp

from peftjax import measures
from peftjax.data import packing, text
from peftjax.tasks import base as base_lib
from peftjax.tasks.base import Task

KINDS, HEAD, CALL = ('lm',), 'lm', 'ids'
METRICS = ('perplexity', 'token_accuracy')


def outputs(source):
  """None: the head's outputs are the vocabulary."""
  del source


def inputs(batch):
  """(args, kwargs) of a decoder's call."""
  return (batch['ids'],), {
      k: batch[k] for k in ('mask', 'positions', 'segments') if k in batch}


def loss(out, batch, smoothing=None):
  """Cross-entropy of the next token, summed over a row; see `Task`."""
  return base_lib.token_loss(
      out[:, :-1], batch['ids'][:, 1:], batch['weights'][:, 1:], smoothing)


def measure(out, batch):
  """{loss, weight, right}, each [B], of the tokens that are predicted."""
  return measured(out[:, :-1], batch['ids'][:, 1:], batch['weights'][:, 1:])


def measured(logits, labels, weights):
  """Loss, weight and right first choices of every row."""
  total, weight = base_lib.token_loss(logits, labels, weights)
  right = ((logits.argmax(-1) == labels) * weights).sum(-1)
  return dict(loss=total, weight=weight, right=right.astype(jnp.float32))


def metrics(kept):
  """Perplexity and share of right tokens over all rows."""
  total = kept['weight'].sum(dtype=float)
  return dict(
      perplexity=measures.perplexity(kept['loss'].sum(dtype=float) / total),
      token_accuracy=float(kept['right'].sum(dtype=float) / total))


def task(spec, source, classes, base):
  """The `Task`; arguments as of `classification.task`."""
  del source, classes, base
  return Task('lm', base_lib.main_metric(spec.metric, 'perplexity', METRICS),
              inputs, loss, measure, metrics)


def shapes(spec, base):
  """{name: (shape, type) of one row} of the longest batches, without data."""
  del base
  names = dict(ids='int32', mask='bool', weights='float32')
  if spec.packed:
    names |= dict(segments='int32', positions='int32')
  return {name: ((spec.length,), kind) for name, kind in names.items()}


def encoder(spec, source, base, tokenizer, classes):
  """Examples -> (arrays, Report), a text a row; see `classification.encoder`."""
  del source, base, classes
  return lambda examples: text.encode_lm(
      examples, tokenizer, spec.length, rows='texts')


def arrays(spec, source, base, tokenizer, classes, train):
  """{ids, mask, weights}; arguments as of `classification.arrays`.

  Texts follow each other in rows without padding; with `task.packed`, every
  text stays whole and a row holds as many as fit, each blind to the others.
  """
  del base, classes
  found, _ = text.encode_lm(
      source.examples, tokenizer, spec.length,
      rows='texts' if spec.packed else 'chunks')
  if spec.packed and train:
    found, _ = packing.pack(found, spec.length, tokenizer.pad)
  return base_lib.trimmed(found)
