"""What the backbones share: attention read, norms, rotary positions, stacking.

Letters: B batch, T queries, S keys, H heads, K key-value heads, h head width,
d model width.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax.method import nearest


def quick_gelu(x):
  """x sigmoid(1.702 x), CLIP's."""
  return x * jax.nn.sigmoid(1.702 * x)


@jax.custom_jvp
def gelu(x):
  """x Phi(x), Phi the normal distribution's; at least in float32 inside.

  By erf, not by erfc as `jax.nn.gelu`, which costs XLA's CPU backend more; 1e-6
  apart at most.
  """
  return _gelu(x)[0].astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  y, slope = _gelu(x)  # the slope is all that the way back needs
  return y.astype(x.dtype), dx * slope.astype(x.dtype)


def _gelu(x):
  """(gelu, its derivative), not below float32."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  share = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
  density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
  return x * share, share + x * density


# By the names that checkpoints' config files use.
ACTIVATIONS = {
    'gelu': gelu,
    'gelu_new': jax.nn.gelu,
    'gelu_pytorch_tanh': jax.nn.gelu,
    'quick_gelu': quick_gelu,
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
    'swish': jax.nn.silu,
    'tanh': jnp.tanh,
}


def activation(name):
  """The function of that name; an unknown one is a ValueError."""
  if name not in ACTIVATIONS:
    raise ValueError(f'unknown activation {name!r}{nearest(name, ACTIVATIONS)}')
  return ACTIVATIONS[name]


def attention(q, k, v, mask=None, bias=None, scale=None, softcap=None):
  """Softmax attention, its scores and weights in float32.

  Args:
    q: [B, T, H, h].
    k, v: [B, S, K, h]; K divides H, and each serves H / K heads.
    mask: Booleans [..., S] that broadcast to [B, H, T, S], True where a query
      may look; None: everywhere.
    bias: Added to the scores, [..., S] as mask; None: nothing. Where mask or
      bias know fewer than S keys, a method has put the others in front: every
      query may look at these, with no bias. Where they know more, those in
      front belong to other layers.
    scale: Factor of the scores; None: 1 / sqrt(h).
    softcap: c in c tanh(scores / c), before bias and mask; None: no cap.

  Returns:
    [B, T, H, h] in v's dtype. A query that may look nowhere gets the mean of v.
  """
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  if _flash(q, k, bias, softcap):
    if mask is not None:
      mask = for_keys(mask, k.shape[1], True)
    return jax.nn.dot_product_attention(
        q, k.astype(q.dtype), v.astype(q.dtype), mask=mask, scale=scale,
        implementation='cudnn').astype(v.dtype)
  groups = q.shape[2] // k.shape[2]
  if groups > 1:
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
  # Softmax in float32: in bfloat16 its sums lose the small weights.
  s = jnp.einsum('bthd,bshd->bhts', q * jnp.asarray(scale, q.dtype), k,
                 preferred_element_type=jnp.float32)
  if softcap is not None:
    s = softcap * jnp.tanh(s / softcap)
  if bias is not None:
    s = s + for_keys(bias, k.shape[1], 0)
  if mask is not None:
    s = jnp.where(for_keys(mask, k.shape[1], True), s, jnp.finfo(s.dtype).min)
  w = jax.nn.softmax(s, axis=-1).astype(v.dtype)
  return jnp.einsum('bhts,bshd->bthd', w, v)


def _flash(q, k, bias, softcap):
  """Whether cuDNN reads attention without the scores in memory.

  On an NVIDIA GPU, in half precision alone.
  """
  return (jax.default_backend() == 'gpu' and bias is None and softcap is None
          and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128
          and q.shape[-1] % 8 == 0 and q.shape[1] % 2 == 0
          and k.shape[1] % 2 == 0 and q.shape[1] > 1)


def for_keys(x, keys, value):
  """x [..., n] with `value` in front of the n, or cut there: [..., keys]."""
  new = keys - x.shape[-1]
  if not new:
    return x
  if new < 0:  # Of a layer without the keys that others have in front.
    return x[..., -new:]
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(new, 0)], constant_values=value)


def padding_mask(mask):
  """[B, S] booleans or 0/1, True for real tokens -> [B, 1, 1, S]; None stays."""
  return None if mask is None else mask.astype(bool)[:, None, None, :]


def causal_mask(queries, keys, window=None):
  """Positions [B, T] and [B, S] -> [B, 1, T, S], True where a query may look.

  window: a query sees its own and the window - 1 positions before it.
  """
  ahead = queries[:, None, :, None] - keys[:, None, None, :]
  return (ahead >= 0) if window is None else (ahead >= 0) & (ahead < window)


def cheap(f, *args):
  """f(*args), made again on the way back rather than kept for it.

  For what takes less time to compute than to write down and read: a scanned
  stack keeps a copy of every value for every layer. Without a scan XLA sees
  both computations and keeps what it likes.
  """
  return jax.checkpoint(f, prevent_cse=False)(*args)


def _rms_norm(x, scale, eps):
  def norm(x, scale):
    y = x.astype(jnp.float32)
    return y * jax.lax.rsqrt(
        jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale

  return cheap(norm, x, scale)


class RMSNorm(nn.Module):
  """x / rms(x) * scale in float32, over the last axis.

  Attributes:
    eps: Added to the mean of squares.
    offset: Added to the stored scale: 1 for Gemma, whose scales start at 0.
    dtype: Of the result.

  Source: "Root Mean Square Layer Normalization" (arXiv 1910.07467).
  """

  eps: float = 1e-6
  offset: float = 0.
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.constant(1. - self.offset)
    scale = self.param('scale', init, (x.shape[-1],)).astype(jnp.float32)
    return _rms_norm(x, scale + self.offset, self.eps).astype(self.dtype)


class LayerScale(nn.Module):
  """x * scale over the last axis; scale starts at `start`.

  Source: "Going deeper with Image Transformers" (arXiv 2103.17239).
  """

  start: float = 1.
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.constant(self.start)
    return x * self.param('scale', init, (x.shape[-1],)).astype(self.dtype)


def turns(positions, inverse_frequency):
  """Cosines and sines of `rotary`'s angles, float32 [B, T, 1, h / 2] each.

  Args:
    positions: [B, T] or [1, T] integers.
    inverse_frequency: [h / 2], radians a position.
  """
  angle = positions[..., None].astype(jnp.float32) * inverse_frequency
  return jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]


def rotary(x, turn):
  """Rotates pairs (x[i], x[i + h/2]) by the angles of a position.

  Args:
    x: [B, T, H, h].
    turn: What `turns` returned; all layers share it.

  Returns:
    Like x; the arithmetic is in float32.

  Source: "RoFormer" (arXiv 2104.09864), with the halves of a head as pairs,
  as the checkpoints of the Llama family are stored.
  """
  cos, sin = turn
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return y.astype(x.dtype)


def stacked(block, depth, scan, remat, inputs=(), outputs=0):
  """Makes the layer stack of a backbone; call it in `setup`.

  Args:
    block: Partial of a Linen class, block() -> module, whose __call__ is
      `(u, *args) -> (u, out)`.
    depth: Number of blocks.
    scan: One scanned module with stacked parameters, else a list of modules.
    remat: Recompute blocks in the backward pass.
    inputs: For each of *args, 0 if it has a leading axis over layers, or
      nn.broadcast if all layers see the same.
    outputs: The same for out; 0 stacks.

  Returns:
    The module or the list; run it with `run_stack`.
  """
  cls, args, kwargs = block.func, block.args, block.keywords
  # Under scan the loop itself keeps XLA from merging the recomputation.
  cls = nn.remat(cls, prevent_cse=not scan) if remat else cls
  if not scan:
    return [cls(*args, **kwargs) for _ in range(depth)]
  return nn.scan(
      cls, variable_axes={'params': 0, 'aux': 0},
      split_rngs={'params': True, 'dropout': True}, length=depth,
      in_axes=tuple(inputs), out_axes=outputs)(*args, **kwargs)


def run_stack(blocks, u, *args, inputs=()):
  """Runs what `stacked` made: -> (u, outs with a leading axis over layers).

  inputs: as given to `stacked`.
  """
  if not isinstance(blocks, (list, tuple)):
    return blocks(u, *args)
  outs = []
  for i, block in enumerate(blocks):
    now = [jax.tree.map(lambda x, i=i: x[i], a) if axis == 0 else a
           for a, axis in zip(args, inputs, strict=True)]
    u, out = block(u, *now)
    outs.append(out)
  if any(jax.tree.leaves(o) for o in outs):
    return u, jax.tree.map(lambda *x: jnp.stack(x), *outs)
  return u, None
