"""Bidirectional transformer encoders of the BERT family, with hook methods.

Post-norm blocks over learned positions. One class, by its attributes:

  BERT, MiniLM  types=2, head_act='tanh'
  RoBERTa       types=1, padding=1 (positions are counted from it),
                head_act='tanh', mlm_act='gelu'
  DistilBERT    types=0, head_act='relu'
  ELECTRA       types=2, embed_dim (projected to width where it differs),
                head_act='gelu', mlm_act='gelu'

Letters: B batch, T tokens, P tokens that a prompt adds, S keys, d width, H
heads, V vocabulary. The places where a fine-tuning method can step in:

  Encoder.embed(ids) -> [B, T, e]      word vectors, before positions, types and
                                       norm; may be made to return P more, in
                                       front
  Encoder.place(at, spare) -> at       positions; may be made larger
  Attention.attend(q, k, v, mask)      one attention read; more keys and values
                                       may be put in front
  Block.join(u, x, a, which)           residual stream, sub-layer in and out
  Encoder.readout(h, mask) -> [B, d]   tokens to one vector a text

Tokens that a prompt adds are of type 0, at the first positions, and seen by
every query. 'classify' then reads the first of them, as transformers does under
Hugging Face PEFT; what all other heads read is without them. No dropout.

Sources: "BERT" (arXiv 1810.04805), "RoBERTa" (arXiv 1907.11692), "DistilBERT"
(arXiv 1910.01108), "ELECTRA" (arXiv 2003.10555), "MiniLM" (arXiv 2002.10957).
The heads are those of the released code: BERT classifies from its pooler, a
dense layer with tanh on the first token; the others have such a layer too, but
train it afresh.
"""

import functools
from typing import Any, Optional

import flax.linen as nn
import jax.numpy as jnp

from peftjax.method import nearest
from peftjax.models import layers

HEADS = ('pool', 'classify', 'mean', 'tag', 'mlm')


class Attention(nn.Module):
  """Multi-head attention, x [B, T, d] -> [B, T, d]."""

  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, mask=None):
    d = x.shape[-1]
    dense = functools.partial(nn.Dense, d, dtype=self.dtype)
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, d // self.heads)
    q, k, v = (split(dense(name=n)(x)) for n in ('query', 'key', 'value'))
    y = self.attend(q, k, v, mask)
    return dense(name='out')(y.reshape(x.shape))

  def attend(self, q, k, v, mask=None):
    """Attention read: q [B, T, H, h], k and v [B, S, H, h] -> like q.

    mask: booleans that broadcast to [B, H, T, S], True where a query may
    look; None lets every query look everywhere.
    """
    return layers.attention(q, k, v, mask)


class Mlp(nn.Module):
  """Two-layer perceptron over the last axis, [B, T, d] -> [B, T, d]."""

  dim: int
  act: str = 'gelu'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    h = nn.Dense(self.dim, dtype=self.dtype, name='up')(x)
    h = layers.activation(self.act)(h)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name='down')(h)


class Block(nn.Module):
  """Post-norm transformer block, u [B, T, d] -> (u, None), as nn.scan wants."""

  heads: int
  mlp_dim: int
  act: str = 'gelu'
  eps: float = 1e-12
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, u, mask=None):
    norm = functools.partial(nn.LayerNorm, self.eps, dtype=self.dtype)
    a = Attention(self.heads, self.dtype, name='attn')(u, mask)
    u = norm(name='norm1')(self.join(u, u, a, 'attn'))
    a = Mlp(self.mlp_dim, self.act, self.dtype, name='mlp')(u)
    return norm(name='norm2')(self.join(u, u, a, 'mlp')), None

  def join(self, u, x, a, which):
    """Residual join of stream u, sub-layer input x and output a [B, T, d].

    which: 'attn' or 'mlp', the sub-layer that made a. The norm comes after.
    """
    del x, which  # For interceptors: parallel adapters read them.
    return u + a


class Bias(nn.Module):
  """y + bias, over the last axis."""

  @nn.compact
  def __call__(self, y):
    return y + self.param('bias', nn.initializers.zeros, (y.shape[-1],))


