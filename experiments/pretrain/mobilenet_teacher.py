"""MobileNetV2 forward pass in JAX, the teacher that vit_s is distilled from.

Source: "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (Sandler et
al., arXiv 1801.04381), width 1.0. The weights are an npz file of int8 kernels
`<layer>.w_int8` (HWIO, depthwise HW1C) with a scale per output channel
`<layer>.scale` and a bias `<layer>.b`, batch norm folded in.
"""

import jax
import jax.numpy as jnp
import numpy as np

_STRIDE_2 = (1, 3, 6, 13)  # Blocks that halve the resolution, of 17.


def load_teacher(path):
  """npz file -> {layer: (kernel [h, w, in, out], bias [out])}, float32."""
  z = np.load(path)
  names = [n.removesuffix('.b') for n in z.files if n.endswith('.b')]
  return {n: (z[f'{n}.w_int8'] * z[f'{n}.scale'], z[f'{n}.b']) for n in names}


def teacher_features(teacher, images):
  """Pooled features before the classifier.

  Args:
    teacher: from `load_teacher`.
    images: [N, S, S, 3], pixel / 127.5 - 1.

  Returns:
    [N, 1280], not negative.
  """
  relu6 = lambda x: jnp.clip(x, 0, 6)

  def conv(x, name, stride=1):
    kernel, bias = teacher[name]
    # 'SAME' pads asymmetrically at stride 2, as TensorFlow does.
    return bias + jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), 'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1] if name.endswith('.dw') else 1)

  x = relu6(conv(images, 'stem', 2))
  for i in range(17):
    y = x
    if f'block{i}.expand' in teacher:
      y = relu6(conv(y, f'block{i}.expand'))
    y = relu6(conv(y, f'block{i}.dw', 2 if i in _STRIDE_2 else 1))
    y = conv(y, f'block{i}.project')
    x = x + y if x.shape == y.shape else y
  return relu6(conv(x, 'head')).mean(axis=(1, 2))
