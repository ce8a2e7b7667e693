"""CLIP: an image and a text transformer with one embedding space.

Both towers are stacks of pre-norm blocks. The text tower looks back only and is
read at the end-of-text token; the image tower is read at its class token.
Letters: B batch, I images, N texts, T tokens, H heads, d width of a tower, p
width of the shared space.

Hooks, ordinary methods that `nn.intercept_methods` sees, in each tower
('image_tower', 'text_tower'):

  ImageTower.embed(images) -> [B, T, d]   class token, then patches; further
                                          tokens belong behind the first
  TextTower.embed(ids) -> [B, T, d]       may be made to return more tokens,
                                          before the end-of-text token
  Attention.attend(q, k, v, mask)         one attention read
  Block.join(u, x, a, which)              residual stream, sub-layer in and out
  readout(h, mask) -> [B, d]              tokens to one vector an example

Source: "Learning Transferable Visual Models From Natural Language Supervision"
(Radford et al., arXiv 2103.00020). No dropout.
"""

import functools
import math
from typing import Any, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax.models import layers


class Sizes(NamedTuple):
  """Of one tower; its heads must divide its width."""

  width: int = 512
  depth: int = 12
  heads: int = 8
  mlp_dim: int = 2048
  act: str = 'quick_gelu'
  eps: float = 1e-5


class Attention(nn.Module):
  """Multi-head attention, x [B, T, d] -> [B, T, d]."""

  sizes: Sizes
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask=None):
    d, heads, depth = x.shape[-1], self.sizes.heads, self.sizes.depth
    if d % heads:
      raise ValueError(
          f'width {d} cannot be split into {heads} heads; choose heads out of '
          f'{[h for h in range(1, d + 1) if d % h == 0]}')

    def dense(name, std):
      return nn.Dense(d, dtype=self.dtype, name=name,
                      kernel_init=nn.initializers.normal(std))

    q, k, v = (
        dense(n, (2 * d * depth) ** -0.5)(x).reshape(*x.shape[:2], heads, -1)
        for n in ('query', 'key', 'value'))
    y = self.attend(q, k, v, mask)
    return dense('out', d ** -0.5)(y.reshape(x.shape))

  def attend(self, q, k, v, mask=None):
    """Attention read: q [B, T, H, h], k and v [B, S, H, h] -> like q.

    mask: Booleans that broadcast to [B, H, T, S], True where a query may look;
      None: everywhere.
    """
    return layers.attention(q, k, v, mask)


class Mlp(nn.Module):
  """Two-layer perceptron over the last axis, [B, T, d] -> [B, T, d]."""

  sizes: Sizes
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    d, std = x.shape[-1], nn.initializers.normal
    h = nn.Dense(self.sizes.mlp_dim, dtype=self.dtype, name='up',
                 kernel_init=std((2 * d) ** -0.5))(x)
    h = layers.activation(self.sizes.act)(h)
    return nn.Dense(d, dtype=self.dtype, name='down', kernel_init=std(
        (2 * d * self.sizes.depth) ** -0.5))(h)


class Block(nn.Module):
  """Pre-norm transformer block, u [B, T, d] -> (u, None), as nn.scan wants."""

  sizes: Sizes
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, u, mask=None):
    norm = functools.partial(nn.LayerNorm, self.sizes.eps, dtype=self.dtype)
    x = norm(name='norm1')(u)
    a = Attention(self.sizes, self.dtype, name='attn')(x, mask)
    u = self.join(u, x, a, 'attn')
    x = norm(name='norm2')(u)
    a = Mlp(self.sizes, self.dtype, name='mlp')(x)
    return self.join(u, x, a, 'mlp'), None

  def join(self, u, x, a, which):
    """Residual join of stream u, sub-layer input x and output a [B, T, d].

    which: 'attn' or 'mlp', the sub-layer that made a.
    """
    del x, which  # For interceptors: parallel adapters read them.
    return u + a


