"""Convolutional networks with hook methods: ResNet and ConvNeXt.

Batch norm is a frozen affine map of channels: its running statistics are folded
into scale and bias when a checkpoint is read (peftjax.interop.convnet), so
nothing here has state. Letters: B batch, H and W rows and columns, c channels.

A block's 1 x 1 convolutions (Dense layers in ConvNeXt) are called `up` and
`down` by what they do to the number of channels, and have these roles. The
places where a method can step in, besides the layers themselves:

  embed(images) -> [B, H', W', c]       after the stem
  <block>.join(u, x, a, which)          residual stream, block's input, output
  readout(h, mask) -> features [B, c]   mean over rows and columns

Blocks of a stage differ in shape, so there is no scanned form.

Source: "Deep Residual Learning for Image Recognition" (He et al., arXiv
1512.03385); "A ConvNet for the 2020s" (Liu et al., arXiv 2201.03545).
"""

import functools
from typing import Any, Optional

import flax.linen as nn
import jax.numpy as jnp

from peftjax.models.layers import activation, LayerScale

HEADS = (None, 'pool', 'classify')

# Variance 2 / fan out keeps gradients in size through ReLUs.
_INIT = nn.initializers.variance_scaling(2., 'fan_out', 'normal')


class FrozenBatchNorm(nn.Module):
  """x * scale + bias by channel: batch norm with its statistics folded in."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
    return x * scale.astype(self.dtype) + bias.astype(self.dtype)


def conv(width, size, stride=1, groups=1, padding=None, **options):
  """A convolution that pads as torch does: size // 2 on every side."""
  side = (size // 2,) * 2
  return nn.Conv(width, (size,) * 2, (stride,) * 2, padding or (side, side),
                 feature_group_count=groups, kernel_init=_INIT, **options)


def stages(widths, depths):
  """[(channels, blocks)] of every stage."""
  if len(widths) != len(depths):
    raise ValueError(f'widths {widths} and depths {depths}: expected as many '
                     'of the one as of the other')
  return list(zip(widths, depths))


def mean(h, mask=None):
  """Mean over rows and columns, [B, H, W, c] -> [B, c] in float32.

  mask: [B, H, W] booleans, False for places that are left out, or None.
  """
  h = h.astype(jnp.float32)
  if mask is None:
    return h.mean(axis=(1, 2))
  w = mask.astype(h.dtype)[..., None]
  return (h * w).sum(axis=(1, 2)) / jnp.maximum(w.sum(axis=(1, 2)), 1.)


class ConvNet(nn.Module):
  """What the networks share: images [B, H, W, 3] -> logits [B, classes].

  Attributes:
    classes: outputs of the head, whose kernel starts at zero.
    head: 'classify' (logits), 'pool' (what `readout` returns) or None (the
      last layer's features [B, H', W', c]).
    dtype: of the computation. Parameters and logits are float32.
    remat: recompute the blocks in the backward pass: less memory.
  """

  classes: int = 10
  head: Optional[str] = 'classify'
  dtype: Any = jnp.float32
  remat: bool = False

  def classifier(self):
    """The head's layer or None; for `setup`."""
    if self.head not in HEADS:
      raise ValueError(f'{type(self).__name__}: unknown head {self.head!r}; '
                       f'expected one of {HEADS}')
    if self.head == 'classify':
      return nn.Dense(self.classes, kernel_init=nn.initializers.zeros,
                      name='head')
    return None

  def block(self, cls):
    """A block's class, rematerialised if wanted."""
    return nn.remat(cls) if self.remat else cls

  def __call__(self, images):
    if images.ndim != 4 or images.shape[-1] != 3:
      raise ValueError(
          f'images of shape {images.shape}: expected [B, H, W, 3]')
    h = self.hidden(images)
    if self.head is None:
      return h
    h = self.readout(h)
    return self.out(h) if self.head == 'classify' else h

  def hidden(self, images):
    """Images [B, H, W, 3] -> the last layer's features [B, H', W', c]."""
    x = self.embed(images)
    for layer in self.layers:
      x = layer(x)
    return x

  def readout(self, h, mask=None):
    """What the head reads: h [B, H, W, c], mask as in `mean` -> [B, c]."""
    return mean(h, mask)


# ----------------------------------------------------------------- ResNet


class ResidualBlock(nn.Module):
  """Block of a ResNet, [B, H, W, c] -> [B, H / stride, W / stride, width].

  Attributes:
    width: channels that come out.
    stride: of the block.
    bottleneck: 1 x 1 down to width / 4, 3 x 3, 1 x 1 up; else two 3 x 3.
    early: the stride is the first layer's, not the 3 x 3's.
    act: activation after the sum; those between the layers are ReLUs.
    dtype: of the computation.
  """

  width: int
  stride: int = 1
  bottleneck: bool = True
  early: bool = False
  act: str = 'relu'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    def layer(name, x, width, size, stride=1):
      x = conv(width, size, stride, use_bias=False, dtype=self.dtype,
               name=name)(x)
      return FrozenBatchNorm(self.dtype, name=f'{name}_norm')(x)

    if self.bottleneck:
      first, second = (self.stride, 1) if self.early else (1, self.stride)
      a = nn.relu(layer('down', x, self.width // 4, 1, first))
      a = nn.relu(layer('conv', a, self.width // 4, 3, second))
      a = layer('up', a, self.width, 1)
    else:
      a = nn.relu(layer('conv1', x, self.width, 3, self.stride))
      a = layer('conv2', a, self.width, 3)
    u = x
    if needs_shortcut(x.shape[-1], self.width, self.stride):
      u = layer('shortcut', x, self.width, 1, self.stride)
    return activation(self.act)(self.join(u, x, a, 'conv'))

  def join(self, u, x, a, which):
    """Residual join of stream u, the block's input x and its output a."""
    del x, which  # For interceptors: parallel adapters read them.
    return u + a


def needs_shortcut(c_in, width, stride):
  """Whether a block's stream takes a convolution of its own."""
  return c_in != width or stride != 1


class ResNet(ConvNet):
  """ResNet, as torchvision and transformers have it ("v1.5").

  Attributes:
    stem: channels of the 7 x 7 convolution.
    widths: channels of every stage.
    depths: blocks of every stage.
    bottleneck: three layers a block, else two.
    stride_first: the first stage halves the resolution as the others do.
    early: as in `ResidualBlock`.
    act: activation of the stem and after each sum.
  """

  stem: int = 64
  widths: tuple[int, ...] = (256, 512, 1024, 2048)
  depths: tuple[int, ...] = (3, 4, 6, 3)
  bottleneck: bool = True
  stride_first: bool = False
  early: bool = False
  act: str = 'relu'

  def setup(self):
    self.conv = conv(self.stem, 7, 2, use_bias=False, dtype=self.dtype,
                     name='stem')
    self.conv_norm = FrozenBatchNorm(self.dtype, name='stem_norm')
    block = functools.partial(
        self.block(ResidualBlock), bottleneck=self.bottleneck, early=self.early,
        act=self.act, dtype=self.dtype)
    self.layers = [block(width, stride, name=name)
                   for name, _, width, stride in self.plan()]
    self.out = self.classifier()

  def plan(self):
    """(name, channels in, channels out, stride) of every block."""
    blocks, c_in = [], self.stem
    for i, (width, depth) in enumerate(stages(self.widths, self.depths)):
      for j in range(depth):
        stride = 2 if j == 0 and (i or self.stride_first) else 1
        blocks.append((f'stage_{i}_layer_{j}', c_in, width, stride))
        c_in = width
    return blocks

  def embed(self, images):
    """Images [B, H, W, 3] -> [B, H / 4, W / 4, stem]."""
    x = activation(self.act)(self.conv_norm(self.conv(images)))
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


# --------------------------------------------------------------- ConvNeXt


class ConvNeXtBlock(nn.Module):
  """Depthwise 7 x 7, norm, perceptron: [B, H, W, c] -> the same shape.

  Attributes as in `ConvNeXt`.
  """

  act: str = 'gelu'
  layer_scale: Optional[float] = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    c = x.shape[-1]
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    a = conv(c, 7, groups=c, dtype=self.dtype, name='depthwise')(x)
    a = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm')(a)
    a = activation(self.act)(dense(4 * c, name='up')(a))
    a = dense(c, name='down')(a)
    if self.layer_scale is not None:
      a = LayerScale(self.layer_scale, self.dtype, name='scale')(a)
    return self.join(x, x, a, 'conv')

  def join(self, u, x, a, which):
    """Residual join of stream u, the block's input x and its output a."""
    del x, which  # For interceptors: parallel adapters read them.
    return u + a


class Reduce(nn.Module):
  """Norm, then 2 x 2 patches: [B, H, W, c] -> [B, H / 2, W / 2, width]."""

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm')(x)
    return conv(self.width, 2, 2, padding='VALID', dtype=self.dtype,
                name='conv')(x)


class ConvNeXt(ConvNet):
  """ConvNeXt; no stochastic depth.

  Attributes:
    widths: channels of every stage.
    depths: blocks of every stage.
    patch: side of the stem's patches.
    act: activation of the perceptrons.
    layer_scale: start of a trained factor a channel on what a block puts out;
      None: no such factor.
    eps: of the norm after the mean; the others' is 1e-6.
  """

  widths: tuple[int, ...] = (96, 192, 384, 768)
  depths: tuple[int, ...] = (3, 3, 9, 3)
  patch: int = 4
  act: str = 'gelu'
  layer_scale: Optional[float] = 1e-6
  eps: float = 1e-12

  def setup(self):
    self.conv = conv(self.widths[0], self.patch, self.patch, padding='VALID',
                     dtype=self.dtype, name='patch')
    self.conv_norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype,
                                  name='patch_norm')
    layers = []
    for i, (width, depth) in enumerate(stages(self.widths, self.depths)):
      if i:
        layers.append(Reduce(width, self.dtype, name=f'reduce_{i}'))
      layers += [self.block(ConvNeXtBlock)(
          self.act, self.layer_scale, self.dtype, name=f'stage_{i}_layer_{j}')
                 for j in range(depth)]
    self.layers = layers
    if self.head is not None:
      self.norm = nn.LayerNorm(epsilon=self.eps)
    self.out = self.classifier()

  def embed(self, images):
    """Images [B, H, W, 3] -> [B, H / patch, W / patch, c]."""
    return self.conv_norm(self.conv(images))

  def readout(self, h, mask=None):
    """Mean over rows and columns, then the norm: [B, H, W, c] -> [B, c]."""
    return self.norm(mean(h, mask))
