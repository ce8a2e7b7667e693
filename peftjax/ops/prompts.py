"""Prompts and prefixes: places, checks and the networks that make them."""

import math
import numbers

import jax
import jax.numpy as jnp

LARGEST = 2**16


def check_size(method, name, value, least=1):
  """Raises unless `value` is a whole number from `least` to LARGEST."""
  if not isinstance(value, numbers.Integral) or not least <= value <= LARGEST:
    raise ValueError(f'{method}: {name}={value}: expected a whole number from '
                     f'{least} to {LARGEST}')


def _takes_ids(site):
  hook = site.hooks.get('embed')
  if not hook or not hook.inputs or hook.inputs[0] is None:
    return False
  ids = hook.inputs[0]
  return len(ids.shape) == 2 and jnp.issubdtype(ids.dtype, jnp.integer)


def model_of_text(site):
  """Default site of prompts: the model itself, which embeds token ids."""
  return site.path == '' and _takes_ids(site)


def width(method, site):
  """d of the token vectors [B, T, d] that a site's hook `embed` makes."""
  if not _takes_ids(site):
    raise ValueError(
        f'{method}: {site.path!r} ({site.kind}) has no hook embed(ids) that '
        'makes vectors of token ids, for prompts to stand before: expected an '
        'encoder, decoder or encoder-decoder of text')
  return site.hooks['embed'].output.shape[-1]


def token_table(sites):
  """{'table': path} of the embedding that a model looks its ids up in."""
  for site in sites.values():
    if site.kind == 'Embed':  # The first that is called; positions follow.
      return {'table': f'{site.path}/embedding'.lstrip('/')}
  raise ValueError('the model has no nn.Embed whose rows a prompt could start '
                   "from; use init='random'")


def in_front(prompt, u):
  """prompt [P, ...] before the tokens of u [B, T, ...]: [B, P + T, ...]."""
  prompt = jnp.broadcast_to(prompt.astype(u.dtype), (len(u), *prompt.shape))
  return jnp.concatenate([prompt, u], axis=1)


def linear(key, d_in, *d_out):
  """w [d_in, *d_out] and b [*d_out] ~ U(-1/sqrt(d_in), 1/sqrt(d_in)): torch."""
  keys, bound = jax.random.split(key), 1 / math.sqrt(d_in)
  return tuple(jax.random.uniform(k, shape, minval=-bound, maxval=bound)
               for k, shape in zip(keys, ((d_in, *d_out), d_out)))
