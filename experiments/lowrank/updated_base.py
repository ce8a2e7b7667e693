r"""Trans-PEFT: does an adapter survive the update of its base?

  PEFTJAX_DATA=DATA python -m experiments.lowrank.stories
  PEFTJAX_DATA=DATA python -m peftjax.compare --workdir=runs/lowrank_update \
      --config=experiments/lowrank/updated_base.py \
      --record=experiments/lowrank/update_cells.json
  PEFTJAX_DATA=DATA python -m experiments.lowrank.updated_base

Adapters of the attention kernels are trained on version 1, stories260k, for E2E
as in forget.py, and attached as they are to version 2, stories260k trained on in
full on other text: there they are judged. `lora_v2` is a LoRA trained on version
2, what could be had at best; the row `none` has the bases without an adapter;
`dropout` is a LoRA with as much noise of the plain kind. The last command writes
updated_base.json. `:runlocal` does two steps a cell.
"""

import json
import os

from absl import app
from absl import flags

from experiments.lowrank import forget
from experiments.lowrank import stories

_LORA = dict(name='lowrank.lora', rank=8, alpha=16., sites=dict(
    roles=('q', 'k', 'v', 'o')))
_TRANS = dict(name='lowrank.trans_peft', rank=8, alpha=16., dropout=0.)
ARMS = {
    'lora': (_LORA, 3e-3, {}),
    'dropout': (dict(_LORA, dropout=0.1), 3e-3, {}),
    'trans_drop': (dict(_TRANS, drop=0.1), 3e-3, {}),
    'trans_mask': (dict(_TRANS, drop=0., mask=0.1), 3e-3, {}),
    'lora_v2': (_LORA, 3e-3, {'model.weights': stories.UPDATED}),
}


def get_config(arg=None):
  """The grid; `arg` holds arms, and what `common.parse_arg` takes."""
  return forget.grid(arg, ARMS, 'e2e')


def measure(workdir, updated):
  """Rows of updated_base.json: losses on version 1 and on version 2."""
  rows = []
  found = stories.finished(workdir, 'e2e', ARMS)
  first = next((path for arm, _, path in found if arm != 'lora_v2'), None)
  if first:
    bare = {v: stories.losses(first, v, folded=False) for v in (None, updated)}
    rows.append(dict(arm='none', task='e2e', seed=0, **bare[updated],
                     **{f'{k}_v1': v for k, v in bare[None].items()}))
  for arm, seed, path in found:
    row = dict(arm=arm, task='e2e', seed=seed, **stories.losses(path, updated))
    if arm != 'lora_v2':
      row |= {f'{k}_v1': v for k, v in stories.losses(path).items()}
    rows.append(row)
    print(row)
  return rows


def main(argv):
  del argv
  rows = measure(_WORKDIR.value, stories.UPDATED)
  with open(_OUT.value, 'w', encoding='utf-8') as f:
    json.dump(rows, f, indent=1)
    f.write('\n')


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_string(
      'workdir', 'runs/lowrank_update', 'The finished grid.')
  _OUT = flags.DEFINE_string(
      'out', os.path.join(os.path.dirname(__file__), 'updated_base.json'),
      'JSON file to write.')
  app.run(main)
