"""GLUE: tasks, lengths of training, samples for `runlocal`.

Batch sizes and epochs are those of LoRA's paper for RoBERTa-base (arXiv
2106.09685, table 9), but at most 40 epochs; warm-up 0.06 and a linear fall as
there. Test labels are hidden: what is reported is the validation part, as the
field does; `search` of a grid then has to be given other splits.
"""

import os

from experiments import suites
from experiments.samples.tiny import tiny

# task: (kind, training examples, batch, epochs, longest text, metric)
_TASKS = dict(
    cola=('classify', 8551, 32, 40, 64, 'matthews'),
    sst2=('classify', 67349, 16, 40, 128, 'accuracy'),
    mrpc=('classify', 3668, 16, 30, 128, 'accuracy'),
    stsb=('regress', 5749, 16, 40, 128, 'pearson'),
    qqp=('classify', 363846, 16, 25, 128, 'accuracy'),
    mnli=('classify', 392702, 16, 30, 128, 'accuracy'),
    qnli=('classify', 104743, 32, 25, 256, 'accuracy'),
    rte=('classify', 2490, 32, 40, 256, 'accuracy'))

TASKS = {
    name: {'task.name': kind, 'data.name': f'tfds:glue/{name}', 'batch': batch,
           'steps': epochs * n // batch, 'task.length': length,
           'task.metric': metric}
    for name, (kind, n, batch, epochs, length, metric) in _TASKS.items()}

_PAIRS = ('mrpc', 'qqp', 'mnli', 'qnli', 'rte')


def _sample(name):
  kind = 'regression' if name == 'stsb' else (
      'pair' if name in _PAIRS else 'single')
  return {'data.name': f'file:{os.path.join(suites.SAMPLES, kind)}',
          'model.weights': lambda: tiny('bert'), 'task.length': 48,
          'checkpoint_every': 0}


def config(method, lr, arg=None):
  """A GLUE config; see `experiments.suites.config`."""
  return suites.config(
      method, TASKS, 'rte', arg, 'roberta_base',
      {name: _sample(name) for name in TASKS}, optim__lr=lr,
      optim__schedule='linear', optim__warmup=0.06, eval_split='validation')
