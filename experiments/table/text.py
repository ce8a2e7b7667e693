r"""The table's text half: every method on MiniLM and five sets.

  PEFTJAX_DATA=DATA python -m peftjax.compare \
      --config=experiments/table/text.py --workdir=runs/table_text \
      --record=experiments/table/text_cells.json

all-MiniLM-L6-v2 with a linear head on the mean of its tokens; 1000 training
examples, at most 500 to choose a rate by, at most 1000 of the test part; 100
steps of 16. Texts are cut at 12 to 40 tokens: at most a tenth of a set is
longer, and the run says how many. Every arm tries three rates, a factor 3
apart, for 30 steps; the best runs on three seeds. Hardware, wall time and
results: experiments/README.md. `:runlocal` does two steps a cell on samples,
with a tiny backbone.
"""

import os

import ml_collections

from experiments import common
from experiments import suites
from experiments.samples.tiny import tiny
from experiments.table import arms

TASKS = (
    ('trec6', {'data.name': 'data:trec6', 'task.length': 20, 'data.test': 0}),
    ('cola', {'data.name': 'data:cola', 'task.length': 20,
              'data.validation': 0, 'data.test': 0}),
    ('mpqa', {'data.name': 'data:mpqa', 'task.length': 12}),
    ('cr', {'data.name': 'data:cr', 'task.length': 40, 'data.validation': 0,
            'data.test': 0}),
    ('stsb_open', {'data.name': 'data:stsb_open', 'task.name': 'regress',
                   'task.length': 40, 'task.metric': 'spearman',
                   'data.test': 0}),
)
_SAMPLES = (
    ('single', {'data.name': f'file:{os.path.join(suites.SAMPLES, "single")}'}),
    ('regression', {
        'data.name': f'file:{os.path.join(suites.SAMPLES, "regression")}',
        'task.name': 'regress', 'task.metric': 'spearman'}))


def get_config(arg=None):
  """The grid; `arg` as in `common.parse_arg`."""
  given = common.parse_arg(arg)
  small = given.pop('runlocal', False)
  base = common.base()
  base.method = (common.HEAD,)
  base.model.weights = tiny('bert') if small else suites.backbone('minilm')
  base.model.scan = small
  base.task.name = 'classify'
  base.task.length = 40
  base.task.head = 'mean'
  base.steps, base.batch = 100, 16
  base.data.train, base.data.validation, base.data.test = 1000, 500, 1000
  base.optim.schedule = 'linear'
  base.eval_before = False
  base.checkpoint_every = 0
  for key, value in given.items():
    common.put(base, key, value)
  grid = ml_collections.ConfigDict()
  grid.base = base
  grid.arms = arms.of({}, ('kernel', 'bias', 'scale'))
  grid.tasks = _SAMPLES if small else TASKS
  grid.seeds = (0,) if small else (0, 1, 2)
  grid.search = None if small else dict(
      rates=(1 / 3, 1.0, 3.0), fraction=0.3, seed=0)
  return grid
