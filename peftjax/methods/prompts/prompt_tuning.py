"""Prompt tuning: trained vectors before the embedded text, nothing else.

Source: "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv
2104.08691).

  X  = E[ids]            [B, T, d]    word vectors, scaled where the model does
  X' = prompt || X       [B, P + T, d], prompt [P, d]
  mask' = 1^P || mask    positions 0 .. P+T-1, types 0 for the prompt

It stands before positions, types and the first norm are added, so that a prompt
E[ids'] is the base model on ids' || ids. Outputs are of the text's tokens
alone, but that an encoder's 'classify' reads the first token of all, which is
the prompt's. An encoder-decoder gets one before its source. It does not fold.
Generation puts it in front once.

Init: 'random' is the reference's U[0, 0.01); 'sample_vocab' takes rows of E,
drawn from the first 5000 ids, the most frequent ones in SentencePiece
vocabularies (Hugging Face PEFT draws from all: frequent=0); 'ids' the rows of
given ids (a text or names of classes), repeated or cut to P. None is the base.

Count: P d in all.

Paper and code: P = 100 for T5 with Adafactor and a constant learning rate of
0.3. PEFT's own 'RANDOM' is N(0, 1), far larger than the rows of most tables,
and its default for an encoder-decoder is a second prompt before the targets
(num_transformer_submodules=2); the paper has one.
"""

import numbers

import jax
import jax.numpy as jnp

from peftjax.method import Method, nearest
from peftjax.ops import prompts

EXAMPLE = dict(length=3)
INITS = ('random', 'sample_vocab', 'ids')


def prompt_tuning(length=100, init='random', ids=None, frequent=5000,
                  sites=prompts.model_of_text):
  """Prompt tuning.

  Args:
    length: P, 1 to 65536.
    init: 'random', 'sample_vocab' or 'ids'.
    ids: Token ids for init 'ids', a sequence of any length.
    frequent: 'sample_vocab' draws from so many first ids, any number; 0: all.
    sites: Predicate on sites; by default the model, which embeds token ids.

  Raises:
    ValueError: a length below 1, an unknown init, ids without init 'ids' or
      outside of the vocabulary, a site that does not embed token ids.
  """
  prompts.check_size('prompt_tuning', 'length', length)
  if init not in INITS:
    raise ValueError(f'prompt_tuning: init={init!r}{nearest(init, INITS)}')
  if not isinstance(frequent, numbers.Integral) or frequent < 0:
    raise ValueError(f'prompt_tuning: frequent={frequent}: expected 0 or more')
  if (ids is None) == (init == 'ids'):
    raise ValueError(f"prompt_tuning: ids={ids} with init={init!r}: give token "
                     "ids with init='ids', and with no other")
  if init == 'ids':
    ids = tuple(ids)
    if not ids or not all(isinstance(i, numbers.Integral) for i in ids):
      raise ValueError(f'prompt_tuning: ids={ids}: expected whole numbers')

  def width(site):
    return prompts.width('prompt_tuning', site)

  def check(found):
    for site in found.values():
      width(site)

  def make(key, site, p, stats):
    del stats
    if init == 'random':
      shape = (length, width(site))
      return dict(prompt=jax.random.uniform(key, shape, maxval=0.01))
    rows = len(p['table'])
    if init == 'sample_vocab':
      at = jax.random.randint(key, (length,), 0, min(frequent or rows, rows))
    else:
      bad = [i for i in ids if not 0 <= i < rows]
      if bad:
        raise ValueError(f'prompt_tuning: ids {bad} are outside of the '
                         f'vocabulary, 0 to {rows - 1}')
      at = jnp.resize(jnp.asarray(ids, jnp.int32), length)
    scale = site.attributes.get('embed_scale', 1)  # Gemma's
    return dict(prompt=scale * p['table'][at].astype(jnp.float32))

  def layer(f, x, t, ctx):
    del ctx
    return prompts.in_front(t['prompt'], f(x))

  return Method('prompt_tuning', sites, make, layer=layer, on='embed',
                reads=None if init == 'random' else prompts.token_table,
                check=check, count=lambda site: length * width(site),
                tolerance=float('inf'))
