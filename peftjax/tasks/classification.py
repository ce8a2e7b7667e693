"""Classification of images and of texts or pairs of them, and regression.

Batches:
  image     image float32 [B, H, W, 3], label int32 [B]
  classify  ids int32 [B, T], mask bool [B, T], types int32 [B, T] (of pairs,
            where the model has types), label int32 [B]
  regress   the same, label float32 [B]; the model has one output
"""

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import measures
from peftjax.tasks.base import cross_entropy, main_metric, Task

CLASSIFY = ('accuracy', 'f1', 'macro_f1', 'matthews', 'ece')
REGRESS = ('pearson', 'spearman', 'mse')


def image_inputs(batch):
  """(args, kwargs) of an image model's call."""
  return (batch['image'],), {}


def text_inputs(batch):
  """(args, kwargs) of a text model's call."""
  return (batch['ids'],), {
      k: batch[k] for k in ('mask', 'types') if k in batch}


def classify(name, inputs, classes, metric=''):
  """The task of choosing one of `classes`: logits [B, classes] against labels.

  Args:
    name: Of the task.
    inputs: `batch -> (args, kwargs)`.
    classes: Their number, at least 2.
    metric: Name in `CLASSIFY`; 'f1' is of class 1 and there for two classes
      alone. '' stands for 'accuracy'.

  Raises:
    ValueError: an unknown metric, or fewer than two classes.
  """
  if classes < 2:
    raise ValueError(f'task {name!r} has {classes} classes: expected at least '
                     "2; numbers are predicted by task.name='regress'")
  known = tuple(m for m in CLASSIFY if m != 'f1' or classes == 2)

  def loss(out, batch, smoothing=None):
    return cross_entropy(out, batch['label'], smoothing), None

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

  return Task(name, main_metric(metric, 'accuracy', known), inputs, loss,
              measure, metrics, watch=lambda out, batch: dict(
                  accuracy=(out.argmax(-1) == batch['label']).mean()))


def regress(inputs, metric=''):
  """The task of predicting a number: outputs [B, 1] against labels [B].

  The loss is the squared error.

  Args:
    inputs: `batch -> (args, kwargs)`.
    metric: Name in `REGRESS`; '' stands for 'pearson'.

  Raises:
    ValueError: an unknown metric.
  """

  def loss(out, batch, smoothing=None):
    del smoothing
    return (out[:, 0].astype(jnp.float32) - batch['label']) ** 2, None

  def measure(out, batch):
    return dict(guess=out[:, 0].astype(jnp.float32), label=batch['label'])

  def metrics(kept):
    label, guess = (kept[k].astype(np.float64) for k in ('label', 'guess'))
    return dict(pearson=measures.pearson(label, guess),
                spearman=measures.spearman(label, guess),
                mse=float(np.mean((guess - label) ** 2)))

  return Task('regress', main_metric(metric, 'pearson', REGRESS), inputs, loss,
              measure, metrics)
