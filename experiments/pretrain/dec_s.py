r"""dec_s and books_1m: small decoders pretrained on novels.

  python -m experiments.pretrain.train_lm --out=weights/dec_s_v1 \
      --config=experiments/pretrain/dec_s.py:v1 --config.data_dir=DATA
  python -m experiments.pretrain.train_lm --out=weights/dec_s \
      --config=experiments/pretrain/dec_s.py:v2 --config.data_dir=DATA \
      --init=weights/dec_s_v1
  python -m experiments.pretrain.train_lm --out=weights/books_1m \
      --config=experiments/pretrain/dec_s.py:books_1m --config.data_dir=DATA
  python -m experiments.pretrain.lm_gate --data_dir=DATA weights/dec_s ...

Llama's architecture, one byte-level BPE of 2048 pieces for all three, fitted on
the novels and on E2E's training text. Version 1 saw two thirds of the chapters;
version 2 goes on from it with the other third and WikiText. `:NAME-runlocal`
trains two steps of a tiny model. Hardware, wall time, results: weights/README.md.
"""

import ml_collections

NAMES = ('v1', 'v2', 'books_1m')


def get_config(arg='v1'):
  """Config of `experiments.pretrain.train_lm` for one of `NAMES`."""
  name, _, local = arg.partition('-')
  if name not in NAMES or local not in ('', 'runlocal'):
    raise ValueError(f'{arg!r}: expected one of {NAMES}, or NAME-runlocal')
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.data_dir = '../shared/data'  # holds lm/ and nlg/
  c.part = {'v1': 'first', 'v2': 'rest', 'books_1m': 'all'}[name]
  c.model = ml_collections.ConfigDict(dict(
      width=256, depth=6, heads=4, mlp_dim=640))
  c.length = 128
  c.batch = 16
  c.steps = {'v1': 4500, 'v2': 1600, 'books_1m': 3400}[name]
  c.lr = {'v1': 3e-3, 'v2': 2e-3, 'books_1m': 5e-3}[name]
  c.warmup = 100
  c.decay = 0.25  # the last share of the steps, in which the rate falls to 0
  c.b2 = 0.98
  c.weight_decay = 0.1
  c.clip = 1.0
  c.log_every = 50
  c.save_every = 200
  if name == 'books_1m':
    c.model.update(dict(width=128, depth=3, mlp_dim=352))
  if local:
    c.steps, c.warmup, c.batch, c.length = 2, 1, 2, 16
    c.model.update(dict(width=16, depth=2, heads=2, mlp_dim=24))
  return c
