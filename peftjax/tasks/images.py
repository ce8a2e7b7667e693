"""Image classification.

Batches: image [B, H, W, 3], label int32 [B]. Checkpoints that say how they want
their images have them as uint8, after resizing and cropping, and `Task.inputs`
rescales and normalises them on the device; for weight files of this library
they are float32, as the model reads them.
"""

import os

import numpy as np

from peftjax import bases
from peftjax.data import images, pipeline
from peftjax.tasks import classification

KINDS, HEAD, CALL = ('image',), 'classify', 'images'


def outputs(source):
  """Outputs of the head."""
  return len(source.labels)


def inputs(batch):
  """(args, kwargs) of an image model's call, of float32 images."""
  return (batch['image'],), {}


def task(spec, source, classes, base):
  """The `Task`; arguments as of `classification.task`."""
  how = preprocessor(base)
  ready = inputs if how is None else lambda batch: inputs(
      dict(image=images.normalise(batch['image'], how)))
  return classification.classify(
      'image', ready, classes, classification.metric_of(spec, source))


def preprocessor(base):
  """The `Preprocessor` of a folder; None for a weight file, which has none."""
  if not base.folder:
    return None
  if os.path.exists(os.path.join(base.folder, 'preprocessor_config.json')):
    return images.load_preprocessor(base.folder)
  return images.Preprocessor(resize=bases.image_size(base))


def shapes(spec, base):
  """{name: (shape, type) of one row}, without data."""
  del spec
  how = preprocessor(base)
  size = bases.image_size(base) if how is None else how.crop or how.resize
  if size is None or len(size) < 2:
    raise ValueError(f'the preprocessor of {base.folder} gives images of many '
                     'sizes: expected one that crops them')
  return dict(image=((*size, 3), 'uint8' if how else 'float32'),
              label=((), 'int32'))


def encoder(spec, source, base, tokenizer, classes, ready=False):
  """Examples -> {image, label} as of `arrays`, for streams.

  Args:
    spec, source, base, tokenizer, classes: As of `classification.encoder`.
    ready: Whether images have their size already, from `augment`.
  """
  del spec, tokenizer
  how = preprocessor(base)
  if how:
    how = how._replace(resize=None, crop=None) if ready else how
    return lambda examples: images.encode_images(
        examples, how, classes, raw=True)
  size = bases.image_size(base)
  return lambda examples: _scaled(examples, size, classes, source.name)


def augment(base, flip):
  """(example, numpy Generator) -> example, cropped anywhere; flip: mirrored."""
  how = preprocessor(base) or images.Preprocessor(
      resize=bases.image_size(base))
  return lambda example, random: dict(example, image=images.pixels(
      example['image'], how, random, flip=flip))


def _scaled(rows, size, classes, name):
  """{image, label} of images of one shape, as weight files read them."""
  shapes = {r['image'].shape for r in rows}
  if len(shapes) > 1 or size[0] != size[1]:
    raise ValueError(
        f'{name}: images of the shapes {sorted(shapes)} for a model of {size}; '
        'a weight file reads square ones from a stream of one shape: expected '
        'those, a checkpoint folder, or data.stream=False')
  label = np.array([r['label'] for r in rows], np.int32)
  pipeline.check_labels(label, classes)
  image = np.stack([r['image'] for r in rows])
  if image.shape[-1] not in (1, 3):
    raise ValueError(f'{name}: images of {image.shape[-1]} channels; '
                     'expected 1 (grey) or 3 (red, green, blue)')
  return dict(image=pipeline.scale_images(image, size[0]), label=label)


def arrays(spec, source, base, tokenizer, classes, train):
  """{image, label} of a split's examples, as the base wants its images.

  A folder's preprocessor_config.json says how; weight files of this library
  read pixel / 127.5 - 1 at the size that they were trained on.
  """
  del spec, tokenizer, train
  rows = [source.examples[i] for i in range(len(source.examples))]
  how, size = preprocessor(base), bases.image_size(base)
  if how:
    return images.encode_images(rows, how, classes, raw=True)
  if len({r['image'].shape for r in rows}) > 1 or size[0] != size[1]:
    return images.encode_images(
        rows, images.Preprocessor(resize=size), classes)
  return _scaled(rows, size, classes, source.name)
