"""Images as a checkpoint wants them: resize, centre crop, rescale, normalise.

  how = load_preprocessor('checkpoints/vit')        # preprocessor_config.json
  arrays = encode_images(source.examples, how)      # image [N, H, W, 3], label
  x = preprocess(image, how, seed=0, index=17)      # augmented for training

Resizing is Pillow's on uint8 pixels, antialiased and rounded to whole numbers,
as it was when the checkpoints were trained and as the PIL image processors of
transformers do it; `jax.image.resize` rounds nothing and differs by up to a few
grey levels.
"""

import json
import pathlib
from typing import NamedTuple, Optional

import numpy as np
import PIL.Image

from peftjax.data.pipeline import check_labels
from peftjax.method import nearest

_NEAREST, _LANCZOS, _BILINEAR, _BICUBIC, _BOX, _HAMMING = range(6)
_FILTERS = (_NEAREST, _LANCZOS, _BILINEAR, _BICUBIC, _BOX, _HAMMING)

# By processor: the filter if the file names none, and whether a bare number as
# the size, which old files have, is the shorter edge.
_PROCESSORS = dict(
    Bit=(_BICUBIC, True), CLIP=(_BICUBIC, True), ConvNext=(_BICUBIC, True),
    DeiT=(_BICUBIC, False), Siglip=(_BICUBIC, False), ViT=(_BILINEAR, False))
# Keys that would change the pixels in a way that is not done here.
_UNSUPPORTED = ('do_pad', 'do_thumbnail', 'do_align_long_axis',
                'do_flip_channel_order', 'rescale_offset', 'keep_aspect_ratio')


class Preprocessor(NamedTuple):
  """What happens to an image, in this order; None leaves a step out.

  (H, W) in pixels. The default is that of ViT: pixel / 127.5 - 1.
  """
  resize: Optional[tuple] = (224, 224)        # (H, W), or (shorter edge,)
  crop: Optional[tuple] = None                # (H, W) of the middle
  resample: int = _BILINEAR                   # number of Pillow's filter
  scale: Optional[float] = 1 / 255
  mean: Optional[tuple] = (0.5, 0.5, 0.5)     # per channel, of scaled pixels
  std: Optional[tuple] = (0.5, 0.5, 0.5)
  drop_alpha: bool = False                    # four channels become three


def load_preprocessor(path):
  """Reads preprocessor_config.json of a folder, or a file of that form.

  Raises:
    FileNotFoundError: there is none.
    ValueError: a setting that is unknown or not supported, naming key and
      value.
  """
  path = pathlib.Path(path)
  file = path / 'preprocessor_config.json' if path.is_dir() else path
  if not file.is_file():
    raise FileNotFoundError(f'no preprocessor_config.json: {file}')
  try:
    return from_config(json.loads(file.read_text('utf-8')))
  except json.JSONDecodeError as e:
    raise ValueError(f'{file}: no JSON: {e}') from e


def from_config(config):
  """`Preprocessor` of a preprocessor_config.json as a dict."""
  kind = config.get('image_processor_type') or config.get(
      'feature_extractor_type') or 'ViTImageProcessor'
  name = kind
  for ending in ('Fast', 'Pil', 'ImageProcessor', 'FeatureExtractor'):
    name = name.removesuffix(ending)
  if name not in _PROCESSORS:
    raise ValueError(f'image_processor_type={kind!r} is not supported'
                     f'{nearest(name, _PROCESSORS)}')
  for key in _UNSUPPORTED:
    if config.get(key):
      raise ValueError(f'{key}={config[key]!r} is not supported; expected '
                       'false')
  resample, shorter = _PROCESSORS[name]
  given = config.get('resample')
  resample = resample if given is None else given
  if resample not in _FILTERS:
    raise ValueError(f'resample={resample!r}; expected one of 0 .. 5, as '
                     'Pillow numbers its filters')
  resize = crop = None
  if config.get('do_resize', True):
    resize = _size('size', config.get('size'), shorter)
  if config.get('do_center_crop', name in ('Bit', 'CLIP', 'DeiT')):
    crop = _size('crop_size', config.get('crop_size'), False)
    if len(crop) != 2:
      raise ValueError(f'crop_size={config["crop_size"]!r}; expected height '
                       'and width')
  if name == 'ConvNext' and resize:
    resize, crop = _convnext(resize, crop, config.get('crop_pct'))
  scale = config.get('rescale_factor', 1 / 255)
  normalise = config.get('do_normalize', True)
  return Preprocessor(
      resize=resize, crop=crop, resample=resample,
      scale=scale if config.get('do_rescale', True) else None,
      mean=_channels('image_mean', config) if normalise else None,
      std=_channels('image_std', config) if normalise else None,
      drop_alpha=bool(config.get('do_convert_rgb')))


