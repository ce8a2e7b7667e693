"""The claims of the low-rank methods, by rules fixed before the runs.

  python -m experiments.lowrank.decide

prints them. The grid's rules are those of `experiments.rules`, over both tasks
with three seeds; what is measured otherwise has a function of its own here.
Rows come from the records of the grids and the files that the studies' scripts
wrote, all in this folder; a claim whose rows are not there says so.
"""

import json
import os
import tempfile

from absl import app
import numpy as np

from experiments import rules
from experiments.lowrank import grid as grid_lib
from experiments.lowrank import rates as rates_lib
from experiments.rules import Claim, Part
from peftjax import compare
from peftjax import report

FOLDER = os.path.dirname(os.path.abspath(__file__))

GRID = (
    Claim('LoRA is as good as full fine-tuning with few weights',
          'RoBERTa-base, GLUE: 87.24 with 0.8M weights, full 86.40',
          (Part('NI', 'lora', 'full', 1.0), Part('SUP', 'lora', 'head'),
           Part('FEWER', 'lora', 'full'))),
    Claim('LoRA+ is better than LoRA, and faster',
          '1 to 2 points, up to about twice as fast',
          (Part('SUP', 'lora_plus', 'lora'),
           Part('FASTER', 'lora_plus', 'lora', 1.2))),
    Claim('CorDA learns more from the instruction-previewed start',
          'LLaMA-2-7B: GSM8K 54.59, LoRA 42.68',
          (Part('SUP', 'corda_ipm', 'lora'),
           Part('SUP', 'corda_ipm', 'lora', key='early'))),
    Claim('EVA converges faster', 'the highest average of its domains',
          (Part('SUP', 'eva', 'lora', key='area'),)),
    Claim('EVA ends better', 'the highest average of its domains',
          (Part('SUP', 'eva', 'lora'),)),
    Claim('LoRA-XS is as good as LoRA with 100 times fewer weights',
          '7B models: more than 100 times fewer stored',
          (Part('NI', 'lora_xs_r8', 'lora', 2.0),
           Part('FEWER', 'lora_xs_r8', 'lora', 100, 'adapter'))),
    Claim('LoRA-XS of rank 24 is as good as LoRA, and its singular vectors '
          'matter', '7B models, RoBERTa-large with r = 25',
          (Part('NI', 'lora_xs_r24', 'lora', 2.0),
           Part('SUP', 'lora_xs_r24', 'lora_xs_random'))),
    Claim('LoRA-SB is better than LoRA-XS', 'clearly better at equal rank',
          (Part('SUP', 'lora_sb_r8', 'lora_xs_r8'),
           Part('SUP', 'lora_sb_r24', 'lora_xs_r24'))),
    Claim('LoRA-SB is as good as LoRA with fewer weights',
          'better, with 27 to 90 times fewer',
          (Part('NI', 'lora_sb_r24', 'lora', 1.0),
           Part('FEWER', 'lora_sb_r24', 'lora', key='adapter'))),
    Claim('KaSA is better than LoRA', 'RoBERTa-base: CoLA 65.82, RTE 81.59',
          (Part('SUP', 'kasa', 'lora'),)),
    Claim('DenseLoRA is better than a LoRA of its size, and as good as one of '
          'three times its size',
          'LLaMA3-8B: 83.8 with 0.01 %, LoRA 80.8 with 0.70 %',
          (Part('SUP', 'dense_lora_r16', 'lora_r3'),
           Part('NI', 'dense_lora_r16', 'lora', 1.0))),
    Claim('AutoLoRA\'s ranks are better than equal ones, than the same ranks '
          'elsewhere, and than AdaLoRA\'s', 'better on GLUE, E2E, tagging',
          (Part('SUP', 'auto_lora', 'lora_same'),
           Part('SUP', 'auto_lora', 'auto_lora_permuted'),
           Part('SUP', 'auto_lora', 'adalora_same'))),
    Claim('Selective LoRA is as good with the blocks that one penalty leaves',
          'CLIP: 5 to 6 % of the blocks stay active',
          (Part('NI', 'selective_lora', 'lora', 1.0, tasks=('mpqa',)),
           Part('FEWER', 'selective_lora', 'lora', key='adapter',
                tasks=('mpqa',)))),
)
FORGET = (
    Claim('CorDA keeps more of the base than LoRA, and learns as much',
          'LLaMA-2-7B: NQ 10.44, LoRA 1.91; GSM8K 45.64, LoRA 42.68',
          (Part('SUP', 'corda_kpm', 'lora', key='keep'),
           Part('NI', 'corda_kpm', 'lora', 0.02, 'bits'))),
    Claim('LoRA learns less than full fine-tuning, and forgets less',
          'Llama-2-7B, code and maths: both, in most settings',
          (Part('SUP', 'full', 'lora', key='bits'),
           Part('SUP', 'lora', 'full', key='keep'))),
)
UPDATE = (
    Claim('Trans-PEFT survives the update of its base better than LoRA',
          'seven bases, twelve sets: accuracy stays, without training again',
          (Part('SUP', 'trans_drop', 'lora', key='bits'),)),
    Claim('So does its masking, and better than plain dropout', 'as above',
          (Part('SUP', 'trans_mask', 'lora', key='bits'),
           Part('SUP', 'trans_mask', 'dropout', key='bits'))),
)
_UNITS = dict(intruders='intruders a kernel', share='of the width')


