"""Image preprocessing against transformers, and in closed form."""

import json
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

# pylint: disable=wrong-import-position
import numpy as np
import pytest

from peftjax.data.images import encode_images
from peftjax.data.images import from_config
from peftjax.data.images import load_preprocessor
from peftjax.data.images import preprocess
from peftjax.data.images import Preprocessor


def picture(h, w, channels=3, seed=0):
  """Smooth and rough parts, uint8 [h, w, channels]."""
  random = np.random.default_rng(seed)
  y, x = np.mgrid[:h, :w]
  smooth = 127 + 100 * np.sin(y / 5 + x / 9)
  out = smooth[..., None] + random.normal(0, 25, (h, w, channels))
  return np.clip(out, 0, 255).astype(np.uint8)


CASES = [
    ('ViT', dict(size=dict(height=24, width=32))),
    ('ViT', dict(size=dict(height=24, width=24), resample=3,
                 image_mean=[.1, .2, .3], image_std=[.4, .5, .6])),
    ('ViT', dict(size=dict(height=24, width=24), do_normalize=False)),
    ('ViT', dict(do_resize=False, do_rescale=False)),
    ('CLIP', dict(size=dict(shortest_edge=20),
                  crop_size=dict(height=20, width=20))),
    # Crop larger than what is left of the image: a black border.
    ('CLIP', dict(size=dict(shortest_edge=20),
                  crop_size=dict(height=31, width=26))),
    ('DeiT', dict(size=dict(height=29, width=29),
                  crop_size=dict(height=24, width=24))),
    ('Bit', dict(size=dict(shortest_edge=30),
                 crop_size=dict(height=23, width=23))),
    ('ConvNext', dict(size=dict(shortest_edge=24))),
    ('ConvNext', dict(size=dict(shortest_edge=32), crop_pct=.95)),
    ('ConvNext', dict(size=dict(shortest_edge=384))),
    ('Siglip', dict(size=dict(height=17, width=23), do_convert_rgb=True)),
]


@pytest.mark.parametrize('name, settings', CASES)
def test_agrees_with_transformers(tmp_path, name, settings):
  transformers = pytest.importorskip('transformers')
  theirs = getattr(transformers, f'{name}ImageProcessorPil')(**settings)
  theirs.save_pretrained(tmp_path)
  how = load_preprocessor(tmp_path)
  for h, w in ((40, 40), (33, 51), (47, 22), (15, 18)):
    image = picture(h, w)
    want = theirs(image, return_tensors='np')['pixel_values'][0]
    got = preprocess(image, how)
    assert got.dtype == np.float32
    assert got.shape == (*want.shape[1:], 3)
    # Same pixels: only the order of the floating-point steps may differ.
    np.testing.assert_allclose(got, want.transpose(1, 2, 0), atol=2e-6 * max(
        1, np.abs(want).max()))


def test_old_files_have_bare_sizes():
  old = dict(do_normalize=True, do_resize=True, image_mean=[.5] * 3,
             image_std=[.5] * 3, size=24)
  assert from_config(old) == Preprocessor((24, 24))
  clip = dict(feature_extractor_type='CLIPFeatureExtractor', size=24,
              crop_size=20, resample=3, do_resize=True, do_center_crop=True,
              image_mean=[.5] * 3, image_std=[.5] * 3)
  assert from_config(clip)[:3] == ((24,), (20, 20), 3)


def test_default_is_pixel_over_127():
  image = np.uint8([[[0], [51]], [[102], [255]]])
  got = preprocess(image, Preprocessor((2, 2)))
  np.testing.assert_allclose(got[..., 0], [[-1, -.6], [-.2, 1]], atol=1e-6)
  assert (got == got[..., :1]).all()  # Grey: three equal channels.
  np.testing.assert_array_equal(got, preprocess(image[..., 0],
                                                Preprocessor((2, 2))))


@pytest.mark.parametrize('channels', [2, 4, 5])
def test_wrong_channel_count(channels):
  with pytest.raises(ValueError, match=f'image 3 has {channels} channels; '
                                       'expected 1 .grey. or 3'):
    preprocess(picture(8, 8, channels), Preprocessor((8, 8)), index=3)


def test_alpha_is_dropped_if_the_checkpoint_does():
  image = picture(8, 8, 4)
  how = Preprocessor((8, 8))
  np.testing.assert_array_equal(
      preprocess(image, how._replace(drop_alpha=True)),
      preprocess(image[..., :3], how))


@pytest.mark.parametrize('image', [
    np.zeros((8, 8, 3), np.float32), np.zeros((2, 8, 8, 3), np.uint8),
    np.zeros((0, 8, 3), np.uint8)])
