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
  label = np.array([r['label'] for r in rows], np.int32)
  pipeline.check_labels(label, classes)
  image = np.stack([r['image'] for r in rows])
  if image.shape[-1] not in (1, 3):
    raise ValueError(f'{source.name}: images of {image.shape[-1]} channels; '
                     'expected 1 (grey) or 3 (red, green, blue)')
  return dict(image=pipeline.scale_images(image, size[0]), label=label)
