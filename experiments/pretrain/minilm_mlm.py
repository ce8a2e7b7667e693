r"""minilm_mlm: a masked-language-model head, and the body's LoRA, for MiniLM.

  python -m experiments.pretrain.train_mlm --weights=DATA/checkpoints/\
all-MiniLM-L6-v2 --out=weights/minilm_mlm \
      --config=experiments/pretrain/minilm_mlm.py --config.data_dir=DATA

all-MiniLM-L6-v2 is a sentence encoder whose masked-LM head is not published.
Trained here are a new head (dense, norm, bias; the word table decodes) and LoRA
of rank 8 on all six kernels of every block, kept as one peftjax adapter.
`:runlocal` does two steps. Hardware, wall time and result: weights/README.md.
"""

import ml_collections


def get_config(arg=''):
  """Config of `experiments.pretrain.train_mlm`; arg '' or 'runlocal'."""
  if arg not in ('', 'runlocal'):
    raise ValueError(f"{arg!r}: expected '' or 'runlocal'")
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.data_dir = '../shared/data'  # holds lm/
  c.rank = 8
  c.length = 64
  c.masked = 9  # a row: 15 % of its pieces
  c.batch = 32
  c.steps = 1200
  c.lr = 2e-3
  c.warmup = 60
  c.weight_decay = 0.01
  c.clip = 1.0
  c.log_every = 25
  c.save_every = 100
  if arg:
    c.steps, c.warmup, c.batch, c.length, c.masked = 2, 1, 2, 16, 2
  return c
