"""Forward and full fine-tuning step of an encoder: peftjax against torch.

  python -m benchmarks.encoder [--pairs=15] [--out=encoder.json]
  taskset -c 0 python -m benchmarks.encoder        # one core

MiniLM's size by default: 6 layers, width 384, 12 heads, 32 texts of 64 tokens,
float32, a classifier on top. The same random weights go into both: transformers
makes them, `peftjax.interop` loads them, and the logits must agree before
anything is timed. The step is cross-entropy, its gradient in every parameter,
and Adam; no dropout. Both run in this process with the same number of threads,
in turn, so that a busy machine slows both: a ratio is the median over pairs,
peftjax / torch (below 1: peftjax is faster). The quartiles say how noisy it
was. CPU time counts all threads, waiting ones that spin too; on one core it is
the time that other processes do not touch. Most of either is matrix products,
whose speed hangs on the library: XLA's Eigen, and torch's MKL or oneDNN, of
which MKL is slower on other makers' CPUs. `matmul_gflops` says what each
reaches here. Prints JSON.
"""

import json
import os
import statistics
import tempfile
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax import trees
from peftjax.interop import huggingface

_PAIRS = flags.DEFINE_integer('pairs', 15, 'Timed pairs.', lower_bound=1)
_THREADS = flags.DEFINE_integer(
    'threads', None, 'Threads of torch; by default the CPUs that this process '
    'may use, which is how many XLA takes.', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch', 32, 'Texts a step.', lower_bound=1)
_LENGTH = flags.DEFINE_integer('length', 64, 'Tokens a text.', lower_bound=1)
_DEPTH = flags.DEFINE_integer('depth', 6, 'Layers.', lower_bound=1)
_VOCAB = flags.DEFINE_integer('vocab', 30522, 'Vocabulary.', lower_bound=4)
_RATE = flags.DEFINE_float('rate', 1e-5, 'Learning rate of Adam.')
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')


def batch():
  """(ids, mask, labels), a third of the texts padded to half their length."""
  rng = np.random.default_rng(0)
  shape = (_BATCH.value, _LENGTH.value)
  ids = rng.integers(3, _VOCAB.value, shape).astype(np.int32)
  mask = np.ones(shape, bool)
  mask[::3, shape[1] // 2:] = False
  return ids * mask, mask, rng.integers(0, 2, shape[0]).astype(np.int32)


def in_torch(folder, ids, mask, labels):
  """(forward, step) of transformers; makes the checkpoint in `folder`."""
  import torch  # test extras, like transformers
  import transformers
  torch.set_num_threads(_THREADS.value or len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  model = transformers.BertForSequenceClassification(transformers.BertConfig(
      vocab_size=_VOCAB.value, hidden_size=384, num_hidden_layers=_DEPTH.value,
      num_attention_heads=12, intermediate_size=1536, hidden_dropout_prob=0.,
      attention_probs_dropout_prob=0.,
      max_position_embeddings=max(512, _LENGTH.value)))
  model.save_pretrained(folder)
  model.train()
  tx = torch.optim.Adam(model.parameters(), lr=_RATE.value)
  args = dict(input_ids=torch.tensor(ids.astype(np.int64)),
              attention_mask=torch.tensor(mask.astype(np.int64)))
  labels = torch.tensor(labels.astype(np.int64))

  def forward():
    with torch.inference_mode():
      return model(**args).logits.numpy()

  def step():
    tx.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(**args).logits, labels)
    loss.backward()
    tx.step()
    return loss.item()

  return forward, step


def in_jax(folder, ids, mask, labels):
  """(forward, step) of peftjax."""
  model, params, _ = huggingface.load(folder)
  tx = optax.adam(_RATE.value)
  ids, mask, labels = map(jnp.asarray, (ids, mask, labels))
  apply = jax.jit(lambda p: model.apply({'params': p}, ids, mask))

  def loss(p):
    logits = model.apply({'params': p}, ids, mask)
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels).mean()

  def update(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  compiled = jax.jit(update, donate_argnums=(0, 1))
  # A copy: the step gives its arguments away, the forward pass keeps them.
  run = [jax.tree.map(jnp.copy, params), tx.init(params)]

  def step():
    *run[:], value = compiled(*run)
    return float(value)

  return lambda: np.asarray(apply(params)), step, trees.count(params)


def seconds(f):
  """(wall, CPU) time of a call, the latter of all threads together."""
  start = time.perf_counter(), time.process_time()
  f()
  return time.perf_counter() - start[0], time.process_time() - start[1]


def compare(ours, theirs, pairs):
  """Medians of both and of the ratio over pairs, with quartiles."""
  for _ in range(3):
    ours(), theirs()
  times = []
  for i in range(pairs):  # each goes first in half of the pairs
    if i % 2:
      a = seconds(ours)
      times.append((a, seconds(theirs)))
    else:
      b = seconds(theirs)
      times.append((seconds(ours), b))
  out = {}
  for i, kind in enumerate(('wall', 'cpu')):
    ratios = sorted(a[i] / b[i] for a, b in times)
    out[kind] = dict(
        peftjax_ms=round(1000 * statistics.median(a[i] for a, _ in times), 1),
        torch_ms=round(1000 * statistics.median(b[i] for _, b in times), 1),
        ratio=round(statistics.median(ratios), 3),
        quartiles=[round(ratios[n], 3) for n in (pairs // 4, 3 * pairs // 4)])
  return out


def products():
  """GFLOP/s of both in a product as large as an MLP layer's."""
  import torch
  shape = (_BATCH.value * _LENGTH.value, 384), (384, 1536)
  a, b = (np.random.default_rng(0).normal(size=s).astype(np.float32)
          for s in shape)
  x, y, dot = jnp.asarray(a), jnp.asarray(b), jax.jit(jnp.dot)
  u, v = torch.tensor(a), torch.tensor(b)
  ours = lambda: dot(x, y).block_until_ready()
  times = [(seconds(ours)[0], seconds(lambda: u @ v)[0]) for _ in range(25)]
  work = 2 * a.size * b.shape[1] / 1e9
  ours, theirs = (work / statistics.median(t) for t in zip(*times[5:]))
  return dict(peftjax=round(ours, 1), torch=round(theirs, 1))


def main(argv):
  del argv
  arrays = batch()
  with tempfile.TemporaryDirectory() as folder:
    torch_forward, torch_step = in_torch(folder, *arrays)
    jax_forward, jax_step, parameters = in_jax(folder, *arrays)
  apart = float(np.abs(jax_forward() - torch_forward()).max())
  if apart > 1e-4:
    raise AssertionError(f'logits differ by {apart}: nothing to compare')
  result = dict(
      parameters=parameters, batch=_BATCH.value, length=_LENGTH.value,
      depth=_DEPTH.value, cpus=len(os.sched_getaffinity(0)),
      load=os.getloadavg()[0], logits_apart=apart, matmul_gflops=products(),
      forward=compare(jax_forward, torch_forward, _PAIRS.value),
      step=compare(jax_step, torch_step, _PAIRS.value))
  print(json.dumps(result, indent=1))
  if _OUT.value:
    with open(_OUT.value, 'w', encoding='utf-8') as f:
      json.dump(result, f, indent=1)
      f.write('\n')


if __name__ == '__main__':
  app.run(main)