def _size(key, size, shorter):
  """(H, W) or (shorter edge,) of the forms that files have."""
  if isinstance(size, int) and not isinstance(size, bool):
    found = (size,) if shorter else (size, size)
  elif isinstance(size, dict) and set(size) == {'height', 'width'}:
    found = (size['height'], size['width'])
  elif isinstance(size, dict) and set(size) == {'shortest_edge'}:
    found = (size['shortest_edge'],)
  else:
    found = ()
  if not found or not all(isinstance(s, int) and s > 0 for s in found):
    raise ValueError(f'{key}={size!r}; expected a number of pixels, '
                     "{'height', 'width'} or {'shortest_edge'}")
  return found


def _convnext(resize, crop, share):
  """ConvNeXt's rule: below 384 pixels crop `share` of it, else warp."""
  if len(resize) != 1 or crop:
    raise ValueError(f'size={resize}, crop_size={crop}: ConvNext expects '
                     'shortest_edge and no crop')
  edge, = resize
  if edge >= 384:
    return (edge, edge), None
  share = 224 / 256 if share is None else share
  return (int(edge / share),), (edge, edge)


def _channels(key, config):
  """A number a channel."""
  value = config.get(key)
  value = [value] * 3 if isinstance(value, (int, float)) else value
  if not isinstance(value, list) or len(value) != 3 or (
      key == 'image_std' and 0 in value):
    raise ValueError(f'{key}={value!r}; expected three numbers'
                     f'{", none of them 0" if key == "image_std" else ""}')
  return tuple(map(float, value))


def preprocess(image, how, seed=None, index=0, flip=True):
  """One image through all steps.

  Args:
    image: uint8 [H, W], [H, W, 1] (grey, which becomes three equal channels)
      or [H, W, 3].
    how: a `Preprocessor`.
    seed: None for evaluation. A number augments: the crop is anywhere, not in
      the middle, and one image in two is mirrored. Without a crop, the image is
      resized to 8/7 of the size first, as 256 is to 224.
    index: of the image; with epochs, epoch * N + place. Seed and index alone
      decide on the augmentation.
    flip: whether to mirror; not for digits and letters.

  Returns:
    float32 [H', W', 3].

  Raises:
    ValueError: another type, or 2, 4 or more channels.
  """
  random = None if seed is None else np.random.default_rng((seed, index))
  return normalise(pixels(image, how, random, index, flip), how)


def pixels(image, how, random=None, index=0, flip=True):
  """The steps of `preprocess` before rescaling: whole grey levels.

  Args:
    image, how, index, flip: See `preprocess`.
    random: A numpy Generator, which augments; None: for evaluation.

  Returns:
    uint8 [H', W', 3].
  """
  x = _three_channels(np.asarray(image), how, index)
  resize, crop = how.resize, how.crop
  if random and not crop and resize and len(resize) == 2:
    resize, crop = tuple(round(s * 8 / 7) for s in resize), resize
  if resize:
    x = _resize(x, resize, how.resample)
  if crop:
    x = _crop(x, crop, random)
  if random and flip and random.integers(2):
    x = x[:, ::-1]
  return x


