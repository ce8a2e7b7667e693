"""What a task is to the loops: pure functions of batches and model outputs.

A batch is a dict of arrays [B, ...] of fixed shapes. Nothing here knows data
sets or models by name; `peftjax.case` brings a task, a model and data together.
"""

from collections.abc import Callable
import inspect
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax.method import nearest


class Task(NamedTuple):
  """How a model is run, trained and judged.

  Attributes:
    name: As in `config.task.name`.
    main: The metric that learning rates are chosen by.
    inputs: `batch -> (args, kwargs)` of the model's call.
    loss: `(out, batch, smoothing) -> (loss [B], weight [B] or None)`. The loss
      of a batch is sum(loss) / sum(weight), None standing for ones: a row's
      weight is how many things were predicted in it, its loss the sum over
      them. smoothing: of the labels in training; None: not training.
    measure: `(out, batch) -> {name: [B, ...]}`, what is kept of every row to
      compute metrics from.
    metrics: `{name: [N, ...]} -> {name: float}` over all rows.
    watch: `(out, batch) -> {name: scalar}`, reported with every step's loss.
    generate: `(model, methods, params, theta) -> {name: float}`, metrics of
      what the model writes for the held-out examples; None: it writes nothing.
  """

  name: str
  main: str
  inputs: Callable
  loss: Callable
  measure: Callable
  metrics: Callable
  watch: Callable = lambda out, batch: {}
  generate: Optional[Callable] = None


def cross_entropy(logits, labels, smoothing=None):
  """Cross-entropy in nats: logits [..., C], labels [...] -> [...], float32.

  smoothing: weight of the uniform distribution in the target; None as 0.
  """
  logits = logits.astype(jnp.float32)
  if smoothing is None:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  target = jax.nn.one_hot(labels, logits.shape[-1])
  return optax.softmax_cross_entropy(
      logits, optax.smooth_labels(target, smoothing))


def token_loss(logits, labels, weight, smoothing=None):
  """Summed cross-entropy of every row: ([B], [B] sums of weight).

  Args:
    logits: [B, T, C].
    labels: [B, T]; anything where the weight is 0.
    weight: [B, T], at least 0.
    smoothing: As in `cross_entropy`.
  """
  logits = logits.astype(jnp.float32)
  weight = weight.astype(jnp.float32)
  labels = jnp.where(weight > 0, labels, 0)
  # No one-hot array here: C is a whole vocabulary.
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  if smoothing:
    even = jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)
    loss = (1 - smoothing) * loss + smoothing * even
  return jnp.where(weight > 0, loss * weight, 0).sum(-1), weight.sum(-1)


def mean_loss(loss, weight):
  """The loss of a batch; weight None stands for ones."""
  if weight is None:
    return loss.mean()
  return loss.sum() / jnp.maximum(weight.sum(), 1e-8)


def main_metric(given, default, known):
  """The metric that `config.task.metric` names, '' standing for the default."""
  name = given or default
  if name not in known:
    raise ValueError(
        f'task.metric={name!r}: this task has no such metric'
        f'{nearest(name, known)}')
  return name


def takes(model):
  """Names of what a model is called with: ('ids', 'mask', ...)."""
  return tuple(inspect.signature(type(model).__call__).parameters)[1:]


def must_take(model, name, task):
  """Raises where a model is not of the kind that a task needs."""
  kinds = dict(images='an image model', ids='a text model',
               targets='an encoder-decoder')
  if name not in takes(model):
    raise ValueError(
        f'task.name={task!r} needs {kinds[name]}, but '
        f'{type(model).__name__} is called with {takes(model)}')


# --------------------------------------------------------------- text arrays
def with_types(arrays, model):
  """Arrays without the token types that a model does not have."""
  if 'types' in arrays and getattr(model, 'types', 0) < 2:
    return {k: v for k, v in arrays.items() if k != 'types'}
  return arrays


def trimmed(arrays, masks=('mask',), by=8):
  """Arrays without columns that are padding in all rows.

  The width left is a multiple of `by`. Nothing that a model computes changes
  but the time it takes: `config.task.length` is what a text may have at most.

  Args:
    arrays: {name: [N, ...]}.
    masks: Names of the masks [N, T]; a text's tokens are where they are True.
    by: See above.
  """
  longest = max(int(np.asarray(arrays[m]).sum(1).max()) for m in masks)
  length = arrays[masks[0]].shape[1]
  short = min(-(-longest // by) * by, length)
  return {k: v[:, :short] if v.ndim > 1 and v.shape[1] == length else v
          for k, v in arrays.items()}
