r"""The recipe of "LoRA Learns Less and Forgets Less" (arXiv 2405.09673).

  python -m peftjax.train --config=experiments/lowrank/recipe.py \
      --workdir=runs/recipe

The paper, on Llama-2-7B: LoRA is for instruction tuning, not for continued
pretraining. Every module of the blocks is adapted (attention alone learns less,
the MLPs most of what all do), at rank 256 if memory allows (16 to 64 do not do
for code), with alpha = 2 r. The learning rate is the highest that is stable, of
a sweep over 1e-5 to 5e-4, about ten times that of full fine-tuning: compare
`lr=5e-4`, the default, 2e-4, 5e-5 and 1e-5. Cosine after a warm-up of 0.1,
clipping at 1, separate runs of 1, 2, 4, 8 and 16 epochs.

Here: the same on a small decoder and 16 epochs of 64 pairs of prompt and answer
that come with the repository. A kernel whose smaller side is below 256 has that
as its rank, and alpha is twice it, so that the scale is 2 everywhere. At the
decoder's width of 256 that is 7.3M numbers beside a base of 5.0M: the recipe
saves memory on wider bases alone. What the paper does otherwise: LionW (0.9,
0.95), whose rates do not carry over to AdamW; a cosine that ends at 1 % of the
peak and not at 0; batches of 192 to 768. Its first version has alpha = 32 at
rank 256 for code.

`backbone=` is a folder, a hub id or a short name, `data.name=file:FOLDER` other
pairs; `:runlocal` does two steps of a tiny decoder.
"""

import os
import re

from experiments import suites
from experiments.samples.tiny import tiny
from peftjax import bases
from peftjax import models
from peftjax import sites as sites_lib

RANK = 256
_ROOT = os.path.dirname(os.path.dirname(suites.SAMPLES))
DEC_S = os.path.join(_ROOT, 'weights', 'dec_s')
TASKS = {'sample': {
    'data.name': f'file:{os.path.join(suites.SAMPLES, "e2e")}',
    'batch': 8, 'steps': 16 * 64 // 8, 'task.length': 96}}
_LOCAL = {'model.weights': lambda: tiny('gpt2'), 'task.max_new_tokens': 8,
          'checkpoint_every': 0}


def get_config(arg=None):
  """The training config; `arg` as in `experiments.suites`."""
  config = suites.config(
      (), TASKS, 'sample', arg, DEC_S, {'': _LOCAL}, task__name='seq2seq',
      task__metric='bleu', optim__lr=5e-4, optim__schedule='cosine',
      optim__warmup=0.1, optim__clip=1.0)
  config.method = (lora(config.model.weights, config.model.fused),)
  return config


def lora(weights, fused='split'):
  """LoRA on every kernel of a backbone, at rank 256 or what a kernel allows.

  Args:
    weights: Of the backbone, as `bases.load` takes them; none are read.
    fused: As `config.model.fused`.

  Returns:
    Keywords of `peftjax.load`.
  """
  base = bases.shapes(weights)
  sites = sites_lib.describe(
      base.model, *models.example(base.model, base.config),
      fused=sites_lib.FUSED_RULES[fused])
  small = {}
  for site in filter(sites_lib.kernels, sites.values()):
    side = min(site.params['kernel'].shape)
    if side < RANK:
      small.setdefault(side, []).append(re.escape(site.path))
  at = {side: f'^({"|".join(paths)})$' for side, paths in small.items()}
  return dict(name='lowrank.lora', rank=RANK, alpha=2. * RANK,
              rank_pattern=[[p, r] for r, p in at.items()],
              alpha_pattern=[[p, 2. * r] for r, p in at.items()])
