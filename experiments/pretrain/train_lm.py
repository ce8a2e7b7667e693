"""Pretrains a small decoder on text; see dec_s.py for the commands.

Next-piece cross-entropy, AdamW, a constant rate with warm-up and a linear fall
at the end. Written is a Hugging Face folder in float16 with its tokenizer. The
same command goes on from the last saved step.
"""

import os
import time

from absl import app
from absl import flags
from absl import logging
from flax import serialization
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import optax
import tokenizers

from experiments.pretrain import books
from peftjax import trees
from peftjax.interop import huggingface
from peftjax.models.decoder import Decoder

# What config.json says beside the model's sizes.
_SETTINGS = dict(pad_token_id=books.PAD, bos_token_id=books.BOS,
                 eos_token_id=books.EOS)


def optimiser(c):
  """AdamW with warm-up, a plateau and a linear fall to 0."""
  fall = max(1, round(c.decay * c.steps))
  rate = optax.join_schedules(
      [optax.linear_schedule(0., c.lr, c.warmup),
       optax.constant_schedule(c.lr), optax.linear_schedule(c.lr, 0., fall)],
      [c.warmup, c.steps - fall])
  decays = lambda p: jax.tree.map(lambda v: v.ndim > 1, p)
  return optax.chain(
      optax.clip_by_global_norm(c.clip),
      optax.adamw(rate, b2=c.b2, weight_decay=c.weight_decay, mask=decays))


def loss_fn(model, params, rows):
  """Mean nats a piece of rows [B, T + 1]."""
  logits = model.apply({'params': params}, rows[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(
      logits.astype(jnp.float32), rows[:, 1:]).mean()


def train(c, out, init=None):
  """Trains as the config says and writes the folder `out`; -> the last loss."""
  work = out.rstrip('/') + '.work'
  os.makedirs(work, exist_ok=True)
  if init:
    tokenizer = tokenizers.Tokenizer.from_file(
        os.path.join(init, 'tokenizer.json'))
    companions = init
  else:
    tokenizer, companions = books.fit_tokenizer(c.data_dir, work), work
  rows = books.windows(
      books.encode(tokenizer, books.chapters(c.data_dir, c.part)), c.length)
  held = books.windows(books.encode(tokenizer, [
      r['text'] for r in books.read(c.data_dir, 'lm/books/validation')]),
                       c.length)[:4 * c.batch]
  logging.info('%d pieces, %.2f epochs', rows.size,
               c.steps * c.batch / len(rows))
  if init:
    model, params, _ = huggingface.load(init)
  else:
    model = Decoder(vocab=books.VOCABULARY, max_positions=512,
                    **c.model.to_dict())
    params = model.init(jax.random.key(c.seed), rows[:1, :-1])['params']
  logging.info('%d parameters', trees.count(params))
  tx = optimiser(c)
  state = dict(params=params, opt=tx.init(params), step=0)
  saved = os.path.join(work, 'state.msgpack')
  if os.path.exists(saved):
    with open(saved, 'rb') as f:
      state = serialization.from_bytes(state, f.read())

  @jax.jit
  def evaluate(params, rows):
    return loss_fn(model, params, rows)

  @jax.jit
  def step_fn(params, opt, rows):
    loss, grads = jax.value_and_grad(
        lambda p: loss_fn(model, p, rows))(params)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt, loss

  params, opt = state['params'], state['opt']
  tick, losses, held_loss = time.perf_counter(), [], float('nan')
  for step in range(int(state['step']), c.steps):
    epoch, at = divmod(step * c.batch, len(rows) // c.batch * c.batch)
    order = np.random.RandomState(c.seed + 1000 * epoch).permutation(len(rows))
    params, opt, loss = step_fn(params, opt, rows[order[at:at + c.batch]])
    losses.append(loss)
    done = step + 1
    if done % c.log_every == 0 or done == c.steps:
      mean = float(np.mean(jax.device_get(losses)))
      if not np.isfinite(mean):
        raise FloatingPointError(f'loss {mean} in step {done}')
      held_loss = float(np.mean([
          evaluate(params, held[i:i + c.batch])
          for i in range(0, len(held), c.batch)]))
      logging.info('step %d loss %.4f held out %.4f, %.2f s a step', done, mean,
                   held_loss, (time.perf_counter() - tick) / len(losses))
      tick, losses = time.perf_counter(), []
    if done % c.save_every == 0:
      with open(saved + '.part', 'wb') as f:
        f.write(serialization.to_bytes(dict(
            params=params, opt=opt, step=done)))
      os.replace(saved + '.part', saved)
  huggingface.save(out, model, params, 'llama', like=_SETTINGS,
                   companions=companions, dtype=jnp.float16, overwrite=True)
  return held_loss


def main(argv):
  del argv
  train(_CONFIG.value, _OUT.value, _INIT.value)


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
  _OUT = flags.DEFINE_string('out', None, 'Folder to write.', required=True)
  _INIT = flags.DEFINE_string('init', None, 'Folder to go on from.')
  flags.mark_flag_as_required('config')
  app.run(main)
