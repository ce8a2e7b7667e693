"""MobileNetV2 with hook methods; see convnet.py for them.

Batch norm is folded into the convolutions, all of which have biases. Letters: B
batch, H and W rows and columns, c channels.

Source: "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (Sandler et
al., arXiv 1801.04381).
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from peftjax.models.convnet import conv, ConvNet

# Width 1: (expansion, channels, blocks, stride of the first).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
          (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedBlock(nn.Module):
  """1 x 1 up, depthwise 3 x 3, 1 x 1 down: [B, H, W, c] -> [..., width].

  Attributes:
    width: channels that come out.
    expansion: of the channels in between; 1: no `up`.
    stride: of the depthwise convolution.
    dtype: of the computation.
  """

  width: int
  expansion: int = 6
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    # 'SAME' pads asymmetrically at stride 2, as TensorFlow does.
    same = functools.partial(conv, padding='SAME', dtype=self.dtype)
    c = x.shape[-1] * self.expansion
    a = x
    if self.expansion != 1:
      a = nn.relu6(same(c, 1, name='up')(a))
    a = nn.relu6(same(c, 3, self.stride, c, name='depthwise')(a))
    a = same(self.width, 1, name='down')(a)
    return self.join(x, x, a, 'conv') if a.shape == x.shape else a

  def join(self, u, x, a, which):
    """Residual join of stream u, the block's input x and its output a."""
    del x, which  # For interceptors: parallel adapters read them.
    return u + a


class MobileNetV2(ConvNet):
  """MobileNetV2 with batch norm folded into the convolutions.

  Attributes:
    stem: channels of the first convolution.
    stages: (expansion, channels, blocks, stride of the first) of every stage.
    last: channels of the last convolution.
  """

  stem: int = 32
  stages: tuple[tuple[int, int, int, int], ...] = STAGES
  last: int = 1280

  def setup(self):
    same = functools.partial(conv, padding='SAME', dtype=self.dtype)
    self.conv = same(self.stem, 3, 2, name='stem')
    blocks = [(width, expansion, stride if j == 0 else 1)
              for expansion, width, n, stride in self.stages for j in range(n)]
    self.layers = [self.block(InvertedBlock)(*b, self.dtype, name=f'layer_{i}')
                   for i, b in enumerate(blocks)]
    self.last_conv = same(self.last, 1, name='last')
    self.out = self.classifier()

  def embed(self, images):
    """Images [B, H, W, 3] -> [B, H / 2, W / 2, stem]."""
    return nn.relu6(self.conv(images))

  def hidden(self, images):
    """Images [B, H, W, 3] -> the last convolution's [B, H', W', last]."""
    return nn.relu6(self.last_conv(super().hidden(images)))