def test_wrong_type_or_shape(image):
  with pytest.raises(ValueError, match='expected uint8 .H, W, 1 or 3.'):
    preprocess(image, Preprocessor((8, 8)))


# ------------------------------------------------------------ augmentation


def test_augmentation_follows_seed_and_index():
  image, how = picture(40, 40), Preprocessor((16, 16), resample=3)
  views = {(s, i): preprocess(image, how, s, i).tobytes()
           for s in range(2) for i in range(20)}
  again = {(s, i): preprocess(image, how, s, i).tobytes()
           for s in range(2) for i in range(20)}
  assert views == again
  # Two pixels of room in each direction, mirrored or not: 18 views at most.
  assert 10 <= len(set(views.values())) <= 18
  assert [views[0, i] for i in range(20)] != [views[1, i] for i in range(20)]


def test_augmented_views_are_crops_and_mirrors():
  image = picture(20, 22)
  how = Preprocessor(None, (16, 16), mean=None, std=None, scale=None)
  crops = {image[y:y + 16, x:x + 16][:, ::d].tobytes(): (y, x, d)
           for y in range(5) for x in range(7) for d in (1, -1)}
  seen = {crops[preprocess(image, how, 0, i).astype(np.uint8).tobytes()]
          for i in range(300)}
  assert {s[0] for s in seen} == set(range(5))
  assert {s[1] for s in seen} == set(range(7))
  assert {s[2] for s in seen} == {1, -1}
  kept = {crops[preprocess(image, how, 0, i, flip=False).astype(
      np.uint8).tobytes()][2] for i in range(50)}
  assert kept == {1}


# ------------------------------------------------------------------ arrays


def test_encode_images():
  examples = [dict(image=picture(20, 30, 1, i), label=i) for i in range(3)]
  how = Preprocessor((8, 8))
  got = encode_images(examples, how, classes=3)
  assert got['image'].shape == (3, 8, 8, 3)
  assert got['label'].tolist() == [0, 1, 2] and got['label'].dtype == np.int32
  np.testing.assert_array_equal(
      got['image'][2], preprocess(examples[2]['image'], how))
  with pytest.raises(ValueError, match='label 2 of example 2 .* 0 .. 1'):
    encode_images(examples, how, classes=2)
  augmented = encode_images(examples, how, seed=4)
  np.testing.assert_array_equal(
      augmented['image'][1], preprocess(examples[1]['image'], how, 4, 1))


def test_sizes_that_differ():
  examples = [dict(image=picture(20, w), label=0) for w in (20, 30)]
  with pytest.raises(ValueError, match=r'image 1 is \[8, 12, 3\] .*one size'):
    encode_images(examples, Preprocessor((8,)))
  with pytest.raises(ValueError, match='no examples'):
    encode_images([], Preprocessor((8,)))


@pytest.mark.parametrize('config, match', [
    (dict(image_processor_type='VitImageProcessor', size=8), "mean 'ViT'"),
    (dict(size=8, do_pad=True), 'do_pad=True is not supported'),
    (dict(size=8, resample=9), 'resample=9; expected one of 0 .. 5'),
    (dict(), 'size=None; expected a number of pixels'),
    (dict(size=dict(longest_edge=8)), "size={'longest_edge': 8}; expected"),
    (dict(size=0), 'size=0; expected'),
    (dict(size=8, do_center_crop=True), 'crop_size=None; expected'),
    (dict(size=8, image_mean=None), 'image_mean=None; expected three'),
    (dict(size=8, image_mean=[.5]), r'image_mean=\[0.5\]; expected three'),
    (dict(size=8, image_std=[0, 1, 1]), 'image_std=.*none of them 0'),
    (dict(image_processor_type='ConvNextImageProcessor',
          size=dict(height=8, width=8)), 'ConvNext expects shortest_edge'),
])
def test_bad_settings(config, match):
  plain = dict(image_mean=[.5] * 3, image_std=[.5] * 3)
  with pytest.raises(ValueError, match=match):
    from_config({**plain, **config})


def test_bad_files(tmp_path):
  with pytest.raises(FileNotFoundError, match='preprocessor_config.json'):
    load_preprocessor(tmp_path)
  (tmp_path / 'preprocessor_config.json').write_text('{')
  with pytest.raises(ValueError, match='no JSON'):
    load_preprocessor(tmp_path)
  (tmp_path / 'own.json').write_text(json.dumps(dict(
      size=8, do_normalize=False)))
  assert load_preprocessor(tmp_path / 'own.json').resize == (8, 8)
