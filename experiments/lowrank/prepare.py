r"""What grid.py starts from: a backbone for each task, with a head.

  PEFTJAX_DATA=DATA python -m experiments.lowrank.prepare

writes a folder a task: all-MiniLM-L6-v2's own files, with the two tensors of a
head beside them that was trained for 50 steps, alone, on the training part. And
clinc150_small with its rows in another order: the set's own is by class, so that
its first 1500 rows hold 30 of them. A minute on 2 CPU cores.
"""

import json
import os
import shutil

from absl import app
import numpy as np
import safetensors.numpy

from experiments import common
from experiments import suites
from experiments.lowrank import arms
from experiments.lowrank import grid
from peftjax.artifact import load_adapter
from peftjax.data import sources
from peftjax.interop.files import find_folder
from peftjax.train import train

STEPS = 50
FILE = 'model.safetensors'


def make(out, name, weights, **more):
  """Trains the head of one task; -> the folder.

  Args:
    out: Folder of the folders.
    name: The task's, and the folder's.
    weights: The backbone.
    **more: Further keys of the config, '__' for '.'.
  """
  config = grid.base(weights)
  config.steps, config.optim.lr = STEPS, arms.HEAD_RATE
  config.eval_every = 0
  config.eval_split = 'validation'
  for key, value in {**grid.TASKS.get(name, {}), **{
      k.replace('__', '.'): v for k, v in more.items()}}.items():
    common.put(config, key, value)
  work, folder = os.path.join(out, f'{name}.work'), os.path.join(out, name)
  if not os.path.exists(os.path.join(folder, 'config.json')):
    found = train(config, work)
    write(folder, weights, load_adapter(found['adapter']).theta)
  return folder


def write(folder, weights, theta):
  """A folder of the backbone with the head that `theta` holds."""
  source, part = find_folder(weights), f'{folder}.part'
  shutil.rmtree(part, ignore_errors=True)
  shutil.copytree(source, part)
  tensors = safetensors.numpy.load_file(os.path.join(source, FILE))
  head = theta['full']['head/out']
  # torch keeps kernels as [d_out, d_in].
  tensors['mean_classifier.weight'] = np.ascontiguousarray(
      np.asarray(head['kernel']).T)
  tensors['mean_classifier.bias'] = np.asarray(head['bias'])
  safetensors.numpy.save_file(tensors, os.path.join(part, FILE))
  os.replace(part, folder)


def shuffle(out, name):
  """Writes a text set of the data folder with its rows in a random order."""
  os.makedirs(out, exist_ok=True)
  for split in ('train', 'validation', 'test'):
    rows = sources.open_split(f'data:{name}', split).examples
    path = os.path.join(out, f'{split}.jsonl')
    with open(f'{path}.part', 'w', encoding='utf-8') as f:
      for i in np.random.RandomState(0).permutation(len(rows)):
        f.write(json.dumps(rows[int(i)]) + '\n')
    os.replace(f'{path}.part', path)


def main(argv):
  del argv
  shuffle(grid.SHUFFLED, 'clinc150_small')
  for name in grid.TASKS:
    print(make(grid.START, name, suites.backbone('minilm')))


if __name__ == '__main__':
  app.run(main)
