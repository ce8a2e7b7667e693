"""Predicting a number from a text or a pair of texts.

Batches: as of classification, label float32 [B]; the model has one output and
the loss is the squared error.
"""

import jax.numpy as jnp
import numpy as np

from peftjax import measures
from peftjax.data import text
from peftjax.tasks import base as base_lib
from peftjax.tasks import classification
from peftjax.tasks.base import Task

KINDS, HEAD, CALL = ('regression',), 'classify', 'ids'
METRICS = ('pearson', 'spearman', 'mse')


def outputs(source):
  """Outputs of the head."""
  del source
  return 1


def task(spec, source, classes, base):
  """The `Task`; arguments as of `classification.task`."""
  del source, classes, base

  def loss(out, batch, smoothing=None):
    del smoothing
    return (out[:, 0].astype(jnp.float32) - batch['label']) ** 2, None

  def measure(out, batch):
    return dict(guess=out[:, 0].astype(jnp.float32), label=batch['label'])

  return Task(
      'regress', base_lib.main_metric(spec.metric, 'pearson', METRICS),
      classification.inputs, loss, measure, metrics)


def metrics(kept):
  """Metrics of {guess, label}, each [N]."""
  label, guess = (kept[k].astype(np.float64) for k in ('label', 'guess'))
  return dict(pearson=measures.pearson(label, guess),
              spearman=measures.spearman(label, guess),
              mse=float(np.mean((guess - label) ** 2)))


def encoder(spec, source, base, tokenizer, classes):
  """Examples -> (arrays, Report); see `classification.encoder`."""
  del source, classes

  def encode(examples):
    found, report = text.encode_classification(
        examples, tokenizer, spec.length)
    found['label'] = found['label'].astype(np.float32)
    return base_lib.with_types(found, base.model), report

  return encode


def arrays(spec, source, base, tokenizer, classes, train):
  """{ids, mask, types, label}; arguments as of `classification.arrays`."""
  del train
  encode = encoder(spec, source, base, tokenizer, classes)
  return base_lib.trimmed(encode(source.examples)[0])
