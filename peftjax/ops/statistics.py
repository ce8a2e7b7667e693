"""Statistics of a layer that methods share, put together batch by batch.

`calibrate.collect` runs a base on batches and hands every layer's values to a
`Reducer`. Here is the type, and the reducers of more than one method.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional

import jax
from jax import lax
import jax.numpy as jnp

from peftjax.method import nearest
from peftjax.ops import linalg
from peftjax.ops import svd

# Matrices with more rows and more columns are decomposed by `svd.randomised`.
WHOLE = 512


class Reducer(NamedTuple):
  """What is kept of one layer, and how a batch is added to it.

  Attributes:
    of: 'inputs', 'gradient' or 'examples', as in `calibrate`.
    init: `Site -> state`, a mapping of float32 arrays. Layers that read the
      same share one state of 'inputs', made for one of them.
    update: `(state, value, keep) -> state`. value is x [n, d_in] or a gradient
      [d_in, d_out]; keep is bool [n], of gradients None.
    finish: `state -> stats`, what `Method.init` gets; a mapping of arrays.
    done: `state -> bool`: whether no further batches are needed; or None.
      Batches end when all layers are done.
    train: Whether the base runs as in training, with dropout.
    labelled: Whether keep leaves out tokens that have no label, where others
      have one: prompts of answers, pieces of words that are no first ones.
    name: Of the statistics and their settings; a collection that was broken off
      goes on only under the same one.
  """

  of: str
  init: Callable
  update: Callable
  finish: Callable = lambda state: state
  done: Optional[Callable] = None
  train: bool = False
  labelled: bool = False
  name: str = ''


def mean_gradient(train=True):
  """The gradient of the loss in the kernel, its mean over batches.

  Args:
    train: Whether the base runs as in training, with dropout.

  Returns:
    A `Reducer` to dict(gradient [d_in, d_out]).
  """
  def init(site):
    return dict(total=jnp.zeros(site.params['kernel'].shape),
                batches=jnp.zeros(()))

  def update(state, value, keep):
    del keep
    return dict(total=state['total'] + value, batches=state['batches'] + 1)

  def finish(state):
    return dict(gradient=state['total'] / state['batches'])

  return Reducer('gradient', init, update, finish, train=train,
                 name=f'mean_gradient train={train}')


def covariance(per='row', scale='none'):
  """Second moments of what a layer reads, not centred: C = sum x^T x / n.

  Args:
    per: What n counts: 'row', or 'call', batches that hold any rows.
    scale: 'none'; or 'call': the rows of a call are divided by the largest
      magnitude among them, so that all calls weigh about the same.

  Returns:
    A `Reducer` to dict(covariance [d_in, d_in]).

  Raises:
    ValueError: an unknown per or scale.
  """
  for word, choices in ((per, ('row', 'call')), (scale, ('none', 'call'))):
    if word not in choices:
      raise ValueError(f'covariance: unknown {word!r}{nearest(word, choices)}')

  def init(site):
    d = site.params['kernel'].shape[0]
    return dict(total=jnp.zeros((d, d)), n=jnp.zeros(()))

  def update(state, value, keep):
    x = jnp.where(keep[:, None], value, 0)
    if scale == 'call':
      top = jnp.abs(x).max()
      x /= jnp.where(top > 0, top, 1)
    square = jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST)
    n = keep.any() if per == 'call' else keep.sum()
    return dict(total=state['total'] + square, n=state['n'] + n)

  def finish(state):
    return dict(covariance=state['total'] / jnp.maximum(state['n'], 1))

  return Reducer('inputs', init, update, finish,
                 name=f'covariance per={per} scale={scale}')


def components(most, first, similar):
  """Principal components of what a layer reads, batch by batch.

  Incremental principal component analysis: of n rows seen, with mean m and
  components P [q, d_in] of singular values S, and n' new rows X of mean m',

    [diag(S) P; X - m'; sqrt(n n' / (n + n')) (m - m')] = U diag(S') P'

  and the first q rows of P' and S' are kept: exact while nothing was cut off.
  A batch of fewer than q rows is left out. The entry of largest magnitude of
  every component is positive. The decomposition is a full one; of matrices with
  more than `WHOLE` rows and columns a randomised one, with 2 q columns and 4
  power iterations.

  Args:
    most: q, cut to d_in.
    first: So many components have to settle before no more batches are needed.
    similar: The least cosine between a settled one before and after a batch.

  Returns:
    A `Reducer` to dict(directions [q, d_in], orthonormal rows; values [q], the
    singular values of the centred rows, in descending order; total, the sum of
    squares of the centred rows; rows, how many there were).
  """
  def init(site):
    d = site.params['kernel'].shape[0]
    q = min(most, d)
    return dict(directions=jnp.zeros((q, d)), values=jnp.zeros(q),
                mean=jnp.zeros(d), total=jnp.zeros(()), rows=jnp.zeros(()),
                cosine=-jnp.ones(q))

  def update(state, value, keep):
    old, seen, new = state['directions'], state['rows'], keep.sum()
    rows = seen + new
    x = jnp.where(keep[:, None], value, 0)
    mean = x.sum(0) / jnp.maximum(new, 1)
    x = jnp.where(keep[:, None], x - mean, 0)
    share = new / jnp.maximum(rows, 1)
    shift = jnp.sqrt(seen * share) * (state['mean'] - mean)
    u, s = _left(jnp.concatenate(
        [state['values'][:, None] * old, x, shift[None]]).T, len(old))
    found = dict(
        directions=u.T, values=s, rows=rows,
        mean=state['mean'] + share * (mean - state['mean']),
        total=state['total'] + jnp.square(x).sum() + jnp.square(shift).sum(),
        cosine=jnp.where(seen > 0, (u.T * old).sum(1), -1))
    return {n: jnp.where(new >= len(old), v, state[n])
            for n, v in found.items()}

  def finish(state):
    return {n: state[n] for n in ('directions', 'values', 'total', 'rows')}

  def done(state):
    return (state['cosine'][:first] >= similar).all()

  return Reducer('inputs', init, update, finish, done,
                 name=f'components most={most} first={first} similar={similar}')


def _left(w, rank):
  """The first left singular vectors and values of w: ([d, rank], [rank])."""
  if min(w.shape) <= WHOLE:
    if w.shape[0] < w.shape[1]:  # the same left side with fewer columns
      w = linalg.triangle(w.T).T
    return svd.split(w, rank)[:2]
  return svd.randomised(w, rank, oversample=rank, iterations=4,
                        key=jax.random.key(42))[:2]
