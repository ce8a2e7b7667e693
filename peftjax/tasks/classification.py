"""Classification of texts and of pairs of texts; what images share with it.

Batches: ids int32 [B, T], mask bool [B, T], types int32 [B, T] (of pairs, where
the model has types), label int32 [B].
"""

import jax
import jax.numpy as jnp

from peftjax import measures
from peftjax.data import text
from peftjax.tasks import base as base_lib
from peftjax.tasks.base import Task

KINDS, HEAD, CALL = ('classification',), 'classify', 'ids'
METRICS = ('accuracy', 'f1', 'macro_f1', 'matthews', 'ece')
# What data sets call their metric, where it is not the first of the task's.
_NAMES = {'matthews_correlation': 'matthews'}


def outputs(source):
  """Outputs of the head."""
  return len(source.labels)


def metric_of(spec, source):
  """The metric of a config, or the one that the data name."""
  return spec.metric or _NAMES.get(source.metric, '')


def task(spec, source, classes, base):
  """The `Task`.

  Args:
    spec: `config.task`.
    source: A `data.sources.Source` of the data.
    classes: Outputs of the head.
    base: The `bases.Base`.
  """
  del base
  return classify('classify', inputs, classes, metric_of(spec, source))


def shapes(spec, base):
  """{name: (shape, type) of one row} of the longest batches, without data.

  A model that knows types is taken to be trained on pairs.
  """
  tokens = {name: ((spec.length,), kind) for name, kind in dict(
      ids='int32', mask='bool', types='int32').items()}
  return base_lib.with_types(dict(tokens, label=((), 'int32')), base.model)


def encoder(spec, source, base, tokenizer, classes):
  """Examples -> ({ids, mask, types, label} of spec.length tokens, Report).

  Args:
    spec, source, classes, base: As of `task`.
    tokenizer: Of the base.
  """
  del source

  def encode(examples):
    found, report = text.encode_classification(
        examples, tokenizer, spec.length, classes)
    return base_lib.with_types(found, base.model), report

  return encode


def arrays(spec, source, base, tokenizer, classes, train):
  """{ids, mask, types, label} of a split's examples.

  Args:
    spec, source, base, tokenizer, classes: As of `encoder`.
    train: Whether it is what is trained on.
  """
  del train
  encode = encoder(spec, source, base, tokenizer, classes)
  return base_lib.trimmed(encode(source.examples)[0])


def inputs(batch):
  """(args, kwargs) of a text model's call."""
  return (batch['ids'],), {
      k: batch[k] for k in ('mask', 'types') if k in batch}


def classify(name, inputs, classes, metric=''):
  """The task of choosing one of `classes`: logits [B, classes] against labels.

  Args:
    name: Of the task.
    inputs: `batch -> (args, kwargs)`.
    classes: Their number, at least 2.
    metric: Name in `METRICS`; 'f1' is of class 1 and there for two classes
      alone. '' stands for 'accuracy'.

  Raises:
    ValueError: an unknown metric, or fewer than two classes.
  """
  if classes < 2:
    raise ValueError(f'task {name!r} has {classes} classes: expected at least '
                     "2; numbers are predicted by task.name='regress'")
  known = tuple(m for m in METRICS if m != 'f1' or classes == 2)

  def loss(out, batch, smoothing=None):
    return base_lib.cross_entropy(out, batch['label'], smoothing), None

  def measure(out, batch):
    out = out.astype(jnp.float32)
    return dict(guess=out.argmax(-1), label=batch['label'],
                confidence=jax.nn.softmax(out).max(-1))

  def metrics(kept):
    label, guess = kept['label'], kept['guess']
    found = dict(
        accuracy=measures.accuracy(label, guess),
        macro_f1=measures.f1(label, guess, 'macro'),
        matthews=measures.matthews(label, guess),
        ece=measures.calibration_error(kept['confidence'], label == guess))
    if 'f1' in known:
      found['f1'] = measures.f1(label, guess)
    return found

  def watch(out, batch):
    return dict(accuracy=(out.argmax(-1) == batch['label']).mean())

  return Task(name, base_lib.main_metric(metric, 'accuracy', known), inputs,
              loss, measure, metrics, watch)
