"""VTAB-1k: the 19 tasks, the 800/200/test protocol, samples for `runlocal`.

`stage=search` trains on 800 examples and is judged on 200; by default a config
trains on all 1000 and is judged on the test part, once. Sets come through
tensorflow-datasets. 100 epochs of 1000 images in batches of 64, AdamW, cosine,
as most papers that adapt ViT-B/16 do; no augmentation but resizing.

Source: "A Large-scale Study of Representation Learning with the Visual Task
Adaptation Benchmark" (Zhai et al., arXiv 1910.04867).
"""

from experiments import suites
from experiments.samples.tiny import tiny
from peftjax.data.vtab import VTAB

_FINAL = {'data.splits.train': 'train800val200', 'data.splits.test': 'test',
          'data.splits.validation': 'val200'}
TASKS = {name: {'data.name': f'tfds:vtab/{name}', **_FINAL} for name in VTAB}
_SAMPLE = {'data.name': 'omniglot100',
           'model.weights': lambda: tiny('vit'),
           'checkpoint_every': 0, 'data.splits.train': 'train',
           'data.splits.validation': 'validation'}


def config(method, lr, arg=None):
  """A VTAB-1k config; see `experiments.suites.config`."""
  words = (arg or '').split(',')
  search = 'stage=search' in words
  arg = ','.join(w for w in words if w != 'stage=search')
  tasks = TASKS
  if search:
    tasks = {name: {**t, 'data.splits.train': 'train800',
                    'eval_split': 'validation'} for name, t in TASKS.items()}
  return suites.config(
      method, tasks, 'caltech101', arg, 'vit_base', {'': _SAMPLE},
      task__name='image', batch=64, steps=1600, optim__lr=lr,
      optim__weight_decay=1e-4, optim__warmup=0.1)