# ------------------------------------------------------------------------- rows
def recorded(grid, name, folder=FOLDER):
  """(rows, names of missing cells) of a grid, from its records alone.

  They are the files in `folder` named <name>...cells.json.
  """
  record = compare.Record(only=True)
  for file in sorted(os.listdir(folder)):
    if file.startswith(name) and file.endswith('cells.json'):
      record.cells |= compare.Record(os.path.join(folder, file)).cells
  with tempfile.TemporaryDirectory() as nowhere:
    return compare.run(grid, nowhere, lambda *_: None, record)


def grid_rows(task, folder=FOLDER):
  """(rows, missing) of one task of the grid, with what is made of them.

  adapter, file: what an arm trains, and stores, beside the head. area: mean
  validation loss of the steps to 150; early: at step 50.
  """
  rows, missing = recorded(
      grid_lib.get_config(f'task={task}'), task, folder)
  head = next((r['trained'] for r in rows if r['arm'] == 'head'), 0)
  for row in rows:
    row['adapter'] = row['trained'] - head
    row['file'] = row['stored'] - head
    if row.get('curve'):
      early = {int(k): v for k, v in row['curve'].items()}
      row['area'] = float(np.mean([v for k, v in early.items() if k <= 150]))
      row['early'] = early.get(50, float('nan'))
  return rows, missing


def stored(name, folder=FOLDER):
  """Rows that a study's script wrote; [] where there are none."""
  path = os.path.join(folder, f'{name}.json')
  if not os.path.exists(path):
    return []
  with open(path, encoding='utf-8') as f:
    return json.load(f)


# ----------------------------------------------------------------------- others
def difference(values, unit, bar=0.0):
  """(verdict, text) of differences, a seed each, against a bar above or at 0."""
  mean, width = report.interval(values)
  low, high = mean - width, mean + width
  verdict = 'shown' if low > bar else 'contradicted' if high < 0 else 'not shown'
  return verdict, (f'{mean:+.2f} {unit} [{low:+.2f}, {high:+.2f}], '
                   f'{len(values)} seeds')


def robust(rows):
  """DeLoRA against the learning rate."""
  width = {m: rates_lib.widths(rows, m) for m in rates_lib.METHODS}
  if not all(width.values()):
    return 'not measured', ['no rows of ' + ', '.join(
        m for m, w in width.items() if not w)]
  if len({tuple(sorted(w)) for w in width.values()}) > 1:
    return 'not measured', ['the methods do not share all seeds']
  verdict, text = difference(
      [width['delora'][s] - width['lora'][s] for s in width['lora']],
      'decades', 0.5)
  mean = ', '.join(f'{m} {np.mean(list(w.values())):.2f}'
                   for m, w in width.items())
  return verdict, [f'rates within 2 points of the best, decades: {mean}',
                   f'delora - lora, bar 0.5: {text}: {verdict}']


def compared(rows, key, pairs):
  """Differences of a key of intruders.json, for pairs of arms."""
  verdicts, texts = [], []
  for arm, other in pairs:
    by = {a: {r['seed']: r[key] for r in rows if r['arm'] == a}
          for a in (arm, other)}
    if not all(by.values()):
      return 'not measured', [f'no rows of {arm} or {other}']
    if set(by[arm]) != set(by[other]):
      return 'not measured', [f'{arm} and {other} do not share all seeds']
    verdict, text = difference(
        [by[arm][s] - by[other][s] for s in by[arm]], _UNITS[key])
    verdicts.append(verdict)
    texts.append(f'{arm} - {other}: {text}: {verdict}')
  if 'contradicted' in verdicts:
    return 'contradicted', texts
  return ('shown' if set(verdicts) == {'shown'} else 'not shown'), texts


def high_rank(rows):
  """Whether full fine-tuning's changes need more than a quarter of the width."""
  share = [r['share'] for r in rows if r['arm'] == 'full']
  if not share:
    return 'not measured', ['no rows of full']
  verdict, text = difference([v - 0.25 for v in share], _UNITS['share'])
  noise = np.mean([r['rank_noise'] / r['rank'] for r in rows
                   if r['arm'] == 'full'])
  return verdict, [f'share - 0.25: {text}: {verdict}',
                   f'noise of its norm: {noise:.2f} times the rank']


def all_lines(folder=FOLDER):
  """[{column: text}] of all claims."""
  rows = [r for task in grid_lib.TASKS for r in grid_rows(task, folder)[0]]
  lines = rules.table(GRID, rows)
  lines += rules.table(FORGET, stored('forget', folder))
  lines += rules.table(UPDATE, stored('updated_base', folder))
  spread = recorded(rates_lib.get_config(), 'rates', folder)[0]
  found = stored('intruders', folder)
  for name, paper, (verdict, texts) in (
      ('DeLoRA takes a wider range of learning rates than LoRA',
       'far less sensitive to rate and length', robust(spread)),
      ('LoRA of rank 1 brings intruder dimensions, full fine-tuning few',
       'RoBERTa-base, MNLI: many against none or few',
       compared(found, 'intruders', (
           ('lora_r1', 'full'), ('lora_r1', 'rslora_r64')))),
      ('Changes of full fine-tuning have a high rank',
       'Llama-2-7B: about half of the directions for 90 %',
       high_rank(found))):
    lines.append({'claim': name, 'the paper': paper, 'here': '<br>'.join(texts),
                  'verdict': f'**{verdict}**'})
  return lines


def main(argv):
  del argv
  print(report.markdown(all_lines()))


if __name__ == '__main__':
  app.run(main)
