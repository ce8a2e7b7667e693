"""Trainable tokens: chosen rows of an embedding table are trained.

Source: Hugging Face PEFT's method of that name; there is no paper.

  y = R[j] where x = tokens[j], else E[x]     E [vocabulary, d], R [n, d]
  fold: E' = E with the rows `tokens` set to R

For tokens that were added to a vocabulary, or words that get a new meaning. The
table is neither copied nor differentiated where it is looked up. Where a tied
table also makes the logits (`attend`), these follow the trained rows, as in
PEFT with tie_word_embeddings; there the table is folded inside the layer.

Init: R = E[tokens], new values and not differences, so the adapted model starts
as the base, and the rows stay what they were trained to be on a base whose new
rows are drawn anew.

Count: n d for n tokens.

PEFT looks ids up in a merged copy of the table. It has init_weights=False,
which draws R from N(0, 1); here R always starts as the base.
"""

import numbers
import re

import jax.numpy as jnp
import numpy as np

from peftjax.method import Method

EXAMPLE = dict(tokens=(2, 0))
PLACES = re.compile(r'(pos|place|type|segment|wpe)[^/]*$')


def token_tables(site):
  """Every embedding table but those of positions and segments, by its name."""
  return site.role == 'embed' and not PLACES.search(site.path)


def trainable_tokens(tokens, sites=token_tables):
  """Trainable tokens.

  Args:
    tokens: Ids of the tokens to train, whole numbers from 0, each once.
    sites: Predicate on sites; by default the tables of tokens.

  Raises:
    ValueError: no tokens, one that is no id, is given twice or lies outside the
      table, or a site that is no embedding table.
  """
  tokens = tuple(tokens) if hasattr(tokens, '__iter__') else (tokens,)
  if not tokens:
    raise ValueError('trainable_tokens: tokens=(): expected at least one id')
  for i, token in enumerate(tokens):
    if not isinstance(token, numbers.Integral) or token < 0:
      raise ValueError(f'trainable_tokens: tokens[{i}]={token!r}: expected an '
                       'id, a whole number from 0; the tokenizer gives them')
    if token in tokens[:i]:
      raise ValueError(
          f'trainable_tokens: tokens[{i}]={token} stands there before: '
          f'expected each id once, {tuple(dict.fromkeys(tokens))}')
  ids = np.array(tokens, np.int32)

  def check(found):
    for path, site in found.items():
      if site.kind not in ('Embed', 'Tree') or 'kernel' not in site.params:
        raise ValueError(
            f'trainable_tokens: {path!r} ({site.kind}) is no embedding table: '
            f'it has {sorted(site.params)}; choose by select(kind="Embed")')
      rows = site.params['kernel'].shape[0]
      if max(tokens) >= rows:
        raise ValueError(
            f'trainable_tokens: token {max(tokens)} is outside the table '
            f'{path!r} of {rows} rows: expected ids from 0 to {rows - 1}')

  def init(key, site, p, stats):
    del key, site, stats
    return dict(rows=p['kernel'][ids].astype(jnp.float32))

  def fold(p, t):
    table = jnp.asarray(p['kernel'])
    return {**p, 'kernel': table.at[ids].set(t['rows'])}

  def layer(f, x, t, ctx):
    del ctx
    hit = x[..., None] == ids
    new = t['rows'][jnp.argmax(hit, axis=-1)]
    return jnp.where(hit.any(-1)[..., None], new, f(x))

  def count(site):
    return len(tokens) * site.params['kernel'].shape[1]

  # needs_x: a lookup is the one layer whose x, the ids, is all that is read.
  return Method('trainable_tokens', sites, init, fold=fold, layer=layer,
                needs_x=False, check=check, count=count)
