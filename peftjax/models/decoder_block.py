"""One layer of a decoder: causal attention, rotary positions, the block.

Letters: B batch, T new tokens, S keys (cached and new), H heads, K key-value
heads, h head width, d model width. Sources: see `peftjax.models.decoder`.
"""

import functools
import math
from typing import Any, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftjax.method import nearest
from peftjax.models import layers
from peftjax.models import moe


class Look(NamedTuple):
  """What all layers share in one call.

  mask: [B, 1, T, S], True where a query may look, windows left out.
  ahead: [B, 1, T, S] positions from key to query, or None without windows.
  turn: Angles of the new tokens, as `layers.turns` has them; None where
    positions are learned.
  start: Scalar, the slot of the first new token.
  """

  mask: jax.Array
  ahead: Optional[jax.Array]
  turn: Optional[tuple]
  start: Any


def frequencies(width, theta=10_000., scaling=None):
  """Radians a position of each pair of a head, [width / 2], numpy float32.

  Args:
    width: h, even.
    theta: Base of the geometric series.
    scaling: None; or a mapping by the names that checkpoints' config files use:
      rope_type 'default', 'linear' (factor) or 'llama3' (factor,
      low_freq_factor, high_freq_factor, original_max_position_embeddings).
  """
  f = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
  kind = scaling.get('rope_type') if scaling else 'default'
  if kind == 'linear':
    f = f / scaling['factor']
  elif kind == 'llama3':
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    turns = scaling['original_max_position_embeddings'] * f / (2 * math.pi)
    # 0 for waves too long for the first context, 1 for short ones.
    keep = np.clip((turns - low) / (high - low), 0., 1.)
    f = (1 - keep) * f / scaling['factor'] + keep * f
  elif kind != 'default':
    raise ValueError(f'rope_scaling: rope_type {kind!r}'
                     f'{nearest(kind, ("default", "linear", "llama3"))}')
  return f.astype(np.float32)


def attributes(cls, module):
  """{name: value} of those attributes of `cls` that `module` has too."""
  names = set(cls.__dataclass_fields__) - {'parent', 'name'}
  return {n: getattr(module, n) for n in names & set(vars(module))}


def norm_layer(module, name=None):
  """The norm that `module`'s attributes ask for."""
  if module.norm == 'layer':
    return nn.LayerNorm(module.norm_eps, dtype=module.dtype, name=name)
  return layers.RMSNorm(
      module.norm_eps, module.norm_offset, module.dtype, name=name)


class Attention(nn.Module):
  """Causal attention, [B, T, d] -> ([B, T, d], (keys, values) [B, T, K, h])."""

  heads: int
  kv_heads: int
  head_dim: int
  fused_qkv: bool
  qkv_bias: bool
  out_bias: bool
  qk_norm: bool
  scale: Optional[float]
  softcap: Optional[float]
  norm: str
  norm_eps: float
  norm_offset: float
  dtype: Any

  @nn.compact
  def __call__(self, x, look, window=None, past=None):
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    each = [n * self.head_dim for n in (self.heads, *[self.kv_heads] * 2)]
    if self.fused_qkv:
      y = dense(sum(each), self.qkv_bias, name='qkv')(x)
      q, k, v = jnp.split(y, np.cumsum(each)[:2], axis=-1)
    else:
      q, k, v = (dense(n, self.qkv_bias, name=name)(x) for n, name in
                 zip(each, ('query', 'key', 'value')))
    q, k, v = (a.reshape(*a.shape[:-1], -1, self.head_dim) for a in (q, k, v))
    if self.qk_norm:
      q, k = norm_layer(self, 'query_norm')(q), norm_layer(self, 'key_norm')(k)
    if look.turn is not None:
      q, k = (layers.rotary(a, look.turn) for a in (q, k))
    new = (k, v)
    if past is not None:
      k, v = (jax.lax.dynamic_update_slice_in_dim(
          old, a.astype(old.dtype), look.start, axis=1)
              for old, a in zip(past, new))
    mask = look.mask
    if window is not None:
      mask = mask & (look.ahead < window)
    y = self.attend(q, k, v, mask)
    y = y.reshape(*y.shape[:2], -1)
    return dense(x.shape[-1], self.out_bias, name='out')(y), new

  def attend(self, q, k, v, mask):
    """Attention read: q [B, T, H, h], k and v [B, S, K, h] -> like q.

    mask: Booleans that broadcast to [B, H, T, S], True where a query may look.
    """
    return layers.attention(
        q, k, v, mask, scale=self.scale, softcap=self.softcap)


class Block(nn.Module):
  """One layer: stream u [B, T, d] -> (u, new keys and values or None)."""

  heads: int
  kv_heads: int
  head_dim: int
  mlp_dim: int
  activation: str
  gated: bool
  mlp_bias: bool
  fused_qkv: bool
  qkv_bias: bool
  out_bias: bool
  qk_norm: bool
  scale: Optional[float]
  softcap: Optional[float]
  norm: str
  norm_eps: float
  norm_offset: float
  post_norms: bool
  experts: int
  experts_per_token: int
  normalise_gates: bool
  shared_dim: int
  dtype: Any

  @nn.compact
  def __call__(self, u, window, past, look):
    x = norm_layer(self, 'norm1')(u)
    a, new = Attention(**attributes(Attention, self), name='attn')(
        x, look, window, past)
    if self.post_norms:
      a = norm_layer(self, 'post_norm1')(a)
    u = self.join(u, x, a, 'attn')
    x = norm_layer(self, 'norm2')(u)
    mlp = moe.Mixture if self.experts else moe.Mlp
    a = mlp(**attributes(mlp, self), name='mlp')(x)
    if self.post_norms:
      a = norm_layer(self, 'post_norm2')(a)
    return self.join(u, x, a, 'mlp'), None if past is None else new

  def join(self, u, x, a, which):
    """Residual join of stream u, sub-layer input x and output a [B, T, d].

    which: 'attn' or 'mlp', the sub-layer that made a.
    """
    del x, which  # For interceptors: parallel adapters read them.
    return u + a
