"""Images are kept as pixels, and normalised where the model runs."""

import os

import jax
import numpy as np
import pytest

from peftjax import case as case_lib
from peftjax import evaluate
from peftjax import train as train_lib
from peftjax.data import images, pipeline, sources


def head_only(make_config, weights, **more):
  config = make_config(weights, 'image', 'digits', data__train=48,
                       data__test=24, model__scan=False, **more)
  config.method = (dict(name='selective.full', sites=dict(roles='head')),)
  return config


def test_a_folders_images_are_pixels_until_the_model_reads_them(
    make_config, vit_folder):
  config = head_only(make_config, vit_folder)
  case = case_lib.load(config, ('train', 'test'))
  source = sources.open_split('digits', 'test')
  want = images.encode_images(
      [source.examples[i] for i in range(24)],
      images.load_preprocessor(vit_folder), 10)
  held_out = case.arrays['test']
  assert held_out['image'].dtype == np.uint8
  assert held_out['image'].shape == (24, 12, 12, 3)
  np.testing.assert_array_equal(held_out['label'], want['label'])
  (got,), kwargs = jax.jit(case.task.inputs)(held_out)
  assert got.dtype == np.float32 and not kwargs
  assert np.abs(want['image']).max() > 1.3  # neither 0 .. 255 nor -1 .. 1
  np.testing.assert_allclose(got, want['image'], rtol=0, atol=1e-6)


def test_weight_files_keep_their_floats(make_config, tiny_weights):
  config = head_only(make_config, tiny_weights)
  case = case_lib.load(config, ('test',))
  want = pipeline.load_split('digits', 'test', size=8)
  for name, value in case.arrays['test'].items():
    assert value.dtype == want[name].dtype
    # Resizing whole splits of other lengths may round otherwise.
    np.testing.assert_allclose(value, want[name][:24], rtol=0, atol=1e-6)
  (got,), _ = case.task.inputs(case.arrays['test'])
  assert got is case.arrays['test']['image']


def test_a_run_on_pixels_is_judged_as_its_adapter_is(
    make_config, vit_folder, tmp_path):
  config = head_only(make_config, vit_folder, steps=20, optim__lr=0.1)
  config.data.test = 0
  after = train_lib.train(config, str(tmp_path / 'run'), False)['after']
  found = evaluate.evaluate_adapter(os.path.join(tmp_path, 'run', 'adapter'))
  assert found['base']['loss'] == pytest.approx(np.log(10), rel=1e-4)
  assert found['adapted'] == pytest.approx(after, rel=1e-5)
  assert after['loss'] < np.log(10) - 0.1
