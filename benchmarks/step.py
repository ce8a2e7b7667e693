"""A training step of every method: time, FLOPs, memory, traffic.

  python -m benchmarks.step --model=encoder --out=benchmarks/step_encoder.json
  python -m benchmarks.step --model=decoder --methods=lora,oft --torch=false

The step is the one that `peftjax.train` runs: forward, backward, AdamW, checks
for what is not finite. Each arm's step is timed beside one of full fine-tuning
in this process, and beside one of the same method in Hugging Face PEFT on torch
in a process of its own (torch_worker.py), which has the same weights, batch,
optimiser and threads and is idle meanwhile. A ratio is the median over pairs,
below 1 where the arm is faster; the quartiles say how noisy it was. Both sides'
logits must agree before anything is timed.

FLOPs, bytes and traffic are read from the compiled step (peftjax/program.py)
and do not depend on the machine's load: `gflop` is of matrix products, `bound`
what no step on a frozen base can do without (see `bound`), `weight_shaped` the
bytes of arrays of a kernel's shape that a step computes, `all_reduce` what 8
devices that split the batch exchange in a step.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
from rich import console as rich_console

from benchmarks import arms
from benchmarks import report
import peftjax
from peftjax import config as config_lib
from peftjax import phases
from peftjax import program
from peftjax import sharding
from peftjax import step as step_lib
from peftjax import trees
from peftjax.interop import families
from peftjax.interop import huggingface
from peftjax.method import nearest
from peftjax.tasks import classification
from peftjax.tasks import lm

_MODEL = flags.DEFINE_enum('model', 'encoder', sorted(arms.MODELS), 'Model.')
_METHODS = flags.DEFINE_list(
    'methods', None, 'Arms beside full fine-tuning; by default all that the '
    'model has.')
_BATCH = flags.DEFINE_integer('batch', 32, 'Texts a step.', lower_bound=1)
_TOKENS = flags.DEFINE_integer('tokens', 64, 'Tokens a text.', lower_bound=2)
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'],
                           'Of the computation and of the frozen base.')
_PAIRS = flags.DEFINE_integer('pairs', 20, 'Timed pairs.', lower_bound=1)
_TORCH = flags.DEFINE_bool('torch', True, 'Time PEFT on torch too.')
_SCAN = flags.DEFINE_bool('scan', False, 'Stack the layers.')
_TIME = flags.DEFINE_bool('time', True, 'Time; otherwise only compile.')
_TRAFFIC = flags.DEFINE_bool('traffic', True, 'Read the traffic of 8 devices.')
_TRAFFIC_OF = flags.DEFINE_list(
    'traffic_of', None, 'Only prints the traffic of these arms, as JSON.')
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')


# ------------------------------------------------------------------- one step
def make_model(folder):
  """(model, params) of random weights; those of float32 go to `folder` too."""
  config = arms.MODELS[_MODEL.value]
  module = families.family(config['model_type'])
  dtype = jnp.dtype(_DTYPE.value)
  model = module.build(config, head=families.own_head(config), dtype=dtype,
                       remat=False, scan=_SCAN.value)
  ids = jnp.zeros((1, 8), jnp.int32)

  # The classifier's zeros would hide the gradient of all else.
  def init(key):
    params = model.init(key, ids)['params']
    return jax.tree.map(
        lambda v: 0.02 * jax.random.normal(key, v.shape)
        if v.ndim > 1 else v, params)

  params = jax.jit(init)(jax.random.key(0))
  if folder:
    huggingface.save(folder, model, params, like=config)
  return model, jax.tree.map(lambda v: v.astype(dtype), params)


def method(name):
  return peftjax.load(**arms.METHODS[name])


class Arm:
  """One method's step, compiled, and its state."""

  def __init__(self, method, model, params, batch, devices=1):
    config = config_lib.defaults()
    config.batch, config.dtype = _BATCH.value, _DTYPE.value
    config.optim.update(lr=arms.RATE, clip=0., schedule='constant', warmup=0.)
    classify, methods = 'label' in batch, (method,)
    if classify and method.name != 'full':
      methods += (peftjax.load('selective.full', sites=dict(path='head/out$')),)
    task = (classification.classify('classify', classification.inputs, 2)
            if classify else
            lm.task(config.task, None, None, None))
    mesh = sharding.make_mesh(dict(data=devices, model=1))
    at = sharding.params_sharding(mesh, (), params)
    args, kwargs = task.inputs({k: v[:1] for k, v in batch.items()})
    self.sites = peftjax.describe(model, *args, **kwargs)
    run = step_lib.Run(config, task, model, sharding.put_global(params, at),
                       self.sites, mesh, at, jax.random.key(0))
    stage = phases.schedule(methods, 1000)[0]
    theta = peftjax.init(methods, jax.random.key(1), self.sites, params)
    self.state = step_lib.start(run, stage, theta, 0)
    self.trained = trees.count(self.state['trained'])
    tick = time.perf_counter()
    self.compiled, _ = step_lib.compile_step(run, stage, self.state, batch)
    self.compile_seconds = time.perf_counter() - tick
    self.run, self.pace = run, step_lib.pace_of(run, stage)
    self.batch = sharding.put_batch(batch, sharding.batch_sharding(mesh))

  def seconds(self):
    """Wall time of one step."""
    start = time.perf_counter()
    self.state, self.metrics = self.compiled(
        self.state, self.run.params, self.batch, self.pace)
    jax.block_until_ready(self.state)
    return time.perf_counter() - start