class Tower(nn.Module):
  """What both towers share: the blocks and the norm after them."""

  sizes: Sizes
  dtype: Any = jnp.float32
  scan: bool = False
  remat: bool = False

  def setup(self):
    self.inputs = (nn.broadcast,)
    stack = layers.stacked(
        functools.partial(Block, self.sizes, self.dtype), self.sizes.depth,
        self.scan, self.remat, self.inputs)
    if self.scan:
      self.blocks = stack
    else:
      self.block = stack  # block_0, block_1, ...
    self.norm = nn.LayerNorm(self.sizes.eps, dtype=self.dtype)

  def run(self, u, mask=None):
    u, _ = layers.run_stack(self.blocks if self.scan else self.block, u, mask,
                            inputs=self.inputs)
    return u


class TextTower(Tower):
  """Text ids [B, T] -> features [B, d].

  Attributes beyond Tower's:
    vocab: Rows of the token table.
    positions: Rows of the position table, the longest text.
    end: Id of the end-of-text token, read where it first stands. None: the
      token with the largest id is read, as in checkpoints whose config names a
      wrong one.
  """

  vocab: int = 49408
  positions: int = 77
  end: Optional[int] = 49407

  def setup(self):
    super().setup()
    # Tables are read in float32 and rounded once, after they are added.
    table = functools.partial(nn.Embed, features=self.sizes.width,
                              embedding_init=nn.initializers.normal(0.02))
    self.token_embed = table(self.vocab)
    self.position_embed = table(self.positions)

  def __call__(self, ids, mask=None):
    """mask: [B, T], True for real tokens; None: all, no text looks ahead."""
    h = self.hidden(ids, mask)
    at = ids if self.end is None else ids == self.end
    at = jnp.argmax(at, axis=1) + h.shape[1] - ids.shape[1]
    return self.readout(h, jnp.arange(h.shape[1]) == at[:, None])

  def hidden(self, ids, mask=None):
    """Hidden states [B, T, d] after the last norm; arguments as for a call."""
    if mask is not None and mask.shape != ids.shape:
      raise ValueError(f'mask of shape {mask.shape}: expected {ids.shape}')
    u = self.embed(ids)
    at = jnp.arange(u.shape[1])[None]
    pairs = layers.causal_mask(at, at)
    if mask is not None:
      pairs &= layers.padding_mask(
          layers.for_keys(mask.astype(bool), u.shape[1], True))
    return self.norm(self.run(u, pairs))

  def embed(self, ids):
    """Ids [B, T] -> tokens [B, T, d], positions added."""
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(f'ids of shape {ids.shape} and type {ids.dtype}: '
                       'expected integers [B, T]')
    if ids.shape[1] > self.positions:
      raise ValueError(f'{ids.shape[1]} tokens: expected at most '
                       f'{self.positions}')
    at = jnp.arange(ids.shape[1])
    u = self.token_embed(ids) + self.position_embed(at)
    return u.astype(self.dtype)

  def readout(self, h, mask):
    """h [B, T, d], mask [B, T] -> [B, d], the mean of the tokens of the mask.

    In a call the mask holds the end-of-text token alone.
    """
    h, w = h.astype(jnp.float32), mask.astype(jnp.float32)[..., None]
    return (h * w).sum(axis=1) / w.sum(axis=1)


