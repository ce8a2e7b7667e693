"""Leaves of theta that are trained on data of their own, by a hypergradient.

Some trained leaves say how the others are used: which ranks, which paths.
Trained with the others they fit what the others fit. So the rows of every batch
are parted into D1 and D2, with the losses L1 and L2, and a method names such
leaves, a, as `Method.outer`. All other trained leaves, w, of all methods, go
down the gradient of L1; a goes down that of

  L2(w', a),   w' = w - xi grad_w L1(w, a)

in a, of which w' is a function too. Two forms:

  exact  autodiff through w', for a gradient of a gradient.
  darts  grad_a L2(w', a) - xi (grad_a L1(w + e v, a) - grad_a L1(w - e v, a))
         / (2 e), where v = grad_w' L2(w', a), e = 0.01 / ||v||: gradients only,
         which all layers have. Of "DARTS: Differentiable Architecture Search"
         (arXiv 1806.09055).

w and a move at once, each by its own optimiser group; w' is not kept. The
methods' penalties are part of both losses.

Which part a row belongs to is a function of its content alone, a hash of its
arrays: the same in all epochs and runs, and two rows that are the same are in
the same part. A batch may have no row of a part; that gradient is 0 then, but
for penalties. In a task whose rows see each other (retrieve) the parts do too.
"""

from typing import NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax import theta as theta_lib
from peftjax.method import as_methods, nearest

FORMS = ('exact', 'darts')


class Outer(NamedTuple):
  """Which leaves of a method follow the hypergradient, and how."""

  leaves: tuple[str, ...]
  step: float  # xi
  form: str = 'exact'  # one of FORMS
  share: float = 0.7  # of the rows that is D1


def outer(leaves, step, form='exact', share=0.7):
  """An `Outer`.

  Raises:
    ValueError: a negative or infinite step, an unknown form, or a share
      outside (0, 1).
  """
  if not 0 <= step < float('inf'):
    raise ValueError(f'xi={step}: expected a finite number, at least 0')
  if form not in FORMS:
    raise ValueError(f'unknown hypergradient {form!r}{nearest(form, FORMS)}')
  if not 0 < share < 1:
    raise ValueError(f'share {share} of the rows: expected a number in (0, 1); '
                     'the usual one is 0.7')
  return Outer(tuple(leaves), step, form, share)


def check(config, methods):
  """Raises where a method's outer leaves cannot be trained as it says.

  Args:
    config: The whole config of a run.
    methods: As given to `init`.
  """
  found = {n: m.outer for n, m in as_methods(methods).items() if m.outer}
  ways = {o._replace(leaves=()) for o in found.values()}
  if len(ways) > 1:
    raise ValueError(f'{" and ".join(found)} part the data or take the step in '
                     f'{len(ways)} ways ({sorted(ways)}): give them the same')
  if found and config.data.augment:
    raise ValueError(
        f'data.augment={config.data.augment!r}: {next(iter(found))} tells rows '
        'apart by their content, which augmentation changes from epoch to '
        "epoch; expected ''")


# ---------------------------------------------------------------- two parts
def hash_rows(batch):
  """A hash of every row's content: {name: [B, ...]} -> uint32 [B]."""
  total = jnp.uint32(0)
  for name, value in batch.items():
    bits = _bits(value).reshape(len(value), -1)
    place = jnp.arange(bits.shape[1], dtype=jnp.uint32)
    place = _mix(place + np.uint32(zlib.crc32(name.encode())))
    total += _mix(bits ^ place).sum(1, dtype=jnp.uint32)
  return _mix(total)


def _bits(v):
  """Numbers as unsigned ones, floats by their bits."""
  if jnp.issubdtype(v.dtype, jnp.floating):
    size = 8 * min(v.dtype.itemsize, 4)  # doubles are two words each
    v = jax.lax.bitcast_convert_type(v, f'uint{size}')
  return v.astype(jnp.uint32)


def _mix(h):
  """A bijection of uint32s in which every bit depends on all (MurmurHash3)."""
  h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


def first_part(batch, share):
  """Which rows are in D1: bool [B], about `share` of them."""
  return hash_rows(batch) < np.uint32(share * 2 ** 32)


def on_rows(loss, weight, rows):
  """A task's (loss [B], weight [B] or None), of the rows of a part alone."""
  weight = jnp.ones_like(loss) if weight is None else weight
  return jnp.where(rows, loss, 0), jnp.where(rows, weight, 0)


# ---------------------------------------------------------------- gradients
def gradients(first, second, w, a, step, form):
  """The gradient of w on D1 and the hypergradient of a.

  Args:
    first: `(w, a) -> (L1, aux)`.
    second: `(w, a) -> L2`.
    w, a: Trees of arrays.
    step, form: As of `Outer`.

  Returns:
    ((L1, aux), gradient like w, hypergradient like a), all at (w, a).
  """
  move = lambda by, g: jax.tree.map(lambda v, d: v + by * d, w, g)
  inner = jax.value_and_grad(first, has_aux=True)
  if form == 'exact':
    def unrolled(a):
      value, g = inner(w, a)
      return second(move(-step, g), a), (value, g)

    hyper, (value, g) = jax.grad(unrolled, has_aux=True)(a)
    return value, g, hyper
  value, g = inner(w, a)
  v, direct = jax.grad(second, (0, 1))(move(-step, g), a)
  size = 0.01 / jnp.maximum(optax.tree.norm(v), 1e-12)  # v may be 0
  beside = [jax.grad(lambda a, by=by: first(move(by, v), a)[0])(a)
            for by in (size, -size)]
  return value, g, jax.tree.map(
      lambda d, more, less: d - step * (more - less) / (2 * size),
      direct, *beside)


def value_and_grad(loss_fn, methods):
  """`jax.value_and_grad` of a step's loss; outer leaves get hypergradients.

  Args:
    loss_fn: `(trained, frozen, params, batch, rng, step, rows) -> (loss, out)`;
      rows, bool [B], are those that count, None: all.
    methods: As given to `init`.

  Returns:
    `(trained, frozen, params, batch, rng, step) -> ((loss, out), gradients)`.
    With outer leaves the loss is that of D1; out is of the whole batch.
  """
  named = as_methods(methods)
  way = next((m.outer for m in named.values() if m.outer), None)
  if way is None:
    return jax.value_and_grad(loss_fn, has_aux=True)

  def parts(trained):
    """(w, a), both with all methods and paths."""
    pick = lambda wanted: {
        name: {path: {leaf: v for leaf, v in t.items()
                      if (leaf in _leaves(named[name])) == wanted}
               for path, t in by_path.items()}
        for name, by_path in trained.items()}
    return pick(False), pick(True)

  def fn(trained, frozen, params, batch, rng, step):
    rows = first_part(batch, way.share)

    def of(rows):
      return lambda w, a: loss_fn(
          theta_lib.combine(w, a), frozen, params, batch, rng, step, rows)

    value, g, hyper = gradients(
        of(rows), lambda w, a: of(~rows)(w, a)[0], *parts(trained), way.step,
        way.form)
    return value, theta_lib.combine(g, hyper)

  return fn


def _leaves(method):
  return method.outer.leaves if method.outer else ()