def kernels(sites):
  """Shapes of the blocks' kernels, stacked ones with their layers."""
  return [(*s.stack, *s.params['kernel'].shape) for p, s in sites.items()
          if 'block' in p and s.role != 'norm' and 'kernel' in s.params]


def shift():
  """y = f(x) + s after every kernel: what no step on a frozen base can save."""
  return peftjax.Method(
      'shift', peftjax.select(**arms.KERNELS),
      lambda key, site, p, stats: dict(s=jnp.zeros(p['kernel'].shape[1])),
      layer=lambda f, x, t, ctx: f(x) + t['s'])


def own(name, sites, rows):
  """FLOPs of an arm's own products, there and back; None: not of this kind.

  Args:
    name: Of the arm.
    sites: As of `describe`.
    rows: Of activations that a kernel meets.
  """
  spec, total = arms.METHODS[name], 0
  for path, site in sites.items():
    if 'block' not in path or 'kernel' not in site.params or (
        len(site.params['kernel'].shape) != 2):
      continue
    d_in, d_out = site.params['kernel'].shape
    each = 0
    if name in ('lora', 'dora'):
      each = 6 * rows * spec['rank'] * (d_in + d_out)
    if name == 'dora':  # norms of the columns of K + s A B, once
      each += 2 * spec['rank'] * d_in * d_out
    if name in ('oft', 'boft'):
      each = 6 * rows * d_in * spec['block_size'] * spec.get('factors', 1)
      if 'block_0/attn' in path and site.role in ('q', 'k', 'v'):
        # A rotation's gradient goes back through the kernel behind it, also
        # where nothing else asks for that.
        each += 2 * rows * d_in * d_out
    total += each * int(np.prod(site.stack, dtype=int))
  return None if name in ('full', 'prompt', 'prefix') else total


# --------------------------------------------------------------- PEFT on torch
class Torch:
  """The worker process."""

  def __init__(self, folder):
    gpu = jax.default_backend() == 'gpu'
    command = [
        sys.executable, '-m', 'benchmarks.torch_worker',
        f'--model={_MODEL.value}', f'--folder={folder or ""}',
        f'--batch={_BATCH.value}', f'--tokens={_TOKENS.value}',
        f'--dtype={_DTYPE.value}',
        f'--device={"cuda" if gpu else "cpu"}',
        f'--threads={len(os.sched_getaffinity(0))}']
    self.process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

  def ask(self, verb, arm):
    self.process.stdin.write(f'{verb} {arm}\n')
    self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f'the torch process ended at {verb} {arm}')
    return json.loads(line)

  def close(self):
    self.process.stdin.close()
    self.process.wait()