class Head(nn.Module):
  """Task head: features [B, d] or tokens [B, T, d] -> logits.

  Attributes:
    kind: 'classify': out(act(dense(x))); 'tag', 'mean': out(x); 'mlm':
      decode(norm(act(dense(x)))) and a bias, where decode is the model's.
    classes: Outputs, but for 'mlm'.
    dim: Width of the dense layer.
    act: Activation after the dense layer.
    eps: Of the norm.
  """

  kind: str
  classes: int
  dim: int
  act: str
  eps: float

  # Not __call__, or the head itself were a layer, one with nothing to train.
  @nn.compact
  def logits(self, x, decode):
    if self.kind not in ('tag', 'mean'):
      x = nn.Dense(self.dim, name='dense')(x)
      x = layers.activation(self.act)(x)
    if self.kind == 'mlm':
      x = nn.LayerNorm(self.eps, name='norm')(x)
      return Bias(name='out')(decode(x))
    zeros = nn.initializers.zeros
    return nn.Dense(self.classes, kernel_init=zeros, name='out')(x)


class Encoder(nn.Module):
  """Encoder, ids [B, T] -> hidden states [B, T, d] or what its head makes.

  Attributes:
    vocab: V.
    width: d.
    depth: Number of blocks.
    heads: Attention heads; must divide width.
    mlp_dim: Hidden width of the perceptrons.
    positions: Rows of the position table.
    types: Token types (segments); 0: the model has none.
    padding: None: positions 0, 1, 2, ...; else an id: tokens with this id are
      at the position of that number, the others are counted on from there.
    embed_dim: Width of the three tables; None: width. Projected if it differs.
    act: Activation of the perceptrons, a name in `layers.ACTIVATIONS`.
    eps: Of the norms.
    head: None: hidden states [B, T, d]; 'pool': their mean over the mask
      [B, d]; 'classify': logits [B, classes] as transformers has them; 'mean':
      the same by one layer on what 'pool' gives; 'tag': [B, T, classes];
      'mlm': [B, T, V], with the word table as decoder.
    classes: Outputs of 'classify', 'mean' and 'tag', whose last kernel starts
      at zero.
    head_act: Activation after the dense layer of 'classify'.
    mlm_act: The same for 'mlm'; None: act.
    dtype: Of the computation. Parameters, softmax and head are float32.
    scan: Stack the blocks into one scanned module 'blocks' instead of
      'block_0', 'block_1', ...: faster to compile.
    remat: Recompute the blocks in the backward pass: less memory.
  """

  vocab: int = 30522
  width: int = 384
  depth: int = 6
  heads: int = 12
  mlp_dim: int = 1536
  positions: int = 512
  types: int = 2
  padding: Optional[int] = None
  embed_dim: Optional[int] = None
  act: str = 'gelu'
  eps: float = 1e-12
  head: Optional[str] = None
  classes: int = 2
  head_act: str = 'tanh'
  mlm_act: Optional[str] = None
  dtype: Any = jnp.float32
  scan: bool = False
  remat: bool = False

  def setup(self):
    if self.head not in (None, *HEADS):
      raise ValueError(f'unknown head {self.head!r}, expected None or one of '
                       f'{HEADS}{nearest(str(self.head), HEADS)}')
    if self.width % self.heads:
      raise ValueError(
          f'width {self.width} cannot be split into {self.heads} heads; choose '
          'heads out of '
          f'{[h for h in range(1, self.width + 1) if self.width % h == 0]}')
    dim = self.embed_dim or self.width
    # Tables are read in float32 and rounded once, after the norm.
    self.word_embed = nn.Embed(self.vocab, dim)
    self.position_embed = nn.Embed(self.positions, dim)
    if self.types:
      self.type_embed = nn.Embed(self.types, dim)
    self.embed_norm = nn.LayerNorm(self.eps, dtype=self.dtype)
    if dim != self.width:
      self.embed_project = nn.Dense(self.width, dtype=self.dtype)
    block = functools.partial(
        Block, self.heads, self.mlp_dim, self.act, self.eps, self.dtype)
    stack = layers.stacked(block, self.depth, self.scan, self.remat,
                           inputs=(nn.broadcast,))
    if self.scan:
      self.blocks = stack
    else:
      self.block = stack  # block_0, block_1, ...
    mlm = self.head == 'mlm'
    if mlm or self.head in ('classify', 'mean', 'tag'):
      self.task = Head(
          self.head, self.classes, dim if mlm else self.width,
          self.mlm_act or self.act if mlm else self.head_act, self.eps,
          name='head')

  def __call__(self, ids, mask=None, types=None):
    """Runs the model.

    Args:
      ids: [B, T] integers.
      mask: [B, T] booleans or 0/1, True for real tokens; None: all are real.
      types: [B, T] integers below the attribute `types`; None: zeros.

    Returns:
      See `head`.
    """
    h = self._run(ids, mask, types)
    if self.head != 'classify':  # That one reads the first token of all.
      h = h[:, h.shape[1] - ids.shape[1]:]
    if self.head is None:
      return h
    h = h.astype(jnp.float32)
    if self.head in ('pool', 'classify', 'mean'):
      if mask is not None:
        mask = layers.for_keys(mask, h.shape[1], True)
      h = self.readout(h, mask)
    if self.head == 'pool':
      return h
    return self.task.logits(h, self.word_embed.attend)

  def hidden(self, ids, mask=None, types=None):
    """Hidden states of the last block, [B, T, d]; arguments as for a call."""
    h = self._run(ids, mask, types)
    return h[:, h.shape[1] - ids.shape[1]:]

  def embed(self, ids):
    """ids [B, T] -> word vectors [B, T, embed_dim]; prompts wrap it."""
    return self.word_embed(ids)

  def place(self, at, spare):
    """Positions, [1, T] or [B, T]; methods may move them by up to `spare`."""
    del spare  # Rows of the table that are left over.
    return at

  def _run(self, ids, mask, types):
    """As `hidden`, with the tokens that a prompt adds: [B, P + T, d]."""
    if ids.ndim != 2:
      raise ValueError(f'ids of shape {ids.shape}: expected [B, T]')
    for name, x in (('mask', mask), ('types', types)):
      if x is not None and x.shape != ids.shape:
        raise ValueError(f'{name} of shape {x.shape}: expected {ids.shape}')
    if types is not None and not self.types:
      raise ValueError('types given, but the model has none (types=0)')
    u, _ = layers.run_stack(
        self.blocks if self.scan else self.block,
        self._located(self.embed(ids), ids, types), layers.padding_mask(mask),
        inputs=(nn.broadcast,))
    return u

  def _located(self, u, ids, types):
    """Word vectors [B, P + T, e] -> input of the first block [B, P + T, d]."""
    n = u.shape[1]
    extra = n - ids.shape[1]
    first = 0 if self.padding is None else self.padding + 1
    spare = self.positions - first - n
    if spare < 0:
      prompt = f', {extra} of them of a prompt' if extra else ''
      raise ValueError(f'{n} tokens{prompt}: expected at most '
                       f'{self.positions - first}')
    if self.padding is None:
      at = self.place(jnp.arange(n)[None], spare)
    elif extra:  # As transformers: it sees vectors, and cannot tell padding.
      at = self.place(jnp.arange(1, n + 1)[None], spare) + self.padding
    else:
      real = (ids != self.padding).astype(jnp.int32)
      at = self.place(jnp.cumsum(real, axis=1), spare) * real + self.padding
    u = u + self.position_embed(at)
    if self.types:
      kind = jnp.zeros_like(ids) if types is None else types
      u += self.type_embed(layers.for_keys(kind, n, 0))
    u = self.embed_norm(u)
    width = self.embed_dim or self.width
    return u if width == self.width else self.embed_project(u)

  def readout(self, h, mask=None):
    """h [B, T, d], mask [B, T] or None -> [B, d].

    The first token for 'classify', else the mean over the mask.
    """
    if self.head == 'classify':
      return h[:, 0]
    if mask is None:
      return h.mean(axis=1)
    w = mask.astype(h.dtype)[..., None]
    return (h * w).sum(axis=1) / jnp.maximum(w.sum(axis=1), 1.)
