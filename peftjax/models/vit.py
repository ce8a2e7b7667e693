"""Vision transformers with hook methods: plain ViT, ViT, DeiT, DINOv2.

Pre-norm blocks and learned positions. Without attributes: no class token, the
head reads the mean over tokens. Letters: B batch, T tokens, d width, H heads.

             tokens               pool                  else
  plain ViT  ()                   'mean'
  ViT        ('cls',)             'class'               act 'gelu', eps 1e-12
  DeiT       ('cls', 'distilled') 'class' or 'pair'     act 'gelu', eps 1e-12
  DINOv2     ('cls',)             'class_mean'          layer_scale; gated;
                                                        registers

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
shapes down. "Training data-efficient image transformers & distillation through
attention" (DeiT, arXiv 2012.12877). "DINOv2: Learning Robust Visual Features
without Supervision" (arXiv 2304.07193); registers: "Vision Transformers Need
Registers" (arXiv 2309.16588). No dropout.
"""

import functools
import math
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftjax.models.layers import activation, attention, LayerScale
from peftjax.models.layers import run_stack, stacked

HEADS = (None, 'pool', 'classify')
# Of the learned tokens, how many each reads.
POOLS = {'mean': 0, 'class': 1, 'class_mean': 1, 'pair': 2}


class Attention(nn.Module):
  """Multi-head attention, u [B, T, d] -> [B, T, d]."""

  heads: int
  dtype: Any = jnp.float32
  qkv_bias: bool = True

  @nn.compact
  def __call__(self, x, mask=None):
    d = x.shape[-1]
    if d % self.heads:
      raise ValueError(
          f'width {d} cannot be split into {self.heads} heads; choose heads '
          f'out of {[h for h in range(1, d + 1) if d % h == 0]}')
    dense = functools.partial(nn.Dense, d, dtype=self.dtype)
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, d // self.heads)
    q, k, v = (split(dense(name=n, use_bias=self.qkv_bias)(x))
               for n in ('query', 'key', 'value'))
    y = self.attend(q, k, v, mask)
    return dense(name='out')(y.reshape(x.shape))

  def attend(self, q, k, v, mask=None):
    """Attention read: q [B, T, H, hd], k and v [B, S, H, hd] -> like q.

    mask: booleans that broadcast to [B, H, T, S], True where a query may
    look; None lets every query look everywhere.
    """
    return attention(q, k, v, mask)


class Mlp(nn.Module):
  """Two-layer perceptron over the last axis, [B, T, d] -> [B, T, d].

  gated: silu(gate) * up, one layer as checkpoints store it, not act(up).
  """

  dim: int
  dtype: Any = jnp.float32
  act: str = 'gelu_new'
  gated: bool = False

  @nn.compact
  def __call__(self, x):
    if self.gated:
      h = nn.Dense(2 * self.dim, dtype=self.dtype, name='gate_up')(x)
      gate, up = jnp.split(h, 2, axis=-1)
      h = nn.silu(gate) * up
    else:
      h = nn.Dense(self.dim, dtype=self.dtype, name='up')(x)
      h = activation(self.act)(h)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name='down')(h)


class Block(nn.Module):
  """Pre-norm transformer block, u [B, T, d] -> (u, None), as nn.scan wants.

  Attributes as in `ViT`.
  """

  heads: int
  mlp_dim: int
  dtype: Any = jnp.float32
  act: str = 'gelu_new'
  gated: bool = False
  qkv_bias: bool = True
  layer_scale: Optional[float] = None
  eps: float = 1e-6

  @nn.compact
  def __call__(self, u, mask=None):
    norm = functools.partial(nn.LayerNorm, epsilon=self.eps, dtype=self.dtype)
    x = norm(name='norm1')(u)
    a = Attention(self.heads, self.dtype, self.qkv_bias, name='attn')(x, mask)
    u = self.join(u, x, self.scaled(a, 'scale1'), 'attn')
    x = norm(name='norm2')(u)
    a = Mlp(self.mlp_dim, self.dtype, self.act, self.gated, name='mlp')(x)
    return self.join(u, x, self.scaled(a, 'scale2'), 'mlp'), None

  def scaled(self, a, name):
    if self.layer_scale is None:
      return a
    return LayerScale(self.layer_scale, self.dtype, name=name)(a)

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


def bicubic(old, new):
  """Weights [new, old] of cubic interpolation from `old` to `new` points.

  Centres of pixels as coordinates, edges repeated, a = -0.75: what checkpoints
  made for one image size are stretched by for another.
  """
  at = (np.arange(new) + 0.5) * old / new - 0.5
  first, a = np.floor(at).astype(int), -0.75
  out = np.zeros((new, old), np.float32)
  for k in range(-1, 3):
    t = np.abs(at - first - k)
    w = np.where(t <= 1, (a + 2) * t**3 - (a + 3) * t**2 + 1,
                 a * (t**3 - 5 * t**2 + 8 * t - 4))
    np.add.at(out, (np.arange(new), np.clip(first + k, 0, old - 1)), w)
  return out


