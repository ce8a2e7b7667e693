"""Blocks of encoder-decoder transformers, and their biases by distance.

Letters: B batch, T queries, S keys, H heads, h head width, d model width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftjax.models import layers


def buckets(distance, count, furthest, both):
  """Buckets of key position minus query position: integers, like `distance`.

  Half of the buckets of a direction hold one distance each, the others grow
  with its logarithm up to `furthest`; what is further is in the last.

  Args:
    distance: Integers of any shape.
    count: Number of buckets.
    furthest: Distance where the last bucket begins.
    both: Keys after the query have buckets of their own, half of all; else
      they share the one of distance 0.
  """
  half = count // 2 if both else count
  exact = half // 2
  # A table in float32, as the released code rounds: no logarithm at run time.
  n = np.arange(furthest + 1)
  far = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(exact))
  far = far / np.float32(np.log(furthest / exact)) * np.float32(half - exact)
  far = np.minimum(exact + far.astype(np.int32), half - 1)
  table = jnp.asarray(np.where(n < exact, n, far), jnp.int32)
  back = jnp.abs(distance) if both else jnp.maximum(-distance, 0)
  out = table[jnp.minimum(back, furthest)]
  return out + jnp.where(distance > 0, half, 0) if both else out


class DistanceBias(nn.Module):
  """Biases of attention scores by distance, -> [1, H, T, S], float32."""

  heads: int
  count: int
  furthest: int
  both: bool
  width: int

  @nn.compact
  def __call__(self, queries, keys):
    """queries [T], keys [S]: their positions."""
    keys = self.reach(keys)
    table = self.param('table', nn.initializers.normal(self.width ** -0.5),
                       (self.count, self.heads))
    at = buckets(keys[None, :] - queries[:, None], self.count, self.furthest,
                 self.both)
    return table.astype(jnp.float32)[at].transpose(2, 0, 1)[None]

  def reach(self, keys):
    """Positions [S] of the keys, from 0; prefixes put theirs in front."""
    return keys


class Attention(nn.Module):
  """Attention of x [B, T, d] to source [B, S, d] -> ([B, T, d], (k, v))."""

  heads: int
  head_dim: int
  dtype: Any

  @nn.compact
  def __call__(self, x, source, mask=None, bias=None, past=None, start=0):
    """One attention layer.

    Args:
      x: [B, T, d].
      source: What keys and values are made of, x itself in self-attention;
        None: they are `past`.
      mask, bias: As for `attend`.
      past: Keys and values of earlier calls, [B, S, H, h] each; new ones are
        written into them from slot `start` on.
      start: Scalar.

    Returns:
      ([B, T, d], (k, v) that were attended to).
    """
    d, inner = x.shape[-1], self.heads * self.head_dim
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, self.head_dim)

    def dense(name, features, std):
      return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name,
                      kernel_init=nn.initializers.normal(std))

    # Scores are unscaled, so queries start smaller by the root of h.
    q = split(dense('query', inner, (d * self.head_dim) ** -0.5)(x))
    if source is None:
      k, v = past
    else:
      k, v = (split(dense(n, inner, d ** -0.5)(source))
              for n in ('key', 'value'))
      if past is not None:
        k, v = (jax.lax.dynamic_update_slice_in_dim(
            old, new.astype(old.dtype), start, axis=1)
                for old, new in zip(past, (k, v)))
    # By keyword: interceptors that replace k, v and mask leave it as it is.
    y = self.attend(q, k, v, mask, bias=bias)
    y = y.reshape(*y.shape[:2], inner)
    return dense('out', d, inner ** -0.5)(y), (k, v)

  def attend(self, q, k, v, mask=None, bias=None):
    """Attention read: q [B, T, H, h], k and v [B, S, H, h] -> like q.

    mask: Booleans that broadcast to [B, H, T, S], True where a query may look.
    bias: [1, H, T, S] of the scores, or None. What is put in front of the keys
      has one only where `DistanceBias.reach` knows of it.
    """
    return layers.attention(q, k, v, mask, bias, scale=1.)


class Mlp(nn.Module):
  """Perceptron over the last axis, [B, T, d] -> [B, T, d]."""

  dim: int
  act: str
  gated: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    def dense(name, features, std):
      return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name,
                      kernel_init=nn.initializers.normal(std))

    d, act = x.shape[-1], layers.activation(self.act)
    h = dense('up', self.dim, d ** -0.5)(x)
    h = act(dense('gate', self.dim, d ** -0.5)(x)) * h if self.gated else act(h)
    return dense('down', d, self.dim ** -0.5)(h)


class Block(nn.Module):
  """One layer of either stack: u [B, T, d] -> (u, keys and values or None)."""

  heads: int
  head_dim: int
  mlp_dim: int
  act: str
  gated: bool
  cross: bool  # attends to an encoded source too
  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, u, past, encoded, mask, bias, source_mask, start):
    """past: None, or {'self': (k, v)} and, after the first call, 'cross'."""
    norm = functools.partial(layers.RMSNorm, self.eps, dtype=self.dtype)
    read = functools.partial(Attention, self.heads, self.head_dim, self.dtype)
    past, new = past or {}, {}
    x = norm(name='norm1')(u)
    a, new['self'] = read(name='attn')(
        x, x, mask, bias, past.get('self'), start)
    u = self.join(u, x, a, 'attn')
    if self.cross:
      x = norm(name='cross_norm')(u)
      a, new['cross'] = read(name='cross_attn')(
          x, encoded, source_mask, None, past.get('cross'))
      u = self.join(u, x, a, 'cross_attn')
    x = norm(name='norm2')(u)
    a = Mlp(self.mlp_dim, self.act, self.gated, self.dtype, name='mlp')(x)
    return self.join(u, x, a, 'mlp'), new if past else None

  def join(self, u, x, a, which):
    """Residual join of stream u, sub-layer input x and output a [B, T, d].

    which: 'attn', 'cross_attn' or 'mlp', the sub-layer that made a.
    """
    del x, which  # For interceptors: parallel adapters read them.
    return u + a