class ImageTower(Tower):
  """Images [B, S, S, 3] -> features [B, d].

  Attributes beyond Tower's:
    image: Side S in pixels.
    patch: Side of a patch; what is left of S beside whole patches is not seen.
  """

  image: int = 224
  patch: int = 32

  def setup(self):
    super().setup()
    d, std = self.sizes.width, nn.initializers.normal
    self.patches = nn.Conv(
        d, (self.patch,) * 2, (self.patch,) * 2, 'VALID', use_bias=False,
        dtype=self.dtype, kernel_init=std(0.02))
    self.class_token = self.param('class_token', std(d ** -0.5), (d,))
    self.position_embed = nn.Embed(
        (self.image // self.patch) ** 2 + 1, d, embedding_init=std(0.02))
    self.first_norm = nn.LayerNorm(self.sizes.eps, dtype=self.dtype)

  def __call__(self, images):
    return self.norm(self.readout(self.hidden(images))).astype(jnp.float32)

  def hidden(self, images):
    """Hidden states [B, T, d] of the last block, before any norm."""
    return self.run(self.first_norm(self.embed(images)))

  def embed(self, images):
    """Images [B, S, S, 3] -> tokens [B, T, d], positions added."""
    expected = (self.image, self.image, 3)
    if images.ndim != 4 or images.shape[1:] != expected:
      raise ValueError(f'images of shape {images.shape}: expected [B, '
                       f'{", ".join(map(str, expected))}]')
    x = self.patches(images)
    x = x.reshape(len(x), -1, x.shape[-1])
    first = jnp.broadcast_to(
        self.class_token.astype(x.dtype), (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1)
    return x + self.position_embed(jnp.arange(x.shape[1])).astype(x.dtype)

  def readout(self, h, mask=None):
    """h [B, T, d] -> [B, d], the class token, before the last norm."""
    del mask  # The class token is always there.
    return h[:, 0]


class Clip(nn.Module):
  """Texts and images -> cosine similarities times a learned scale.

  Attributes:
    text_sizes, image_sizes: Of the towers.
    vocab, positions, end: See TextTower.
    image_side, patch: See ImageTower's image and patch.
    dim: p.
    scale_init: Logarithm of the scale in a new model.
    dtype: Of the towers. Parameters, softmax, embeddings and logits are
      float32.
    scan: One scanned module 'blocks' in each tower instead of 'block_0', ...
    remat: Recompute the blocks in the backward pass: less memory.
  """

  text_sizes: Sizes = Sizes()
  image_sizes: Sizes = Sizes(width=768, heads=12, mlp_dim=3072)
  vocab: int = 49408
  positions: int = 77
  end: Optional[int] = 49407
  image_side: int = 224
  patch: int = 32
  dim: int = 512
  scale_init: float = math.log(1 / 0.07)
  dtype: Any = jnp.float32
  scan: bool = False
  remat: bool = False

  def setup(self):
    form = dict(dtype=self.dtype, scan=self.scan, remat=self.remat)
    text, image = Sizes(*self.text_sizes), Sizes(*self.image_sizes)
    self.text_tower = TextTower(text, **form, vocab=self.vocab,
                                positions=self.positions, end=self.end)
    self.image_tower = ImageTower(
        image, **form, image=self.image_side, patch=self.patch)

    def project(width):
      return nn.Dense(self.dim, use_bias=False,
                      kernel_init=nn.initializers.normal(width ** -0.5))

    self.text_projection = project(text.width)
    self.image_projection = project(image.width)
    self.logit_scale = self.param(
        'logit_scale', nn.initializers.constant(self.scale_init), ())

  def __call__(self, ids, images, mask=None):
    """Scores of every image with every text.

    Args:
      ids: [N, T] integers, each text with its end-of-text token.
      images: [I, S, S, 3] floats, normalised as the checkpoint says.
      mask: [N, T] booleans or 0/1, True for real tokens; None: all are.

    Returns:
      Logits [I, N]; transposed they are those of each text with every image.
    """
    texts, images = self.text(ids, mask), self.image(images)
    return jnp.exp(self.logit_scale) * images @ texts.T

  def text(self, ids, mask=None):
    """Texts [N, T] -> embeddings [N, p] of norm 1; arguments as for a call."""
    return _unit(self.text_projection(self.text_tower(ids, mask)))

  def image(self, images):
    """Images [I, S, S, 3] -> embeddings [I, p] of norm 1."""
    return _unit(self.image_projection(self.image_tower(images)))


def _unit(x):
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))
