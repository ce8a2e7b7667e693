"""Named entities: tasks, lengths of training, samples for `runlocal`.

Scored by entity F1 as conlleval counts it. `conll2003` is read through
tensorflow-datasets; `uner_en_ewt` and `masakhaner2_*` are sets of a manifest
folder ($PEFTJAX_DATA).
"""

import os

from experiments import suites
from experiments.samples.tiny import tiny

_LOCAL = ('uner_en_ewt', *(f'masakhaner2_{code}' for code in (
    'hau', 'ibo', 'kin', 'lug', 'luo', 'pcm', 'swa', 'wol', 'yor')))

TASKS = {
    'conll2003': {'data.name': 'tfds:conll2003', 'steps': 2200},
    **{name: {'data.name': f'data:{name}', 'steps': 600} for name in _LOCAL}}

_SAMPLE = {'data.name': f'file:{os.path.join(suites.SAMPLES, "tagging")}',
           'model.weights': lambda: tiny('bert'), 'task.length': 32,
           'checkpoint_every': 0}


def config(method, lr, arg=None):
  """A config for named entities; see `experiments.suites.config`."""
  return suites.config(
      method, TASKS, 'conll2003', arg, 'bert_base', {'': _SAMPLE},
      task__name='tag', task__length=128, task__metric='f1', batch=32,
      optim__lr=lr, optim__schedule='linear', optim__warmup=0.06)
