"""The 19 tasks of the Visual Task Adaptation Benchmark and their 1k protocol.

"A Large-scale Study of Representation Learning with the Visual Task Adaptation
Benchmark" (Zhai et al., arXiv 1910.04867); splits, labels and thresholds are
those of google-research/task_adaptation. Every task has

  train800, val200   for choosing hyper-parameters
  train800val200     for the run that is reported
  test               all of it
  train, validation  all of it, for the protocol with full data

Papers print the mean of 19 tasks or the mean of the means of `GROUPS`; the two
differ. task_adaptation pins kitti 3.1.0 and oxford_iiit_pet 3.*; newer versions
of tensorflow-datasets write 3.3.0 and 4.0.0.
"""

from typing import Callable, NamedTuple

import numpy as np


class Task(NamedTuple):
  """One task: a builder of tensorflow-datasets, its splits, its labels."""
  builder: str
  splits: dict          # {our name: split of theirs}
  example: Callable     # dict of theirs -> dict(image, label)
  labels: object        # their feature that holds the names, or the names


def _halves(train='train', validation='validation', test='test'):
  """Splits of a set that comes with a validation split."""
  return dict(
      train=train, validation=validation, test=test,
      train800=f'{train}[:800]', val200=f'{validation.split("[")[0]}[:200]',
      train800val200=f'{train}[:800]+{validation.split("[")[0]}[:200]')


def _cut(train, end='', test='test'):
  """Splits of a set whose first `train` examples are for training."""
  some = f'train[{train}:{train + 200}]'
  return dict(
      train=f'train[:{train}]', validation=f'train[{train}:{end}]', test=test,
      train800='train[:800]', val200=some, train800val200=f'train[:800]+{some}')


def _label(key):
  return lambda e: dict(image=e['image'], label=e[key])


def _classes(n):
  return tuple(str(i) for i in range(n))


def _last_below(thresholds, value):
  """Place of the last threshold that is smaller; thresholds ascend."""
  return int(np.flatnonzero(np.asarray(thresholds) < value).max(initial=0))


def _clevr_count(e):
  # 3 to 10 objects.
  return dict(image=e['image'], label=len(e['objects']['size']) - 3)


def _clevr_distance(e):
  nearest = np.min(np.asarray(e['objects']['pixel_coords'])[:, 2])
  bounds = (0., 8., 8.5, 9., 9.5, 10., 100.)
  return dict(image=e['image'], label=_last_below(bounds, nearest))


def _kitti_distance(e):
  # Cars, vans and trucks are types 0, 1 and 2; z is in metres. With none of
  # them in sight the label is 3.
  objects = e['objects']
  z = [at[2] for kind, at in zip(objects['type'], objects['location'])
       if kind < 3]
  bounds = (-100., 8., 20., 999.)
  return dict(image=e['image'],
              label=_last_below(bounds, min([*z, 1000.])))


def _dsprites(key, values):
  """16 classes of neighbouring values; pixels 0 and 1 become 0 and 255."""
  def example(e):
    return dict(image=np.uint8(255) * (np.asarray(e['image']) > 0),
                label=int(e[key] * 16 // values))
  return example


_DSPRITES = _cut(589_824, end=663_552, test='train[663552:]')
_NORB = _halves(validation='test[:50%]', test='test[50%:]')

GROUPS = dict(
    natural=('caltech101', 'cifar100', 'dtd', 'oxford_flowers102',
             'oxford_iiit_pet', 'sun397', 'svhn'),
    specialized=('diabetic_retinopathy', 'eurosat', 'patch_camelyon',
                 'resisc45'),
    structured=('clevr_count', 'clevr_distance', 'dmlab', 'dsprites_location',
                'dsprites_orientation', 'kitti_distance', 'smallnorb_azimuth',
                'smallnorb_elevation'))

VTAB = dict(
    caltech101=Task('caltech101', _cut(2_754), _label('label'), 'label'),
    cifar100=Task('cifar100', _cut(45_000), _label('label'), 'label'),
    dtd=Task('dtd', _halves(), _label('label'), 'label'),
    oxford_flowers102=Task('oxford_flowers102', _halves(), _label('label'),
                           'label'),
    oxford_iiit_pet=Task('oxford_iiit_pet', _cut(2_944), _label('label'),
                         'label'),
    sun397=Task('sun397/tfds', _halves(), _label('label'), 'label'),
    svhn=Task('svhn_cropped', _cut(65_931), _label('label'), 'label'),

    diabetic_retinopathy=Task(
        'diabetic_retinopathy_detection/btgraham-300', _halves(),
        _label('label'), 'label'),
    eurosat=Task('eurosat/rgb', _cut(16_200, 21_600, 'train[21600:]'),
                 _label('label'), 'label'),
    patch_camelyon=Task('patch_camelyon', _halves(), _label('label'), 'label'),
    resisc45=Task('resisc45', _cut(18_900, 25_200, 'train[25200:]'),
                  _label('label'), 'label'),

    clevr_count=Task('clevr', _cut(63_000, test='validation'), _clevr_count,
                     _classes(8)),
    clevr_distance=Task('clevr', _cut(63_000, test='validation'),
                        _clevr_distance, _classes(6)),
    dmlab=Task('dmlab', _halves(), _label('label'), 'label'),
    dsprites_location=Task('dsprites', _DSPRITES,
                           _dsprites('label_x_position', 32), _classes(16)),
    dsprites_orientation=Task('dsprites', _DSPRITES,
                              _dsprites('label_orientation', 40),
                              _classes(16)),
    kitti_distance=Task('kitti', _halves(), _kitti_distance, _classes(4)),
    smallnorb_azimuth=Task('smallnorb', _NORB, _label('label_azimuth'),
                           'label_azimuth'),
    smallnorb_elevation=Task('smallnorb', _NORB, _label('label_elevation'),
                             'label_elevation'))
