r"""What the studies on the small decoder share: stories260k on E2E records.

  PEFTJAX_DATA=DATA python -m experiments.lowrank.stories

writes what forget.py and updated_base.py start from, below runs/lowrank_start:

  samples/     200 sequences of the untouched base for calibration ('train') and
               200 others to measure by ('test'): temperature 1, 256 tokens at
               most, up to the token that ends a story. None of the base's own
               training text is in the data; this is its distribution.
  stories_v2/  an updated base: stories260k trained on in full on
               tinyshakespeare, 300 steps of 16 x 128, peak rate 1e-3

Two minutes on 2 CPU cores.
"""

import glob
import json
import os
import re

from absl import app
import jax
import jax.numpy as jnp
import numpy as np

from experiments import common
from experiments import suites
from peftjax import bases
from peftjax import case as case_lib
from peftjax.apply import apply
from peftjax.artifact import load_adapter
from peftjax.data import sources
from peftjax.data import text
from peftjax.evaluate import evaluator
from peftjax.fold import fold_adapter
from peftjax.folding import fold
from peftjax.generate import generate
from peftjax.sites import describe
from peftjax.train import train

START = 'runs/lowrank_start'
SAMPLES, UPDATED = (os.path.join(START, n) for n in ('samples', 'stories_v2'))
WEIGHTS, BATCH, LENGTH = 'stories260k', 50, 256


def base():
  """The config that the arms of both studies start from."""
  c = common.base()
  c.method = (dict(name='selective.full'),)
  c.model.weights = WEIGHTS
  c.data.name = 'data:e2e'
  c.data.train, c.data.validation = 2000, 200
  c.task.name, c.task.length, c.task.metric = 'seq2seq', 288, 'perplexity'
  c.task.max_new_tokens = 1  # judged by its loss, not by what it writes
  c.steps, c.batch, c.eval_batch = 200, 8, 50
  c.optim.schedule, c.optim.warmup = 'linear', 0.06
  c.eval_before = False
  c.eval_split = 'validation'  # the test part is read by `losses`, at the end
  c.checkpoint_every = 0
  return c


def local(config):
  """The same on the samples that come with the package, for `runlocal`."""
  config.data.name = f'file:{os.path.join(suites.SAMPLES, "e2e")}'
  config.task.length = 64


# --------------------------------------------------------------------- adapters
def adapters(workdir, task, arm):
  """{seed: folder of the adapter} of a grid's finished cells.

  Raises:
    FileNotFoundError: there is none.
    ValueError: two of a seed, of which one is of an older config.
  """
  out = {}
  for path in sorted(glob.glob(os.path.join(
      workdir, 'cells', f'{task}-{arm}-s*', 'adapter'))):
    seed = int(re.search(r'-s(\d+)-[0-9a-f]{8}/adapter$', path).group(1))
    if seed in out:
      raise ValueError(f'{path} and {out[seed]} are both of seed {seed}: delete '
                       'the cell whose config is no longer the arm\'s')
    out[seed] = path
  if not out:
    raise FileNotFoundError(f'no finished cells {task}-{arm}-s* in {workdir}')
  return out


def finished(workdir, task, arms):
  """[(arm, seed, folder of the adapter)]; arms that did not run are printed."""
  out = []
  for arm in arms:
    try:
      found = adapters(workdir, task, arm)
    except FileNotFoundError as e:
      print(f'{arm} is left out: {e}')
      continue
    out += [(arm, seed, path) for seed, path in found.items()]
  return out


def opened(adapter, weights=None):
  """(case of the adapter's test part, sites, methods, theta).

  weights: Another base to attach it to. Only shapes are compared with those it
    was trained on then: that it is another base is the point.
  """
  meta = load_adapter(adapter).meta
  case = case_lib.load(case_lib.config_of(meta, weights), ('test',))
  args, kwargs = case.example()
  sites = describe(case.base.model, *args, **kwargs)
  known = case.base.params if weights is None else None
  methods, theta, _ = load_adapter(adapter, sites, known)
  return case, sites, methods, theta


