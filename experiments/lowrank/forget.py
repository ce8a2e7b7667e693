r"""Learning against forgetting: what low-rank methods keep of the base.

  PEFTJAX_DATA=DATA python -m experiments.lowrank.stories
  PEFTJAX_DATA=DATA python -m peftjax.compare --workdir=runs/lowrank_forget \
      --config=experiments/lowrank/forget.py \
      --record=experiments/lowrank/forget_cells.json
  PEFTJAX_DATA=DATA python -m experiments.lowrank.forget

stories260k on E2E records, 2000 training pairs, 200 steps of 8 rows of at most
288 tokens, the loss on the text alone; five rates, a factor sqrt(10) apart, for
60 steps on seed 0, the best on seeds 0, 1 and 2. The last command writes
forget.json: for every adapter its loss on all 630 test pairs (learnt) and
KL(base || tuned) a token on 200 of the base's own sequences (kept, the smaller
the better). CorDA-KPM calibrates on 200 others. `:runlocal` does two steps a
cell.
"""

import json
import os

from absl import app
from absl import flags
import ml_collections

from experiments import common
from experiments.lowrank import stories

_KEEP = {'calibrate.name': f'file:{stories.SAMPLES}', 'calibrate.batches': 25,
         'calibrate.batch': 8}
# name: (method, centre of the search, further keys)
ARMS = {
    'full': (dict(name='selective.full'), 1e-3, {}),
    'lora': (dict(name='lowrank.lora', rank=8, alpha=16.), 3e-3, {}),
    'lora_r32': (dict(name='lowrank.lora', rank=32, alpha=64.), 3e-3, {}),
    'pissa': (dict(name='lowrank.pissa', rank=8), 1e-3, {}),
    'corda_kpm': (dict(name='lowrank.corda', rank=8, mode='kpm'), 3e-3, _KEEP),
}


def get_config(arg=None):
  """The grid; `arg` holds arms, and what `common.parse_arg` takes."""
  return grid(arg, ARMS, 'e2e')


def grid(arg, arms, task):
  """A grid of the decoder.

  Args:
    arg: As of `get_config`.
    arms: {name: (method, centre of its search, further keys)}.
    task: What its task is called.
  """
  chosen, rest = common.choose(arg, arms='')
  given = common.parse_arg(rest)
  small = given.pop('runlocal', False)
  out = ml_collections.ConfigDict()
  out.base = stories.base()
  if small:
    stories.local(out.base)
  for key, value in given.items():
    common.put(out.base, key, value)
  out.arms = tuple(
      (name, {'method': (arms[name][0],), 'optim.lr': arms[name][1],
              **({} if small else arms[name][2])})
      for name in common.pick(chosen['arms'], arms, 'arms'))
  out.tasks = ((task, {}),)
  out.seeds = (0,) if small else (0, 1, 2)
  out.search = None if small else dict(
      rates=tuple(10 ** (0.5 * i) for i in range(-1, 4)), fraction=0.3, seed=0)
  return out


def measure(workdir, samples):
  """Rows of forget.json."""
  rows, own = [], stories.samples(samples)
  for arm, seed, path in stories.finished(workdir, 'e2e', ARMS):
    rows.append(dict(arm=arm, task='e2e', seed=seed, **stories.losses(path),
                     keep=stories.kept(path, own)))
    print(rows[-1])
  return rows


def main(argv):
  del argv
  rows = measure(_WORKDIR.value, stories.SAMPLES)
  with open(_OUT.value, 'w', encoding='utf-8') as f:
    json.dump(rows, f, indent=1)
    f.write('\n')


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_string(
      'workdir', 'runs/lowrank_forget', 'The finished grid.')
  _OUT = flags.DEFINE_string(
      'out', os.path.join(os.path.dirname(__file__), 'forget.json'),
      'JSON file to write.')
  app.run(main)