class PairHead(nn.Module):
  """Mean of two linear heads, [B, 2 d] (class, distilled) -> [B, classes]."""

  classes: int

  @nn.compact
  def __call__(self, h):
    a, b = (nn.Dense(self.classes, kernel_init=nn.initializers.zeros, name=n)(x)
            for n, x in zip(('cls', 'distilled'), jnp.split(h, 2, axis=-1)))
    return (a + b) / 2


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
    head: 'classify' (logits), 'pool' (what `readout` returns) or None (all
      tokens [B, T, d] after the final norm).
    tokens: names of learned tokens before the patches, with positions.
    registers: number of learned tokens after those, without positions.
    pool: what the head reads: 'mean' over all tokens, 'class', the first token;
      'class_mean', it and the mean over patches, [B, 2 d]; 'pair', the first
      two tokens, [B, 2 d], each with a linear head of its own.
    image: (H, W) that positions are made for; images of other sizes get them
      interpolated. None: whatever the model is initialised with, and no other.
    act: activation of the perceptrons, by the name in layers.ACTIVATIONS.
    gated: silu-gated perceptrons.
    qkv_bias: query, key and value have biases.
    layer_scale: start of a trained factor a channel on what a block's
      sub-layers put out; None: no such factor.
    eps: of the norms.
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
  head: Optional[str] = 'classify'
  tokens: tuple[str, ...] = ()
  registers: int = 0
  pool: str = 'mean'
  image: Optional[tuple[int, int]] = None
  act: str = 'gelu_new'
  gated: bool = False
  qkv_bias: bool = True
  layer_scale: Optional[float] = None
  eps: float = 1e-6

  def setup(self):
    for name, value, known in (('head', self.head, HEADS),
                               ('pool', self.pool, POOLS)):
      if value not in known:
        raise ValueError(f'ViT: unknown {name} {value!r}; expected one of '
                         f'{[*known]}')
    if len(self.tokens) < POOLS[self.pool]:
      raise ValueError(f'ViT: pool {self.pool!r} reads {POOLS[self.pool]} '
                       f'learned tokens, and there are {self.tokens}')
    blocks = stacked(functools.partial(
        Block, self.heads, self.mlp_dim, self.dtype, self.act, self.gated,
        self.qkv_bias, self.layer_scale, self.eps), self.depth, self.scan,
                     self.remat, inputs=(nn.broadcast,))
    if self.scan:
      self.blocks = blocks
    else:
      self.block = blocks  # block_0, block_1, ...
    self.norm = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    if self.head == 'classify':
      self.classifier = PairHead(self.classes, name='head') if (
          self.pool == 'pair') else nn.Dense(
              self.classes, kernel_init=nn.initializers.zeros, name='head')

  def __call__(self, images):
    if self.head is None:
      return self.hidden(images)
    h = self.features(images)
    return self.classifier(h) if self.head == 'classify' else h

  def features(self, images, mask: Optional[jax.Array] = None):
    """Images [B, H, W, 3] -> features [B, d or 2 d], what the head reads.

    mask: [B, T] booleans, False for tokens that nothing may look at.
    """
    return self.readout(self.hidden(images, mask), mask)

  def hidden(self, images, mask=None):
    """Images [B, H, W, 3] -> tokens [B, T, d] after the final norm."""
    pairs = None if mask is None else mask[:, None, None, :]
    u, _ = run_stack(self.blocks if self.scan else self.block,
                     self.embed(images), pairs, inputs=(nn.broadcast,))
    return self.norm(u)

  @nn.compact
  def embed(self, images):
    """Images [B, H, W, 3] -> tokens [B, T, d], positions added.

    T: self.tokens, registers, and the patches row by row.
    """
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
    pos = self.positions(x.shape[1:3], images.shape[1:3]).astype(x.dtype)
    x = x.reshape(x.shape[0], -1, self.width)
    n, start = len(self.tokens), nn.initializers.normal(0.02)
    x = x + pos[:, n:]
    counts = dict.fromkeys(self.tokens, 1)
    if self.registers:
      counts['registers'] = self.registers
    before = [self.param(name, start, (1, m, self.width))
              for name, m in counts.items()]
    if not before:
      return x
    before = jnp.concatenate(before, axis=1).astype(x.dtype)
    before = before.at[:, :n].add(pos[:, :n])
    before = jnp.broadcast_to(before, (x.shape[0], *before.shape[1:]))
    return jnp.concatenate([before, x], axis=1)

  def positions(self, grid, size):
    """Positions [1, n + rows * columns, d] of n tokens and a grid of patches.

    size: of the images in pixels, for the message.
    """
    n = len(self.tokens)
    own = tuple(s // self.patch for s in self.image) if self.image else grid
    if not self.image and self.has_variable('params', 'pos'):
      there = self.get_variable('params', 'pos').shape[1] - n
      if there != grid[0] * grid[1]:
        side = math.isqrt(there) * self.patch
        raise ValueError(
            f'images of {size[0]} x {size[1]} pixels have {grid[0] * grid[1]} '
            f'patches, and the positions are for {there}; nearest: {side} x '
            f'{side}')
    init = lambda key: jnp.pad(
        sine_positions(*own, self.width), ((0, 0), (n, 0), (0, 0)))
    pos = self.param('pos', init)
    if own == tuple(grid):
      return pos
    y, x = (bicubic(a, b) for a, b in zip(own, grid))
    patches = pos[:, n:].reshape(1, *own, self.width)
    patches = jnp.einsum('yr,xc,brcd->byxd', y, x, patches)
    return jnp.concatenate(
        [pos[:, :n], patches.reshape(1, -1, self.width)], axis=1)

  def readout(self, h, mask=None):
    """Tokens h [B, T, d], mask [B, T] or None -> [B, d or 2 d], as `pool`."""
    h = h.astype(jnp.float32)
    first = {'mean': (), 'pair': (h[:, 0], h[:, 1])}.get(self.pool, (h[:, 0],))
    if self.pool.endswith('mean'):
      skip = len(self.tokens) + self.registers if first else 0
      h, mask = h[:, skip:], None if mask is None else mask[:, skip:]
      if mask is None:
        first = (*first, h.mean(axis=1))
      else:
        w = mask.astype(h.dtype)[..., None]
        first = (*first, (h * w).sum(axis=1) / jnp.maximum(w.sum(axis=1), 1.))
    return jnp.concatenate(first, axis=-1)
