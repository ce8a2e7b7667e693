"""E2E NLG: data, training as in LoRA's paper, samples for `runlocal`.

Batch 8, 5 epochs of 42061 pairs, AdamW with weight decay 0.01, 500 steps of
warm-up and a linear fall, label smoothing 0.1 (arXiv 2106.09685, table 11); the
loss is on the text alone, not on the record. Texts are written greedily, where
the paper searches with 10 beams.

`task=cleaned` is tensorflow-datasets' cleaned E2E (its scores are not those of
papers), `task=folder` the set `e2e` of a manifest folder ($PEFTJAX_DATA), and
`task=original` reads the challenge's own files, turned into JSON lines with
source, target and references, from $PEFTJAX_E2E.
"""

import os

from experiments import suites
from experiments.samples.tiny import tiny

_STEPS = 5 * 42061 // 8

TASKS = {
    'cleaned': {'data.name': 'tfds:gem/e2e_nlg', 'steps': 5 * 33525 // 8},
    'folder': {'data.name': 'data:e2e', 'steps': 5 * 10000 // 8},
    'original': {'steps': _STEPS, 'data.name': 'file:' + os.environ.get(
        'PEFTJAX_E2E', 'e2e')}}

_SAMPLE = {'data.name': f'file:{os.path.join(suites.SAMPLES, "e2e")}',
           'model.weights': lambda: tiny('gpt2'), 'task.length': 96,
           'task.max_new_tokens': 8, 'checkpoint_every': 0}


def config(method, lr, arg=None):
  """An E2E config; see `experiments.suites.config`."""
  return suites.config(
      method, TASKS, 'original', arg, 'gpt2_medium', {'': _SAMPLE},
      task__name='seq2seq', task__length=160, task__metric='bleu', batch=8,
      task__max_new_tokens=64, optim__lr=lr, optim__weight_decay=0.01,
      optim__schedule='linear', optim__warmup=500 / _STEPS,
      loss__label_smoothing=0.1)
