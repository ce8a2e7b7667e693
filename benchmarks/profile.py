"""Where the time of a step goes, op by op.

  python -m benchmarks.profile --model=encoder --methods=lora [--top=30]

Two steps under jax's profiler, after two that warm up; times are a step's, of
all threads together on a CPU, by what jax calls the op and by what XLA made of
it. Flags beside `--top` are those of benchmarks/step.py. On a GPU, set
XLA_FLAGS=--xla_gpu_enable_command_buffer= so that kernels have their op's name.
"""

import collections
import glob
import os
import re
import tempfile

from absl import app
from absl import flags
import jax

from benchmarks import arms
from benchmarks import step as step_lib

_TOP = flags.DEFINE_integer('top', 30, 'Lines to print.', lower_bound=1)
STEPS = 2
_DEFINED = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$', re.M)


def ops(arm):
  """{(XLA's name, type, jax's name): ms a step} of an arm."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(STEPS):
        arm.seconds()
    path, = glob.glob(os.path.join(folder, '**', '*.xplane.pb'), recursive=True)
    data = jax.profiler.ProfileData.from_file(path)
  lines = dict(_DEFINED.findall(arm.compiled.as_text()))
  found = collections.Counter()
  for plane in data.planes:
    for line in plane.lines:
      for event in line.events:
        name = event.name
        if 'GPU' in plane.name:  # kernels, by the op that they are of
          name = next((str(v) for k, v in event.stats if k == 'hlo_op'), name)
        elif name not in lines:
          continue
        text = lines.get(name, '')
        if ' while(' in text or ' call(' in text:  # what is inside is counted
          continue
        where = re.search(r'op_name="([^"]*)"', text)
        where = re.sub(r'block_\d+', 'block', where[1] if where else '')
        kind = re.sub(r'[.\d]+$', '', name)
        found[kind[:40], text.split('{')[0][:40], where[-80:]] += (
            event.duration_ns / 1e6 / STEPS)
  return found


def main(argv):
  del argv
  model, params = step_lib.make_model(None)
  flag = flags.FLAGS
  batch = arms.batch(flag.model, flag.batch, flag.tokens)
  for name in flag.methods or ['full', 'lora']:
    arm = step_lib.Arm(step_lib.method(name), model, params, batch)
    for _ in range(STEPS):
      arm.seconds()
    found = ops(arm)
    print(f'{name}: {arm.seconds() * 1000:.1f} ms a step, '
          f'{sum(found.values()):.1f} ms in ops')
    for key, ms in found.most_common(_TOP.value):
      print(f'{ms:9.2f}', *key, sep='  ')
    del arm


if __name__ == '__main__':
  app.run(main)
