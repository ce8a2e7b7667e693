"""Generation with an adapted encoder-decoder: greedy, or by temperature.

  run = jax.jit(functools.partial(
      generate_encdec, model, methods, length=32, start=0, stop=(1,)))
  tokens = run(params, theta, ids, mask)

The source is encoded once, and each further token costs one step of the
decoder on a cache. Everything runs through `apply`, so every method acts as in
training; hooks on `embed_targets` act on the first call alone.
"""

import jax
import jax.numpy as jnp

from peftjax.apply import apply


def generate_encdec(model, methods, params, theta, ids, mask=None, rng=None, *,
                    length, start=0, stop=(1,), pad=0, temperature=0.):
  """Generates target tokens; jit it with what is not an array fixed.

  Args:
    model: A `models.encdec.EncDec` with head 'lm'.
    methods: As given to `init`; () with theta {} for the base alone.
    params, theta: Of the base and of the methods.
    ids: [B, T] integers, the source.
    mask: [B, T] booleans or 0/1, True for real tokens; None: all are.
    rng: Key for sampling; needed with a temperature.
    length: Number of tokens to generate, the stop token included.
    start: Id that the decoder begins with; it is not returned.
    stop: Ids that end a text.
    pad: Id behind the end of a text.
    temperature: 0: the most likely token; else tokens are drawn from the
      softmax of logits / temperature.

  Returns:
    [B, length] integers.

  Raises:
    ValueError: head, length, temperature or rng that do not fit.
  """
  if model.head != 'lm':
    raise ValueError(f"head={model.head!r}: generation needs head 'lm'")
  if length < 1:
    raise ValueError(f'length={length}: expected at least 1')
  if temperature < 0 or (temperature and rng is None):
    raise ValueError(f'temperature={temperature}, rng={rng}: expected 0, or '
                     'more than 0 and a key')
  rng = jax.random.key(0) if rng is None else rng  # unused when greedy
  stop = jnp.asarray(tuple(stop), jnp.int32)
  run = lambda method, *args, **kwargs: apply(
      model, methods, params, theta, *args, method=method, **kwargs)[0]

  def pick(logits, i):
    if not temperature:
      return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
    return jax.random.categorical(
        jax.random.fold_in(rng, i), logits[:, -1] / temperature).astype(
            jnp.int32)

  def put(tokens, done, new, i):
    new = jnp.where(done, pad, new)
    return tokens.at[:, i].set(new), done | jnp.isin(new, stop), new

  def step(state):
    i, tokens, done, last, cache = state
    logits, cache = run('decode', last[:, None], None, mask, cache=cache)
    tokens, done, last = put(tokens, done, pick(logits, i), i)
    return i + 1, tokens, done, last, cache

  encoded = run('encode', ids, mask)
  first = jnp.full((ids.shape[0], 1), start, jnp.int32)
  logits, cache = run('decode', first, encoded, mask, cache=length - 1)
  tokens, done, last = put(
      jnp.full((ids.shape[0], length), pad, jnp.int32),
      jnp.zeros(ids.shape[0], bool), pick(logits, 0), 0)
  more = lambda state: (state[0] < length) & ~state[2].all()
  return jax.lax.while_loop(
      more, step, (jnp.asarray(1), tokens, done, last, cache))[1]
