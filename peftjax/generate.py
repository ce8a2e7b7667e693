"""Text generation, with a model adapted or not: prefill, then one loop.

The prompt runs once and fills the cache of keys and values; a
`jax.lax.while_loop` adds one token at a time. Both go through `peftjax.apply`,
so every method acts here as it does in training: a prompt method steps in at
the prefill alone (cached steps do not call `embed`), a prefix method at every
attention read. An encoder-decoder encodes the prompt, and its decoder begins
with a start token.

Top-p sampling is from "The Curious Case of Neural Text Degeneration" (Holtzman
et al., arXiv 1904.09751).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.apply import apply
from peftjax.method import Method


class _Static:
  """Objects that a compiled function belongs to, compared by identity.

  A method holds functions and mappings, which have no hash.
  """

  def __init__(self, *parts):
    self.parts = parts

  def __hash__(self):
    return hash(tuple(map(id, self.parts)))

  def __eq__(self, other):
    return len(self.parts) == len(other.parts) and all(
        a is b for a, b in zip(self.parts, other.parts))


def generate(model, params, ids, mask=None, max_new_tokens=32, methods=(),
             theta=None, temperature=0., top_p=1., stop_tokens=(), pad=0,
             rng=None, batch=None, start=None):
  """Continues prompts, or answers them with an encoder-decoder.

  Compiled once for a model, a tuple of methods and shapes; temperature, top_p
  and the prompts may change.

  Args:
    model: A `models.decoder.Decoder` or `models.encdec.EncDec` with head 'lm'.
    params: Its params tree.
    ids: [B, T] integers, the prompts.
    mask: [B, T], True for real tokens; shorter prompts are padded, on either
      side. None: all are real.
    max_new_tokens: N.
    methods, theta: As given to `peftjax.apply`.
    temperature: Of the softmax; 0 takes the most probable token.
    top_p: Samples among the most probable tokens that together reach this
      probability.
    stop_tokens: Ids at which a row ends; the stop token is part of the output.
    pad: What follows it.
    rng: Key for sampling; needed where temperature > 0.
    batch: Side inputs of methods.
    start: Id that the decoder of an encoder-decoder begins with; None: 0.

  Returns:
    [B, N] int32, the new tokens alone.

  Raises:
    ValueError: a value out of range, a prompt without a token, or more tokens
      than the model has learned positions.
  """
  if getattr(model, 'head', None) != 'lm':
    raise ValueError(f"head={getattr(model, 'head', None)!r}: generation needs "
                     "a decoder or encoder-decoder with head='lm'")
  if start is not None and not hasattr(model, 'encode'):
    raise ValueError(f'start={start}: only an encoder-decoder has a start '
                     'token; a decoder begins with its prompt')
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens={max_new_tokens}: expected 1 or more')
  if temperature < 0:
    raise ValueError(f'temperature={temperature}: expected 0 or more')
  if not 0 < top_p <= 1:
    raise ValueError(f'top_p={top_p}: expected more than 0, at most 1')
  if temperature > 0 and rng is None:
    raise ValueError(f'temperature={temperature} samples: give rng, a key')
  ids = jnp.asarray(ids, jnp.int32)
  if ids.ndim != 2 or not ids.size:
    raise ValueError(f'ids of shape {ids.shape}: expected [B, T], not empty')
  if mask is None:
    mask = np.ones(ids.shape, bool)
  empty = np.flatnonzero(~np.asarray(mask).astype(bool).any(axis=1))
  if empty.size:
    raise ValueError(f'rows {empty.tolist()} of mask hold no real token')
  methods = (methods,) if isinstance(methods, Method) else tuple(methods)
  return _run(
      _Static(model, *methods), max_new_tokens, temperature > 0, top_p < 1,
      params, theta or {}, ids, jnp.asarray(mask, bool),
      jnp.float32(temperature), jnp.float32(top_p),
      jnp.asarray(stop_tokens, jnp.int32).reshape(-1), jnp.int32(pad),
      jax.random.key(0) if rng is None else rng, batch, jnp.int32(start or 0))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(static, n, sampled, cut, params, theta, ids, mask, temperature, top_p,
         stop_tokens, pad, rng, batch, start):
  """The compiled part of `generate`."""
  model, *methods = static.parts
  rows = len(ids)
  run = lambda *args, **kwargs: apply(
      model, methods, params, theta, *args, batch=batch, **kwargs)[0]
  two = hasattr(model, 'encode')

  def prefill():
    """Logits [B, V] after the prompt, and the cache."""
    # The last token is never fed back.
    if two:
      encoded = run(ids, mask, method='encode')
      first = jnp.full((rows, 1), start)
      logits, cache = run(first, encoded, mask, cache=n - 1, method='decode')
      return logits[:, 0], cache
    logits, cache = run(ids, mask, cache=n - 1)
    last = jnp.max(jnp.arange(ids.shape[1]) * mask, axis=1)
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], cache

  def forward(token, cache):
    if two:
      return run(token, None, mask, cache=cache, method='decode')
    return run(token, cache=cache, partial=True)

  def pick(logits, i):
    if not sampled:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if cut:
      logits = nucleus(logits, top_p)
    key = jax.random.fold_in(rng, i)
    return jax.random.categorical(key, logits).astype(jnp.int32)

  def add(state, logits, i):
    """State with the i-th token, drawn from `logits` [B, V]."""
    out, done, _ = state
    token = jnp.where(done, pad, pick(logits, i))
    return (out.at[:, i].set(token), done | jnp.isin(token, stop_tokens), token)

  def body(carry):
    i, cache, state = carry
    logits, cache = forward(state[-1][:, None], cache)
    return i + 1, cache, add(state, logits[:, 0], i)

  def unfinished(carry):
    i, _, (_, done, _) = carry
    return (i < n) & ~done.all()

  logits, cache = prefill()
  state = (jnp.full((rows, n), pad), jnp.zeros(rows, bool),
           jnp.zeros(rows, jnp.int32))
  state = add(state, logits, 0)
  carry = jax.lax.while_loop(unfinished, body, (1, cache, state))
  return carry[-1][0]


def nucleus(logits, top_p):
  """Logits [..., V] with -inf outside the smallest set that reaches top_p.

  The most probable token always stays; of equal ones, all or none.
  """
  order = jnp.sort(logits, axis=-1)[..., ::-1]
  p = jax.nn.softmax(order, axis=-1)
  inside = jnp.cumsum(p, axis=-1) - p < top_p  # What stands before is short.
  least = jnp.min(jnp.where(inside, order, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= least, logits, -jnp.inf)
