r"""The low-rank methods side by side, at equal search budget.

  PEFTJAX_DATA=DATA python -m experiments.lowrank.prepare
  PEFTJAX_DATA=DATA python -m peftjax.compare --workdir=runs/lowrank \
      --config=experiments/lowrank/grid.py:task=mpqa \
      --record=experiments/lowrank/mpqa_cells.json

and the same with clinc150. all-MiniLM-L6-v2, a linear head on the mean of its
tokens, 16 tokens (mpqa: 12), batches of 32, 200 steps, AdamW without weight
decay, 6 % warm-up and a linear fall. Every arm tries three rates, a factor
sqrt(10) apart, for 60 steps on seed 0, judged on the validation part; the best
runs on seeds 0, 1 and 2, and these alone read the test part. Every 25 steps
they look at the validation part, and the record keeps what they see.

The head is trained for 50 steps first, once a task, and all arms start from it:
methods that start from gradients would see none through a new head, whose
kernel is zero. It has a rate of its own, the same in all arms; where it is all
that is trained, that rate is searched.

`arms=lora+dora` runs a part of the arms, so that several processes can share
the work, each with a record of its own. Hardware, wall time, results: README.md.
`:runlocal` does two steps a cell on samples, with a tiny backbone.
"""

import os

import ml_collections

from experiments import common
from experiments import suites
from experiments.lowrank import arms as arms_lib
from experiments.samples.tiny import tiny

START = 'runs/lowrank_start'  # written by prepare.py
SHUFFLED = os.path.join(START, 'clinc150_data')
TASKS = {
    'clinc150': {'data.name': f'file:{SHUFFLED}', 'data.train': 1500},
    'mpqa': {'data.name': 'data:mpqa', 'data.train': 2000, 'task.length': 12}}
_SAMPLE = {'data.name': f'file:{os.path.join(suites.SAMPLES, "single")}'}


def base(weights):
  """The config that arms and tasks start from."""
  c = common.base()
  c.method = (common.HEAD,)
  c.model.weights = weights
  c.task.name = 'classify'
  c.task.length = 16
  c.task.head = 'mean'
  c.steps, c.batch, c.eval_batch = 200, 32, 100
  c.data.validation, c.data.test = 300, 1500
  c.optim.schedule, c.optim.warmup = 'linear', 0.06
  c.optim.groups.head.lr_abs = arms_lib.HEAD_RATE
  c.eval_before = False
  c.eval_every, c.watch_split = 25, 'validation'
  c.checkpoint_every = 0
  return c


def get_config(arg=None):
  """The grid; `arg` holds task, arms, and what `common.parse_arg` takes."""
  chosen, rest = common.choose(arg, task='', arms='')
  given = common.parse_arg(rest)
  small = given.pop('runlocal', False)
  grid = ml_collections.ConfigDict()
  grid.base = base(tiny('bert') if small else '')
  for key, value in given.items():
    common.put(grid.base, key, value)
  if small:
    grid.base.eval_every = 1
    grid.tasks = (('single', _SAMPLE),)
  else:
    names = common.pick(chosen['task'], TASKS, 'task')
    grid.tasks = tuple(
        (n, {**TASKS[n], 'model.weights': os.path.join(START, n)})
        for n in names)
  # Found ranks belong to a task: they are there where one is asked for.
  grid.arms = arms_lib.of(
      chosen['arms'], small, '' if small else chosen['task'])
  grid.seeds = (0,) if small else (0, 1, 2)
  grid.search = None if small else dict(
      rates=(10 ** -0.5, 1.0, 10 ** 0.5), fraction=0.3, seed=0)
  return grid