def normalise(x, how):
  """The steps of `preprocess` from rescaling on: uint8 [..., 3] -> float32.

  x is an array of numpy or of jax: on the device they cost next to nothing, and
  what is kept and sent is a quarter.
  """
  x = x.astype(np.float32)
  if how.scale is not None:
    x = x * np.float32(how.scale)
  if how.mean is not None:
    x = x - np.float32(how.mean)
  if how.std is not None:
    x = x / np.float32(how.std)
  return x


def encode_images(examples, how, classes=0, seed=None, flip=True, raw=False):
  """All examples as arrays.

  Args:
    examples: of {'image', 'label'}; see `peftjax.data.examples`.
    how: a `Preprocessor` whose output has one size.
    classes: number of classes; 0 checks no labels.
    seed: see `preprocess`; index is the place of the example.
    flip: see `preprocess`.
    raw: whether to leave `normalise` to the caller.

  Returns:
    dict(image=float32 [N, H, W, 3], or uint8 if raw, label=int32 [N]).

  Raises:
    ValueError: see `preprocess`; images of several sizes; no examples; a label
      outside 0 .. classes - 1.
  """
  if not len(examples):
    raise ValueError('no examples: expected at least one')
  images, label = None, np.zeros(len(examples), np.int32)
  for i in range(len(examples)):
    example = examples[i]
    random = None if seed is None else np.random.default_rng((seed, i))
    x = pixels(example['image'], how, random, i, flip)
    x = x if raw else normalise(x, how)
    if images is None:  # One array, not a list and its copy.
      images = np.zeros((len(examples), *x.shape), x.dtype)
    if x.shape != images.shape[1:]:
      raise ValueError(
          f'image {i} is {list(x.shape)} after resize={how.resize}, '
          f'crop={how.crop}, the first {list(images.shape[1:])}; a batch needs '
          'one size: give a crop, or height and width')
    images[i], label[i] = x, example['label']
  if classes:
    check_labels(label, classes)
  return dict(image=images, label=label)


def _three_channels(x, how, index):
  """uint8 [H, W, 3]."""
  x = x[..., None] if x.ndim == 2 else x
  if x.dtype != np.uint8 or x.ndim != 3 or 0 in x.shape:
    raise ValueError(f'image {index} is {x.dtype} {list(x.shape)}; expected '
                     'uint8 [H, W, 1 or 3]')
  if x.shape[2] == 4 and how.drop_alpha:
    x = x[..., :3]
  if x.shape[2] not in (1, 3):
    raise ValueError(
        f'image {index} has {x.shape[2]} channels; expected 1 (grey) or 3 '
        '(red, green, blue), channels last')
  return np.repeat(x, 3, axis=2) if x.shape[2] == 1 else x


def _resize(x, size, resample):
  """To (H, W), or so that the shorter edge is (edge,); longer rounded down."""
  h, w = x.shape[:2]
  if len(size) == 1:
    edge, = size
    size = ((edge, edge * w // h) if h <= w else (edge * h // w, edge))
  if size == (h, w):
    return x
  image = PIL.Image.fromarray(np.ascontiguousarray(x))
  return np.asarray(image.resize((size[1], size[0]), resample))


def _crop(x, size, random):
  """(H, W) of the middle, or of anywhere; small images get a black border."""
  room = [have - want for have, want in zip(x.shape, size)]
  if random:
    starts = [int(random.integers(r + 1)) if r > 0 else r // 2 for r in room]
  else:
    starts = [r // 2 for r in room]
  pad = [(max(0, -s), max(0, s - r)) for s, r in zip(starts, room)]
  x = np.pad(x, [*pad, (0, 0)])
  (top, _), (left, _) = pad
  y, z = starts[0] + top, starts[1] + left
  return x[y:y + size[0], z:z + size[1]]
