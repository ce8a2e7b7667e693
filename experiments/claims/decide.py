"""Decides the claims from a grid's rows, by rules fixed before the runs.

  python -m experiments.claims.decide --rows=experiments/claims/results.json

Rules, on seed-paired differences in points of accuracy, with the 95 % t
interval over seeds:

  SUP      shown if the interval lies above 0, contradicted if below 0
  NI(m)    shown if its lower end lies above -m, contradicted if its upper end
           lies below -m
  FEWER    the first arm trains (or stores) fewer numbers: exact

A claim with several parts is shown if every part is, contradicted if any part
is, else not shown.
"""

import json
from typing import NamedTuple

from absl import app
from absl import flags

from peftjax import report


class Part(NamedTuple):
  rule: str  # 'SUP', 'NI' or 'FEWER'
  arm: str
  other: str
  margin: float = 0.0  # points


class Claim(NamedTuple):
  name: str
  paper: str
  parts: tuple[Part, ...]


CLAIMS = (
    Claim('SSF comes close to full fine-tuning',
          'SSF beats full fine-tuning, VTAB-1k mean 73.10 against 65.57',
          (Part('NI', 'ssf', 'full', 1.0), Part('FEWER', 'ssf', 'full'))),
    Claim('SSF beats full fine-tuning and the biases alone',
          'VTAB-1k 73.10, full 65.57, 800 training images a task as here',
          (Part('SUP', 'ssf', 'full'), Part('SUP', 'ssf', 'bitfit'))),
    Claim('BitFit equals full fine-tuning on small data, and beats as many '
          'random scalars',
          'GLUE with BERT-large: comparable at 0.08 % of the parameters',
          (Part('NI', 'bitfit', 'full', 1.5),
           Part('SUP', 'bitfit', 'random_mask'))),
    Claim('BOFT(2, 8) is as good as OFT (b = 16) with fewer parameters, and '
          'better than LoRA of that size',
          'GLUE: 89.89 (0.75M) against 89.77 (0.79M) and 88.50 (LoRA, 1.33M)',
          (Part('NI', 'boft', 'oft', 1.0), Part('FEWER', 'boft', 'oft'),
           Part('SUP', 'boft', 'lora_r4'))),
    Claim('Diff pruning at 0.5 % density matches full fine-tuning, and its '
          'choice of entries matters',
          'GLUE with BERT-large: matches at 0.5 % per task',
          (Part('NI', 'diff_pruning', 'full', 1.0),
           Part('SUP', 'diff_pruning', 'random_mask'))),
)


def decide_part(part, rows):
  """(verdict, text) of one part."""
  if part.rule == 'FEWER':
    mine, other = (next(r for r in rows if r['arm'] == a)['trained']
                   for a in (part.arm, part.other))
    verdict = 'shown' if mine < other else 'contradicted'
    return verdict, f'{part.arm} {mine:,} against {part.other} {other:,}'
  mean, low, high, n = (
      report.paired(rows, part.arm, part.other))
  mean, low, high = 100 * mean, 100 * low, 100 * high
  bar = -part.margin
  if low > bar:
    verdict = 'shown'
  elif high < bar:
    verdict = 'contradicted'
  else:
    verdict = 'not shown'
  rule = part.rule if part.rule == 'SUP' else f'NI({part.margin:g})'
  return verdict, (f'{rule} {part.arm} - {part.other}: {mean:+.2f} points '
                   f'[{low:+.2f}, {high:+.2f}], {n} seeds')


def decide(claim, rows):
  """(verdict, [text of a part]) of a claim."""
  verdicts, texts = [], []
  for part in claim.parts:
    verdict, text = decide_part(part, rows)
    verdicts.append(verdict)
    texts.append(f'{text}: {verdict}')
  if 'contradicted' in verdicts:
    return 'contradicted', texts
  return ('shown' if set(verdicts) == {'shown'} else 'not shown'), texts


def main(argv):
  del argv
  with open(_ROWS.value) as f:
    rows = json.load(f)
  lines = []
  for claim in CLAIMS:
    verdict, texts = decide(claim, rows)
    lines.append({'claim': claim.name, 'the paper': claim.paper,
                  'measured here': '<br>'.join(texts),
                  'verdict': f'**{verdict}**'})
  print(report.markdown(lines))


if __name__ == '__main__':
  _ROWS = flags.DEFINE_string('rows', 'experiments/claims/results.json',
                              'Rows written by peftjax.compare.')
  app.run(main)
