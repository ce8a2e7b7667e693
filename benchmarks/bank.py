"""One step of a bank of adapters against as many steps of single runs.

  python -m benchmarks.bank [--methods=lowrank.lora,scaling.ssf] \
      [--members=8] [--pairs=20] [--out=FILE]

The quickstart's base and images (`vit_s`, Kuzushiji-MNIST), every method with
its default settings and a new head. A bank's step and the single steps that it
stands for are interleaved, so that a busy machine slows both; the ratio is the
median over pairs. FLOPs and bytes are of the compiled programs and do not
depend on the machine's load.
"""

import json
import statistics
import time

from absl import app
from absl import flags
import jax
import numpy as np
from rich import print as rich_print
from rich import table as rich_table

from experiments import common
from peftjax import program
from peftjax import step as run_step
from peftjax import train
from peftjax.bank import step as bank_step

_METHODS = flags.DEFINE_list(
    'methods', ['lowrank.lora', 'orthogonal.oft', 'scaling.ssf',
                'selective.bitfit'], 'Methods to time.')
_MEMBERS = flags.DEFINE_integer('members', 8, 'Adapters.', lower_bound=1)
_PAIRS = flags.DEFINE_integer('pairs', 20, 'Timed pairs.', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch', 32, 'Images a member.', lower_bound=1)
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')


def steps(name, members, batch):
  """Both sides of one method.

  Returns:
    {side: [compiled, states, batches, pace, run.params]}: 'bank' has one state
    and batch, 'single' one of each member.
  """
  config = common.kmnist(
      (dict(name=name), common.HEAD), 3e-3, f'batch={batch}', mesh=dict(data=1))
  run, (stage,), case = train.prepare(config)
  runs = [run._replace(key=jax.random.key(i)) for i in range(members)]
  theta = lambda r: train.first_theta(r, stage, case.base.params)
  row, arrays = case.sample('train'), case.arrays['train']
  n = len(next(iter(arrays.values())))
  rows = [np.arange(i * batch, (i + 1) * batch) % n for i in range(members)]
  batches = [{k: v[r] for k, v in arrays.items()} for r in rows]
  states = [run_step.start(r, stage, theta(r), 0) for r in runs]
  one, _ = run_step.compile_step(run, stage, states[0], row)
  state, shared = bank_step.start(runs, stage, map(theta, runs))
  pace = bank_step.pace_of(runs, stage)
  many = bank_step.lower_step(run, stage, state, shared, row, pace).compile()
  put = lambda v: jax.device_put(v, run.mesh.devices.flat[0])
  stacked = {k: np.stack([b[k] for b in batches]) for k in batches[0]}
  return dict(
      single=[one, states, put(batches), run_step.pace_of(run, stage),
              run.params],
      bank=[many, [state], [put(stacked)], pace, run.params])


def seconds(side):
  """Wall time of one step of all members; their states move on."""
  compiled, states, batches, pace, params = side
  start = time.perf_counter()
  side[1] = jax.block_until_ready([
      compiled(s, params, b, pace)[0] for s, b in zip(states, batches)])
  return time.perf_counter() - start


def measure(name, members, batch, pairs):
  """One row of the table."""
  sides = steps(name, members, batch)
  for _ in range(2):
    for side in sides.values():
      seconds(side)
  times = [(seconds(sides['single']), seconds(sides['bank']))
           for _ in range(pairs)]
  ratios = sorted(b / a for a, b in times)
  one, many = (program.read(sides[k][0]) for k in ('single', 'bank'))
  return dict(
      method=name, members=members, batch=batch,
      seconds=dict(single=statistics.median(a for a, _ in times),
                   bank=statistics.median(b for _, b in times)),
      ratio=statistics.median(ratios),
      quartiles=(ratios[pairs // 4], ratios[3 * pairs // 4]),
      flops=dict(single=one.flops, bank=many.flops),
      xla_flops=dict(single=one.xla_flops, bank=many.xla_flops),
      argument_bytes=dict(single=one.arguments, bank=many.arguments),
      temp_bytes=dict(single=one.temp, bank=many.temp))


def main(argv):
  del argv
  k = _MEMBERS.value
  rows = [measure(name, k, _BATCH.value, _PAIRS.value)
          for name in _METHODS.value]
  table = rich_table.Table(
      title=f'{k} adapters of vit_s, {_BATCH.value} images each, '
      f'{jax.devices()[0].device_kind}, jax {jax.__version__}; FLOPs as a '
      'ratio, bytes of a single step in brackets')
  for column in ('method', f'{k} steps, ms', 'bank, ms', 'ratio', 'quartiles',
                 'FLOPs', 'args MiB', 'temp MiB'):
    table.add_column(column, justify='left' if column == 'method' else 'right')
  for row in rows:
    mib = lambda key, side, row=row: f'{row[key][side] / 2**20:.0f}'
    table.add_row(
        row['method'], *(f'{1000 * row["seconds"][s]:.0f}'
                         for s in ('single', 'bank')),
        f'{row["ratio"]:.2f}', '{:.2f} to {:.2f}'.format(*row['quartiles']),
        f'{row["flops"]["bank"] / (k * row["flops"]["single"]):.3f}',
        *(f'{mib(key, "bank")} ({mib(key, "single")})'
          for key in ('argument_bytes', 'temp_bytes')))
  rich_print(table)
  if _OUT.value:
    with open(_OUT.value, 'w', encoding='utf-8') as f:
      json.dump(rows, f, indent=1)
      f.write('\n')


if __name__ == '__main__':
  app.run(main)
