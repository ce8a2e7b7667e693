"""Decides the claims from a grid's rows, by rules fixed before the runs.

  python -m experiments.claims.decide --rows=experiments/claims/results.json

The rules (SUP, NI, FEWER) are those of `experiments.rules`.
"""

import json

from absl import app
from absl import flags

from experiments.rules import Claim, Part, table
from peftjax import report

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


def main(argv):
  del argv
  with open(_ROWS.value) as f:
    rows = json.load(f)
  print(report.markdown(table(CLAIMS, rows)))


if __name__ == '__main__':
  _ROWS = flags.DEFINE_string('rows', 'experiments/claims/results.json',
                              'Rows written by peftjax.compare.')
  app.run(main)