def losses(adapter, weights=None, folded=True):
  """dict(loss: nats a token, bits: a byte) of an adapter, folded, on test.

  folded=False: of its base alone. Bits are of whole targets, at the mean loss of
  their tokens; where rows are cut to `task.length`, of the tokens that are left.
  """
  case, sites, methods, theta = opened(adapter, weights)
  params = case.base.params
  if folded:
    params = fold(methods, params, theta, sites)
  arrays = case.arrays['test']
  loss = evaluator(case.base.model, (), arrays, BATCH, task=case.task)(
      params, {})['loss']
  said = load_adapter(adapter).meta['base']
  examples = sources.open_split(
      said['data'], 'test', said.get('path', '')).examples
  targets = [e['target'] for e in examples]
  tokenizer = text.load_tokenizer(case.base.folder)
  tokens = sum(len(ids) + (tokenizer.eos is not None)
               for ids in tokenizer.encode(targets, special=False))
  size = sum(len(t.encode()) for t in targets)
  return dict(loss=loss, bits=float(loss * tokens / size / np.log(2)))


def kept(adapter, rows):
  """KL(base || adapted), nats a token, on rows of tokens of the base's own."""
  case, _, methods, theta = opened(adapter)
  model, params = case.base.model, case.base.params

  @jax.jit
  def total(params, theta, ids, mask):
    old = model.apply({'params': params}, ids, mask=mask)
    new, _ = apply(model, methods, params, theta, ids, mask=mask)
    p, q = (jax.nn.log_softmax(v[:, :-1].astype(jnp.float32))
            for v in (old, new))
    return (jnp.where(mask[:, 1:], (jnp.exp(p) * (p - q)).sum(-1), 0)).sum()

  ids, mask = rows
  found = sum(float(total(params, theta, ids[i:i + BATCH], mask[i:i + BATCH]))
              for i in range(0, len(ids), BATCH))
  return found / float(mask[:, 1:].sum())


# ---------------------------------------------------------------------- samples
def sample(out, count=200, length=LENGTH, weights=WEIGHTS):
  """Writes <out>/train.jsonl and <out>/test.jsonl: source, target, ids.

  A sequence is parted, as a seq2seq set's are, after its first sentence.
  """
  found = bases.load(weights, 'lm')
  tokenizer = text.load_tokenizer(found.folder)
  os.makedirs(out, exist_ok=True)
  stop = (tokenizer.bos, tokenizer.eos)
  for n, split in enumerate(('train', 'test')):
    rows = []
    while len(rows) < count:
      key = jax.random.fold_in(jax.random.key(n), len(rows))
      ids = np.asarray(generate(
          found.model, found.params, np.full((BATCH, 1), tokenizer.bos),
          max_new_tokens=length - 1, temperature=1., stop_tokens=stop,
          pad=tokenizer.eos, rng=key))
      for row in ids:
        ends = np.flatnonzero(np.isin(row, stop))
        row = row[:ends[0]] if len(ends) else row
        head, dot, tail = tokenizer.decode(row).strip().partition('. ')
        if tail and len(rows) < count:
          rows.append(dict(source=head + dot.rstrip(), target=tail,
                           ids=[tokenizer.bos, *map(int, row)]))
    path = os.path.join(out, f'{split}.jsonl')
    with open(f'{path}.part', 'w', encoding='utf-8') as f:
      f.writelines(json.dumps(r) + '\n' for r in rows)
    os.replace(f'{path}.part', path)


def samples(out=SAMPLES, split='test'):
  """(ids [N, T], mask [N, T]) of the sequences that `sample` wrote."""
  with open(os.path.join(out, f'{split}.jsonl'), encoding='utf-8') as f:
    rows = [json.loads(line)['ids'] for line in f]
  length = max(map(len, rows))
  ids, mask = np.zeros((2, len(rows), length), np.int32)
  for i, row in enumerate(rows):
    ids[i, :len(row)], mask[i, :len(row)] = row, 1
  return ids, mask.astype(bool)


# ----------------------------------------------------------------- updated base
def update(out, steps=300, name='data:tinyshakespeare', weights=WEIGHTS):
  """Trains a base on in full on another text and writes its folder."""
  c = common.base()
  c.method = (dict(name='selective.full'),)
  c.model.weights, c.data.name = weights, name
  c.data.train = 0
  c.task.name, c.task.length = 'lm', 128
  c.steps, c.batch, c.eval_batch = steps, 16, 50
  c.eval_split = 'validation'
  c.optim.schedule, c.optim.lr = 'linear', 1e-3
  c.checkpoint_every = 0
  found = train(c, f'{out}.work')
  fold_adapter(found['adapter'], out)
  return found


def main(argv):
  del argv
  sample(SAMPLES)
  print(SAMPLES)
  update(UPDATED)
  print(UPDATED)


if __name__ == '__main__':
  app.run(main)
