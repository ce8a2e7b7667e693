"""MobileNetV2, the teacher that vit_s is distilled from."""

from peftjax.interop.convnet import load_mobilenet


def load_teacher(path):
  """npz file of int8 weights -> (model, params), without the classifier."""
  return load_mobilenet(path, head='pool')


def teacher_features(teacher, images):
  """Pooled features before the classifier.

  Args:
    teacher: from `load_teacher`.
    images: [N, S, S, 3], pixel / 127.5 - 1.

  Returns:
    [N, 1280], not negative.
  """
  model, params = teacher
  return model.apply({'params': params}, images)
