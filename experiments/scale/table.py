"""The plans of large models, recorded, and the tables in docs/pods.md.

  python -m experiments.scale.table --run    # needs libtpu; takes up its work
  python -m experiments.scale.table --write  # the tables, from the records

Each cell is one call of `python -m peftjax.compile`, recorded in plans/. Every
method stands beside 'norms', which trains nothing but the scales of the norms:
what that run sends about is what the frozen base costs.
"""

import json
import os
import subprocess
import sys

from absl import app
from absl import flags

from experiments import tables
from peftjax import report

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(_HERE))
_PLANS = os.path.join(_HERE, 'plans')
_PAGE = os.path.join(_ROOT, 'docs', 'pods.md')

# {slice: {model: arguments of its config}}: 4 rows a row of chips for Llama.
SLICES = {
    'v5e:4x4': dict(llama3_8b='batch=16', vit_l='batch=512'),
    'v5e:16x16': dict(llama3_8b='batch=256', vit_l='batch=8192')}
TOKENS = dict(llama3_8b=2048, vit_l=197)
METHODS = dict(norms='norms', lora='LoRA', oft='OFT', boft='BOFT', full='full')
BASE = 'norms'


def path(model, method, topology):
  name = f'{model}_{method}_{topology.replace(":", "_")}.json'
  return os.path.join(_PLANS, name)


def command(model, method, topology):
  """Arguments of python for a cell, from the root of the repository."""
  return ['-m', 'peftjax.compile', f'--topology={topology}',
          f'--config=experiments/scale/{model}.py:method={method},'
          f'{SLICES[topology][model]}']


def cells():
  for topology, models in SLICES.items():
    for model in models:
      for method in METHODS:
        yield model, method, topology


def run(only=()):
  """Compiles the cells that are not recorded, one after the other."""
  os.makedirs(_PLANS, exist_ok=True)
  for cell in cells():
    out = path(*cell)
    if os.path.exists(out) or not set(only) <= set(cell):
      continue
    print(' '.join(cell), flush=True)
    code = subprocess.run(
        [sys.executable, *command(*cell), f'--out={out}'], cwd=_ROOT,
        check=False).returncode
    if code not in (0, 3):  # 3: it does not fit, which is recorded
      raise SystemExit(f'{" ".join(cell)}: ended with {code}')


def read(*cell):
  """The record of a cell; None: there is none."""
  if not os.path.exists(path(*cell)):
    return None
  with open(path(*cell), encoding='utf-8') as f:
    return json.load(f)


def rows(topology, model):
  """(memory, communication): lines of the tables of one model on one slice."""
  found = {m: read(model, m, topology) for m in METHODS}
  found = {m: r for m, r in found.items() if r}
  memory, sent = [], []
  for method, r in found.items():
    first = {'slice': topology, 'method': METHODS[method],
             'trained': f'{r["trained"]:,}'}
    if 'refusal' in r:
      memory.append(dict(first, **{
          'theta': _mib(r['theta_bytes_here']), 'arguments': '-', 'temp': '-',
          'peak': f'more than fits ({_gib(r["needed"])})', 'TFLOP': '-'}))
      continue
    m = r['memory']
    memory.append(dict(first, **{
        'theta': _mib(r['theta_bytes_here']), 'arguments': _gib(m['arguments']),
        'temp': _gib(m['temp']), 'peak': _gib(m['peak']),
        'TFLOP': f'{r["flops"] / 1e12:.1f}'}))
    line, base = {'theta': _mib(r['theta_bytes'])}, found.get(BASE, {})
    for name, amount in traffic(r, model).items():
      known = method != BASE and 'moved' in base
      more = amount - traffic(base, model)[name] if known else 0
      line |= {name: _mib(amount),
               f'{name}, more': f'{more / 2**20:+,.0f}' if known else ''}
    sent.append(first | line)
  return memory, sent


def traffic(record, model):
  """Bytes of the collectives of one step, by what they carry.

  Activations are known by their rows and tokens. The rest are pieces of the
  base and of theta that are put together, and gradients of theta that are
  summed.
  """
  rows = record['batch'] // record['mesh']['data']
  tokens = {TOKENS[model], rows * TOKENS[model]}
  out = dict.fromkeys(('pieces', 'gradients', 'activations'), 0)
  for g in record['moved']:
    summed = g['kind'] in ('all-reduce', 'reduce-scatter')
    out['activations' if tokens & set(g['shape'][:3]) else
        'gradients' if summed else 'pieces'] += g['bytes']
  return out


def _mib(n):
  return f'{n / 2**20:,.0f}' if n >= 10 * 2**20 else f'{n / 2**20:.1f}'


def _gib(n):
  return '?' if n is None else f'{n / 2**30:.2f}'


def write():
  """Puts the tables of what is recorded into docs/pods.md."""
  for model in TOKENS:
    both = [rows(topology, model) for topology in SLICES]
    for i, name in enumerate(('memory', 'traffic')):
      lines = [line for pair in both for line in pair[i]]
      if lines:
        tables.fill(_PAGE, f'{model}_{name}', report.markdown(lines))


def main(argv):
  del argv
  if _RUN.value:
    run(_ONLY.value)
  if _WRITE.value:
    write()


if __name__ == '__main__':
  _RUN = flags.DEFINE_bool('run', False, 'Compile what is not recorded.')
  _WRITE = flags.DEFINE_bool('write', False, 'Write the tables into the page.')
  _ONLY = flags.DEFINE_list('only', [], 'Words that a cell must all have.')
  app.run(main)
