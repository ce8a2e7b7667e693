"""Vision transformer with hook methods.

Pre-norm blocks, no class token: the head reads the mean over tokens. Positions
are learned, from sines and cosines as their start. Letters: B batch, T tokens,
d width, H heads.

Four ordinary methods are places where a fine-tuning method can step in,
because `nn.intercept_methods` sees every method of every module:

  ViT.embed(images) -> tokens          after patches and positions
  Attention.attend(q, k, v, mask)      one attention read
  Block.join(u, x, a, which)           residual stream, sub-layer in and out
  ViT.readout(h, mask) -> features     tokens to one vector an image

Source: "An Image is Worth 16x16 Words: Transformers for Image Recognition at
Scale" (Dosovitskiy et al., arXiv 2010.11929). Mean over tokens and sines and
cosines for the positions are those of "Better plain ViT baselines for
ImageNet-1k" (Beyer et al., arXiv 2205.01580), where they stay fixed. A small
random start instead is drowned out by the patches and slows the learning of
shapes down. No dropout.
"""

import functools
import math
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp


class Attention(nn.Module):
  """Multi-head attention, u [B, T, d] -> [B, T, d]."""

  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask=None):
    d = x.shape[-1]
    if d % self.heads:
      raise ValueError(
          f'width {d} cannot be split into {self.heads} heads; choose heads '
          f'out of {[h for h in range(1, d + 1) if d % h == 0]}')
    dense = functools.partial(nn.Dense, d, dtype=self.dtype)
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, d // self.heads)
    q, k, v = (split(dense(name=n)(x)) for n in ('query', 'key', 'value'))
    y = self.attend(q, k, v, mask)
    return dense(name='out')(y.reshape(x.shape))

  def attend(self, q, k, v, mask=None):
    """Attention read: q [B, T, H, hd], k and v [B, S, H, hd] -> like q.

    mask: booleans that broadcast to [B, H, T, S], True where a query may
    look; None lets every query look everywhere.
    """
    # Softmax in float32: in bfloat16 its sums lose the small weights.
    s = jnp.einsum('bthd,bshd->bhts', q / math.sqrt(q.shape[-1]), k,
                   preferred_element_type=jnp.float32)
    if mask is not None:
      s = jnp.where(mask, s, jnp.finfo(s.dtype).min)
    w = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    return jnp.einsum('bhts,bshd->bthd', w, v)


class Mlp(nn.Module):
  """Two-layer perceptron over the last axis, [B, T, d] -> [B, T, d]."""

  dim: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    h = nn.Dense(self.dim, dtype=self.dtype, name='up')(x)
    h = nn.gelu(h, approximate=True)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name='down')(h)


class Block(nn.Module):
  """Pre-norm transformer block, u [B, T, d] -> (u, None), as nn.scan wants."""

  heads: int
  mlp_dim: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, u, mask=None):
    x = nn.LayerNorm(dtype=self.dtype, name='norm1')(u)
    a = Attention(self.heads, self.dtype, name='attn')(x, mask)
    u = self.join(u, x, a, 'attn')
    x = nn.LayerNorm(dtype=self.dtype, name='norm2')(u)
    a = Mlp(self.mlp_dim, self.dtype, name='mlp')(x)
    return self.join(u, x, a, 'mlp'), None

  def join(self, u, x, a, which):
    """Residual join of stream u, sub-layer input x and output a [B, T, d].

    which: 'attn' or 'mlp', the sub-layer that made a.
    """
    del x, which  # For interceptors: parallel adapters read them.
    return u + a


def sine_positions(rows, columns, d):
  """Sines and cosines of a grid's coordinates, [1, rows * columns, d]."""
  n = -(-d // 4)  # Frequencies; what is over d is cut off below.
  angle = 10_000. ** (-jnp.arange(n) / n)
  y, x = jnp.mgrid[:rows, :columns].reshape(2, -1, 1) * angle
  pos = [jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)]
  return jnp.concatenate(pos, axis=-1)[None, :, :d]


class ViT(nn.Module):
  """Vision transformer, images [B, H, W, 3] -> logits [B, classes].

  Attributes:
    classes: outputs of the head, whose kernel starts at zero.
    width: d.
    depth: number of blocks.
    heads: attention heads; must divide width.
    mlp_dim: hidden width of the perceptrons.
    patch: side of a patch in pixels; must divide H and W.
    dtype: of the computation. Parameters, softmax and logits are float32.
    scan: stack the blocks into one scanned module 'blocks' instead of
      'block_0', 'block_1', ...: faster to compile.
    remat: recompute the blocks in the backward pass: less memory.
  """

  classes: int = 10
  width: int = 192
  depth: int = 6
  heads: int = 3
  mlp_dim: int = 768
  patch: int = 4
  dtype: Any = jnp.float32
  scan: bool = False
  remat: bool = False

  def setup(self):
    # Under scan the loop itself keeps XLA from merging the recomputation.
    block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
    args = (self.heads, self.mlp_dim, self.dtype)
    if self.scan:
      self.blocks = nn.scan(
          block, variable_axes={'params': 0, 'aux': 0},
          split_rngs={'params': True, 'dropout': True}, length=self.depth,
          in_axes=nn.broadcast)(*args)
    else:
      self.block = [block(*args) for _ in range(self.depth)]  # block_0, ...
    self.norm = nn.LayerNorm(dtype=self.dtype)
    self.head = nn.Dense(self.classes, kernel_init=nn.initializers.zeros)

  def __call__(self, images):
    return self.head(self.features(images))

  def features(self, images, mask: Optional[jax.Array] = None):
    """Images [B, H, W, 3] -> features [B, d], what the head reads.

    mask: [B, T] booleans, False for tokens that nothing may look at.
    """
    u = self.embed(images)
    pairs = None if mask is None else mask[:, None, None, :]
    if self.scan:
      u, _ = self.blocks(u, pairs)
    else:
      for block in self.block:
        u, _ = block(u, pairs)
    return self.readout(self.norm(u), mask)

  @nn.compact
  def embed(self, images):
    """Images [B, H, W, 3] -> tokens [B, T, d], positions added."""
    if images.ndim != 4 or images.shape[-1] != 3:
      raise ValueError(
          f'images of shape {images.shape}: expected [B, H, W, 3]')
    for side in images.shape[1:3]:
      if side % self.patch:
        raise ValueError(
            f'image side {side} is no multiple of the patch {self.patch}; '
            f'nearest: {side // self.patch * self.patch} or '
            f'{(side // self.patch + 1) * self.patch}')
    x = nn.Conv(self.width, (self.patch,) * 2, (self.patch,) * 2, 'VALID',
                dtype=self.dtype, name='patch')(images)
    init = lambda key, *shape: sine_positions(*shape)
    pos = self.param('pos', init, *x.shape[1:])
    return x.reshape(x.shape[0], -1, self.width) + pos.astype(x.dtype)

  def readout(self, h, mask=None):
    """Mean over tokens: h [B, T, d], mask [B, T] or None -> [B, d]."""
    h = h.astype(jnp.float32)
    if mask is None:
      return h.mean(axis=1)
    w = mask.astype(h.dtype)[..., None]
    return (h * w).sum(axis=1) / jnp.maximum(w.sum(axis=1), 1.)