# -------------------------------------------------------------------- the whole
def costs(arm, kernel_shapes):
  """What is read from a compiled step."""
  p = program.read(arm.compiled)
  return dict(
      trained=arm.trained, compile_seconds=round(arm.compile_seconds, 1),
      gflop=p.flops / 1e9, xla_gflop=p.xla_flops / 1e9,
      bytes_accessed=p.bytes_accessed, temp=p.temp, arguments=p.arguments,
      peak=p.peak, weight_shaped=sum(
          a.bytes for a in p.made(kernel_shapes)))


def rate(products=8192):
  """FLOP/s of one large matrix product in the dtype of the computation."""
  a = jnp.ones((products, products), jnp.dtype(_DTYPE.value))
  dot = jax.jit(lambda a, b: a @ b)
  dot(a, a).block_until_ready()
  times = []
  for _ in range(10):
    start = time.perf_counter()
    dot(a, a).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2 * products**3 / statistics.median(times)


def ratio(pairs):
  """{ratio, quartiles} of (a, b) pairs, as b / a."""
  found = sorted(b / a for a, b in pairs)
  n = len(found)
  return dict(ratio=statistics.median(found),
              quartiles=[found[n // 4], found[(3 * n) // 4]])


def measure(names, folder, rows, save):
  """Fills {arm: figures}, the arms' times beside those of full fine-tuning.

  save() is called after every arm: what is there survives what comes next.
  """
  model, params = make_model(folder)
  batch = arms.batch(_MODEL.value, _BATCH.value, _TOKENS.value)
  full = Arm(method('full'), model, params, batch)
  shapes = kernels(full.sites)
  rest = floor(model, params, batch)
  torch = Torch(folder) if _TORCH.value and _TIME.value else None
  if torch and folder:  # else both sides have weights of their own
    agree(model, params, batch, torch)
  for name in names:
    arm = Arm(method(name), model, params, batch) if name != 'full' else full
    row = rows[name] = costs(arm, shapes)
    extra = own(name, arm.sites, _BATCH.value * _TOKENS.value)
    if extra is not None:
      row['bound_gflop'] = (rest + extra) / 1e9
      row['flop_ratio'] = row['gflop'] / row['bound_gflop']
    if _TIME.value:
      row.update(timed(name, arm, full, torch))
    print(name, {k: v for k, v in row.items() if 'gflop' in k or k in (
        'ratio', 'torch_ratio')}, file=sys.stderr, flush=True)
    del arm
    save()
  if torch:
    torch.close()


def floor(model, params, batch):
  """FLOPs of forward and of the way back through the activations."""
  return program.read(Arm(shift(), model, params, batch).compiled).flops


def agree(model, params, batch, torch):
  """Raises unless both sides' logits are the same."""
  ours = np.asarray(jax.jit(lambda p: model.apply(
      {'params': p}, batch['ids'], batch['mask']))(params), np.float32)
  torch.ask('build', 'full')
  theirs = np.array(torch.ask('logits', 'full')['values'])
  apart = np.abs(ours.flatten()[:len(theirs)] - theirs).max()
  if apart > (1e-3 if _DTYPE.value == 'float32' else 0.1):
    raise AssertionError(f'logits differ by {apart}: nothing to compare')


def timed(name, arm, full, torch):
  """Seconds and ratios of one arm."""
  theirs = None
  if torch:
    theirs = torch.ask('build', name)
    for _ in range(2):
      if 'error' not in theirs:  # else the step says why it has none
        theirs |= torch.ask('step', name)
  for _ in range(3):
    arm.seconds()
  beside_full, beside_torch = [], []
  for _ in range(_PAIRS.value):
    if arm is not full:
      beside_full.append((full.seconds(), arm.seconds()))
    if theirs and 'error' not in theirs:
      beside_torch.append(
          (torch.ask('step', name)['seconds'], arm.seconds()))
  mine = [b for _, b in beside_full + beside_torch] or [
      arm.seconds() for _ in range(_PAIRS.value)]
  out = dict(seconds=statistics.median(mine))
  if beside_full:
    out |= ratio(beside_full)
  if beside_torch:
    against = ratio(beside_torch)
    out |= dict(torch_seconds=statistics.median(a for a, _ in beside_torch),
                torch_ratio=against['ratio'],
                torch_quartiles=against['quartiles'],
                torch_trained=theirs['trained'], torch_note=theirs['note'],
                torch_peak=torch.ask('peak', name)['bytes'])
  elif theirs:
    out['torch_note'] = theirs['error']
  if theirs:
    torch.ask('drop', name)
  return out


def traffic(names):
  """{arm: {kind: [count, bytes]}} of 8 devices that split the batch.

  Of a process of its own: the number of CPU devices is fixed at its start.
  """
  flag = '--xla_force_host_platform_device_count=8'
  command = [sys.executable, '-m', 'benchmarks.step', '--traffic_of',
             ','.join(names), *(f'--{f.name}={f.value}' for f in (
                 _MODEL, _BATCH, _TOKENS, _DTYPE, _SCAN))]
  out = subprocess.run(
      command, check=True, stdout=subprocess.PIPE, text=True,
      env=dict(os.environ, JAX_PLATFORMS='cpu',
               XLA_FLAGS=f'{os.environ.get("XLA_FLAGS", "")} {flag}')).stdout
  return json.loads(out.splitlines()[-1])


def traffic_here(names):
  model, params = make_model(None)
  batch = arms.batch(_MODEL.value, _BATCH.value, _TOKENS.value)
  found = {}
  for name in names:
    arm = Arm(method(name), model, params, batch, devices=8)
    found[name] = program.read(arm.compiled).collectives
  print(json.dumps(found))


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if _TRAFFIC_OF.value:
    return traffic_here(_TRAFFIC_OF.value)
  known = arms.of(_MODEL.value)
  names = _METHODS.value or known
  for name in names:
    if name not in known:
      raise app.UsageError(f'--methods: unknown arm {name!r}'
                           f'{nearest(name, known)}')
  names = ['full', *(n for n in names if n != 'full')]
  device, gpu, rows = jax.devices()[0], jax.default_backend() == 'gpu', {}
  speed = rate(8192 if gpu else 2048) if _TIME.value else None
  result = dict(
      model=_MODEL.value, batch=_BATCH.value, tokens=_TOKENS.value,
      dtype=_DTYPE.value, scan=_SCAN.value, pairs=_PAIRS.value,
      cpus=len(os.sched_getaffinity(0)), load=os.getloadavg()[0],
      device=f'{device.platform} {device.device_kind}', commit=commit(),
      versions=report.versions(), product_gflop_per_s=speed and speed / 1e9,
      arms=rows)

  def save():
    for row in rows.values():
      if speed and 'seconds' in row:
        row['share_of_product'] = row['gflop'] * 1e9 / row['seconds'] / speed
    if _OUT.value:
      with open(_OUT.value, 'w', encoding='utf-8') as f:
        json.dump(result, f, indent=1)
        f.write('\n')

  with tempfile.TemporaryDirectory() as folder:
    # A GPU's sizes are not written out: both sides make their own weights.
    measure(names, None if gpu or not _TORCH.value else
            os.path.join(folder, 'model'), rows, save)
  if _TRAFFIC.value:
    for name, kinds in traffic(names).items():
      rows[name]['collectives'] = kinds
  save()
  rich_console.Console(width=140).print(report.table(result))
  if _OUT.value:
    report.chart(result, os.path.splitext(_OUT.value)[0] + '.png')


def commit():
  """Short name of the commit that is checked out, with '+' if it is changed."""
  git = lambda *a: subprocess.run(
      ('git', *a), capture_output=True, text=True, check=False).stdout.strip()
  if 'COMMIT' in os.environ:  # a copy without git
    return os.environ['COMMIT']
  return git('rev-parse', '--short', 'HEAD') + (
      '+' if git('status', '--porcelain', '-uno') else '')


if __name__ == '__main__':
  app.run(main)
