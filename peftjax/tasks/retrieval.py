"""Texts that belong together are brought close: retrieval, similarity.

Batches: ids, mask [B, T] and ids_b, mask_b [B, T]; row n of both belongs
together. Both texts go through the model in one call, and their vectors are
compared by cosine.

Pairs of the kind 'retrieval' are trained by the symmetric cross-entropy of
finding the partner among the batch's: the others are the negatives. Pairs with
a number (kind 'regression', similarity between 0 and `task.scale`) are trained
by the squared error of the cosine against label / scale.

Source: "Representation Learning with Contrastive Predictive Coding" (arXiv
1807.03748), in the two-sided form of CLIP (arXiv 2103.00020); "Sentence-BERT"
(arXiv 1908.10084) for the cosine against a similarity.
"""

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import measures
from peftjax.data import text
from peftjax.tasks import base as base_lib
from peftjax.tasks.base import Task

KINDS, HEAD, CALL = ('retrieval', 'regression'), 'pool', 'ids'
FIND = ('recall_at_1', 'recall_at_5')
SIMILAR = ('spearman', 'pearson')


def outputs(source):
  """None: the model gives vectors."""
  del source


def inputs(batch):
  """Both texts of a pair as rows 2n and 2n + 1: -> (ids [2B, T]), mask."""
  both = lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, a.shape[1])
  return (both(batch['ids'], batch['ids_b']),), dict(
      mask=both(batch['mask'], batch['mask_b']))


def vectors(out):
  """out [2B, d] -> unit vectors of first and second texts, [B, d] each."""
  out = out.astype(jnp.float32)
  size = jnp.sqrt((out ** 2).sum(-1, keepdims=True) + 1e-12)
  out = (out / size).reshape(-1, 2, out.shape[-1])
  return out[:, 0], out[:, 1]


def contrastive(a, b, temperature, valid=None):
  """Symmetric cross-entropy of a's rows among b's and the reverse, [B].

  Args:
    a, b: [B, d] unit vectors.
    temperature: What cosines are divided by.
    valid: [B]; rows that are no examples are nobody's negatives.
  """
  scores = a @ b.T / temperature
  valid = jnp.ones(len(a), bool) if valid is None else valid
  one = lambda s: jax.nn.logsumexp(
      jnp.where(valid[None], s, -jnp.inf), axis=-1) - jnp.diagonal(s)
  return (one(scores) + one(scores.T)) / 2


def task(spec, source, classes, base):
  """The `Task`; arguments as of `classification.task`."""
  del classes, base
  similar = source.kind == 'regression'
  known = SIMILAR if similar else FIND

  def loss(out, batch, smoothing=None):
    del smoothing
    a, b = vectors(out)
    if similar:
      return ((a * b).sum(-1) - batch['label'] / spec.scale) ** 2, None
    return contrastive(a, b, spec.temperature, batch.get('valid')), None

  def measure(out, batch):
    a, b = vectors(out)
    if similar:
      return dict(cosine=(a * b).sum(-1), label=batch['label'])
    return dict(a=a, b=b)

  def metrics(kept):
    if similar:
      pair = (kept['label'].astype(float), kept['cosine'].astype(float))
      return dict(spearman=measures.spearman(*pair),
                  pearson=measures.pearson(*pair))
    scores = kept['a'] @ kept['b'].T
    return {f'recall_at_{k}': measures.recall_at(scores, k) for k in (1, 5)}

  return Task('retrieve', base_lib.main_metric(spec.metric, known[0], known),
              inputs, loss, measure, metrics)


def arrays(spec, source, base, tokenizer, classes, train):
  """{ids, mask, ids_b, mask_b, label of similarities}; see `classification`."""
  del base, classes, train
  found, _ = text.encode_pairs(source.examples, tokenizer, spec.length)
  label = found.pop('label', None)
  if source.kind == 'regression':
    label = np.asarray(label, np.float32)
    if label.min() < 0 or label.max() > spec.scale:
      raise ValueError(
          f'{source.name} has similarities from {label.min():g} to '
          f'{label.max():g}; expected 0 to task.scale={spec.scale:g}')
    found['label'] = label
  return base_lib.trimmed(found, masks=('mask', 'mask_b'))
