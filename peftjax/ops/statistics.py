"""Statistics of a layer that methods share, put together batch by batch.

`calibrate.collect` runs a base on batches and hands every layer's values to a
`Reducer`. Here is the type, and the reducers of more than one method.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional

import jax.numpy as jnp


class Reducer(NamedTuple):
  """What is kept of one layer, and how a batch is added to it.

  Attributes:
    of: 'inputs', 'gradient' or 'examples', as in `calibrate`.
    init: `Site -> state`, a mapping of float32 arrays.
    update: `(state, value, keep) -> state`. value is x [n, d_in] or a gradient
      [d_in, d_out]; keep is bool [n], of gradients None.
    finish: `state -> stats`, what `Method.init` gets; a mapping of arrays.
    done: `state -> bool`: whether further batches would change nothing; or
      None. Batches end when all layers are done.
    train: Whether the base runs as in training, with dropout.
    name: Of the statistics and their settings; a collection that was broken off
      goes on only under the same one.
  """

  of: str
  init: Callable
  update: Callable
  finish: Callable = lambda state: state
  done: Optional[Callable] = None
  train: bool = False
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
