"""Test parts that vit_s was not pretrained on: every second image.

  python -m experiments.table.halves --data_dir=DATA --out=runs/halves

vit_s saw the training and validation images and the even test images of eurosat
and pets5 (experiments/pretrain/train_vit.py). The files written here hold the
odd test images alone.
"""

import os

from absl import app
from absl import flags
import numpy as np

NAMES = ('eurosat', 'pets5')


def main(argv):
  del argv
  os.makedirs(_OUT.value, exist_ok=True)
  for name in NAMES:
    arrays = dict(np.load(os.path.join(_DATA.value, 'vision', f'{name}.npz')))
    for key in ('x_test', 'y_test'):
      arrays[key] = arrays[key][1::2]
    path = os.path.join(_OUT.value, f'{name}.npz')
    np.savez_compressed(f'{path}.part.npz', **arrays)
    os.replace(f'{path}.part.npz', path)
    print(f'{path}: {len(arrays["y_test"])} test images')


if __name__ == '__main__':
  _DATA = flags.DEFINE_string('data_dir', '../shared/data', 'Holds vision/.')
  _OUT = flags.DEFINE_string('out', 'runs/halves', 'Folder to write.')
  app.run(main)
