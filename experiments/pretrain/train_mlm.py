"""Gives a sentence encoder a masked-LM head; see minilm_mlm.py for the command.

Of every row's pieces, `masked` are chosen: 80 % of them become [MASK], 10 % a
random piece, 10 % stay; the loss is their cross-entropy.

Source: "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding" (Devlin et al., arXiv 1810.04805).
"""

import os
import time

from absl import app
from absl import flags
from absl import logging
from flax import serialization
import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import optax
import tokenizers

from experiments.pretrain import books
import peftjax
from peftjax.interop import families
from peftjax.interop import huggingface
from peftjax.models.encoder import Head


def rows_of(tokenizer, texts, length):
  """Texts -> [N, length] rows, [CLS] ... [SEP], nothing padded."""
  inner = length - 2
  first, last = (tokenizer.token_to_id(t) for t in ('[CLS]', '[SEP]'))
  stream = np.concatenate([
      e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)])
  n = len(stream) // inner
  body = stream[:n * inner].reshape(n, inner)
  edge = lambda v: np.full((n, 1), v)
  return np.concatenate([edge(first), body, edge(last)], 1).astype(np.int32)


def masked(rows, n, mask_id, vocabulary, rng):
  """rows [B, T] -> (rows with n places changed, places [B, n], what was there).
  """
  b, t = rows.shape
  at = rng.random_sample((b, t - 2)).argsort(1)[:, :n] + 1
  want = np.take_along_axis(rows, at, 1)
  kind = rng.random_sample(at.shape)
  new = np.where(kind < 0.8, mask_id, np.where(
      kind < 0.9, rng.randint(0, vocabulary, at.shape), want))
  rows = rows.copy()
  np.put_along_axis(rows, at, new.astype(rows.dtype), 1)
  return rows, at.astype(np.int32), want


def logits_at(model, methods, params, theta, rows, at):
  """Logits [B, n, V] of the places alone: the rest never reaches the head."""

  def only(f, args, kwargs, context):
    if isinstance(context.module, Head) and context.method_name == 'logits':
      args = (jnp.take_along_axis(args[0], at[..., None], 1), *args[1:])
    return f(*args, **kwargs)

  with nn.intercept_methods(only):
    return peftjax.apply(model, methods, params, theta, rows)[0]


def train(c, weights, out):
  """Trains as the config says, writes the adapter `out`; -> top-1 accuracy."""
  model, params, config = huggingface.load(weights, head='mlm')
  tokenizer = tokenizers.Tokenizer.from_file(
      os.path.join(weights, 'tokenizer.json'))
  tokenizer.no_truncation()
  tokenizer.no_padding()
  mask_id = tokenizer.token_to_id('[MASK]')
  text = lambda name: [r['text'] for r in books.read(c.data_dir, name)]
  rows = rows_of(tokenizer, text('lm/books/train')
                 + text('lm/wikitext2_small/train'), c.length)
  held = rows_of(tokenizer, text('lm/books/test')
                 + text('lm/wikitext2_small/test'), c.length)
  rng = np.random.RandomState(0)
  held = held[rng.permutation(len(held))[:20 * c.batch]]
  held = masked(held, c.masked, mask_id, model.vocab, rng)
  logging.info('%d rows, %.2f epochs', len(rows),
               c.steps * c.batch / len(rows))

  methods = (
      peftjax.load('lowrank.lora', rank=c.rank, sites=dict(
          roles=('q', 'k', 'v', 'o', 'up', 'down'))),
      peftjax.load('selective.full', sites=dict(path='^head')))
  sites = peftjax.describe(model, *families.example(model, config))
  theta = peftjax.init(methods, jax.random.key(c.seed), sites, params)
  trained, frozen = peftjax.partition(methods, theta)
  logging.info('%d trained', peftjax.count(trained))
  rate = optax.warmup_cosine_decay_schedule(0., c.lr, c.warmup, c.steps)
  tx = optax.chain(optax.clip_by_global_norm(c.clip),
                   optax.adamw(rate, weight_decay=c.weight_decay))
  state = dict(trained=trained, opt=tx.init(trained), step=0)
  saved = out.rstrip('/') + '.work'
  if os.path.exists(saved):
    with open(saved, 'rb') as f:
      state = serialization.from_bytes(state, f.read())
  trained, opt = state['trained'], state['opt']

  def scores(trained, params, rows, at, want):
    theta = peftjax.combine(trained, frozen)
    logits = logits_at(model, methods, params, theta, rows, at)
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, want).mean()
    return loss, (logits.argmax(-1) == want).mean()

  evaluate = jax.jit(scores)

  @jax.jit
  def step_fn(trained, opt, params, rows, at, want):
    (loss, _), grads = jax.value_and_grad(scores, has_aux=True)(
        trained, params, rows, at, want)
    updates, opt = tx.update(grads, opt, trained)
    return optax.apply_updates(trained, updates), opt, loss

  def quality(trained):
    each = [evaluate(trained, params, *(a[i:i + c.batch] for a in held))
            for i in range(0, len(held[0]), c.batch)]
    return np.mean(jax.device_get(each), axis=0)

  logging.info('before: loss %.3f, top-1 %.3f', *quality(trained))
  tick, losses = time.perf_counter(), []
  for step in range(int(state['step']), c.steps):
    draw = np.random.RandomState(1000 + step)
    batch = rows[draw.choice(len(rows), c.batch, replace=False)]
    trained, opt, loss = step_fn(trained, opt, params, *masked(
        batch, c.masked, mask_id, model.vocab, draw))
    losses.append(loss)
    done = step + 1
    if done % c.log_every == 0 or done == c.steps:
      mean = float(np.mean(jax.device_get(losses)))
      if not np.isfinite(mean):
        raise FloatingPointError(f'loss {mean} in step {done}')
      logging.info('step %d loss %.4f, %.2f s a step', done, mean,
                   (time.perf_counter() - tick) / len(losses))
      tick, losses = time.perf_counter(), []
    if done % c.save_every == 0:
      with open(saved + '.part', 'wb') as f:
        f.write(serialization.to_bytes(dict(
            trained=trained, opt=opt, step=done)))
      os.replace(saved + '.part', saved)
  loss, top1 = quality(trained)
  logging.info('after: loss %.3f, top-1 %.3f', loss, top1)
  peftjax.save_adapter(out, methods, peftjax.combine(trained, frozen), sites,
                       params, base=dict(weights=os.path.basename(
                           weights.rstrip('/')), head='mlm'))
  return float(top1)


def main(argv):
  del argv
  train(_CONFIG.value, _WEIGHTS.value, _OUT.value)


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
  _WEIGHTS = flags.DEFINE_string('weights', None, 'Folder of the encoder.',
                                 required=True)
  _OUT = flags.DEFINE_string('out', None, 'Adapter folder to write.',
                             required=True)
  flags.mark_flag_as_required('config')
  app.run(main)
