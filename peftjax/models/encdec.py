"""T5-style encoder-decoder transformers with hook methods.

T5 (relu, tied tables) and T5 v1.1 and Flan-T5 (gated gelu, a table of its own
for the logits) differ in attributes alone. RMSNorm before every sub-layer, no
biases, attention scores unscaled, and learned biases of the scores by the
distance of two tokens: one table a stack, which all its layers share. Letters:
B batch, T tokens, S keys, P tokens that a prompt adds, H heads, h head width, d
model width, V vocabulary.

Hooks, ordinary methods that `nn.intercept_methods` sees:

  EncDec.embed(ids) -> [B, T, d]            source tokens; may be made to return
                                            P more, in front
  EncDec.embed_targets(ids) -> [B, T, d]    the same for target tokens. Called
                                            once: cached steps call `lookup`
  Attention.attend(q, k, v, mask, bias=...) one attention read; more keys and
                                            values may be put in front
  DistanceBias.reach(keys)                  their positions; more may be put in
                                            front
  Block.join(u, x, a, which)                residual stream, sub-layer's input
                                            and output
  EncDec.readout(h, mask) -> [B, T, d]      target states that the logits read

Sources: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer" (Raffel et al., arXiv 1910.10683); v1.1: "GLU Variants Improve
Transformer" (Shazeer, arXiv 2002.05202); "Scaling Instruction-Finetuned
Language Models" (Chung et al., arXiv 2210.11416). No dropout.
"""

import functools
from typing import Any, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax.method import nearest
from peftjax.models import layers
from peftjax.models.encdec_block import Block, DistanceBias

HEADS = (None, 'lm')


class Cache(NamedTuple):
  """Keys and values of target tokens so far (S slots) and of the source.

  k, v: [layers, B, S, H, h] of the targets.
  source_k, source_v: [layers, B, P + T, H, h] of the encoded source.
  length: Scalar, slots written so far.
  """

  k: jax.Array
  v: jax.Array
  source_k: jax.Array
  source_v: jax.Array
  length: jax.Array


class Stack(nn.Module):
  """Encoder or decoder: blocks, the biases that they share, a last norm."""

  depth: int
  layer: Any  # partial of Block
  bias: Any  # partial of DistanceBias
  eps: float
  dtype: Any
  scan: bool
  remat: bool

  def setup(self):
    shared = nn.broadcast
    self.inputs = (0, shared, shared, shared, shared, shared)
    stack = layers.stacked(
        self.layer, self.depth, self.scan, self.remat, self.inputs)
    if self.scan:
      self.blocks = stack
    else:
      self.block = stack  # block_0, block_1, ...
    self.distance = self.bias()
    self.norm = layers.RMSNorm(self.eps, dtype=self.dtype)

  def __call__(self, u, mask, queries, keys, past=None, encoded=None,
               source_mask=None, start=0):
    """u [B, T, d] -> (h [B, T, d], keys and values of all layers or None).

    queries [T] and keys [S] are positions; the rest is as for Block.
    """
    blocks = self.blocks if self.scan else self.block
    u, new = layers.run_stack(
        blocks, u, past, encoded, mask, self.distance(queries, keys),
        source_mask, start, inputs=self.inputs)
    return self.norm(u), new


class EncDec(nn.Module):
  """Encoder-decoder transformer: ids, targets -> logits, see `head`.

  Attributes:
    vocab: V.
    width: d.
    depth: Blocks of the encoder.
    decoder_depth: Blocks of the decoder; None: depth.
    heads: H.
    head_dim: h; heads * head_dim may differ from width.
    mlp_dim: Hidden width of the perceptrons.
    act: Their activation, a name in `layers.ACTIVATIONS`.
    gated: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
    buckets: Of distances, for each of the two tables of biases.
    furthest: Distance where the last bucket begins.
    tied: The logits are read with the table of token vectors, from states
      scaled by d ** -0.5; else with a table of their own, unscaled.
    eps: Of the norms.
    head: 'lm': logits [B, T, V]. None: hidden states of the decoder [B, T, d].
    dtype: Of the computation. Parameters, softmax and logits are float32.
    scan: One scanned module 'blocks' in each stack instead of 'block_0', ...
    remat: Recompute the blocks in the backward pass: less memory.
  """

  vocab: int = 32128
  width: int = 512
  depth: int = 6
  decoder_depth: Optional[int] = None
  heads: int = 8
  head_dim: int = 64
  mlp_dim: int = 2048
  act: str = 'relu'
  gated: bool = False
  buckets: int = 32
  furthest: int = 128
  tied: bool = True
  eps: float = 1e-6
  head: Optional[str] = 'lm'
  dtype: Any = jnp.float32
  scan: bool = False
  remat: bool = False

  def setup(self):
    if self.head not in HEADS:
      raise ValueError(f'unknown head {self.head!r}, expected None or '
                       f"'lm'{nearest(str(self.head), ('lm',))}")
    if self.buckets < 4 or self.furthest <= self.buckets // 2:
      raise ValueError(f'buckets={self.buckets}, furthest={self.furthest}: '
                       'expected at least 4, and more than half of that')
    # The table stays float32, as the logits that it makes when tied.
    self.tokens = nn.Embed(self.vocab, self.width,
                           embedding_init=nn.initializers.normal(1.))

    def stack(depth, cross):
      block = functools.partial(
          Block, self.heads, self.head_dim, self.mlp_dim, self.act, self.gated,
          cross, self.eps, self.dtype)
      bias = functools.partial(DistanceBias, self.heads, self.buckets,
                               self.furthest, not cross, self.width)
      return Stack(depth, block, bias, self.eps, self.dtype, self.scan,
                   self.remat)

    self.encoder = stack(self.depth, cross=False)
    self.decoder = stack(self._decoder_depth(), cross=True)
    if self.head == 'lm' and not self.tied:
      self.lm_head = nn.Dense(self.vocab, use_bias=False,
                              kernel_init=nn.initializers.normal(1.))

  def __call__(self, ids, targets, mask=None, target_mask=None):
    """Runs both stacks.

    Args:
      ids: [B, T] integers, the source.
      targets: [B, T'] integers, what the decoder has read: the wanted tokens
        moved one to the right behind a start token.
      mask: [B, T] booleans or 0/1, True for real tokens; None: all are.
      target_mask: [B, T'], the same for targets. Padding on the right needs
        none: no token looks ahead.

    Returns:
      See `head`.
    """
    return self.decode(targets, self.encode(ids, mask), mask, target_mask)

  def encode(self, ids, mask=None):
    """Source ids [B, T] -> hidden states [B, P + T, d], normalised."""
    _check(ids, mask, 'ids')
    u = self.embed(ids)
    at = jnp.arange(u.shape[1])
    h, _ = self.encoder(u, _pairs(mask, u.shape[1]), at, at)
    return h

  def decode(self, targets, encoded, mask=None, target_mask=None, cache=None):
    """Target ids and an encoded source -> what `head` says.

    Args:
      targets: [B, T] integers.
      encoded: What `encode` returned, [B, S, d]; unused with a Cache, which
        has its keys and values.
      mask: Of the source, as `encode` had it.
      target_mask: [B, T]; not together with a cache.
      cache: None; or N, to start a cache with room for N tokens more; or the
        Cache that the last call gave, `targets` being the tokens that follow;
        one that has no room for them gives NaN.

    Returns:
      The output [B, T, ...]; with a cache, (output, Cache).
    """
    _check(targets, target_mask, 'targets')
    if cache is not None and target_mask is not None:
      raise ValueError('target_mask with a cache: targets that are generated '
                       'have no padding before them')
    step = isinstance(cache, Cache)
    u = self.lookup(targets) if step else self.embed_targets(targets)
    n, extra, start, past = u.shape[1], u.shape[1] - targets.shape[1], 0, None
    if step:
      start, encoded = cache.length, None
      past = {'self': (cache.k, cache.v),
              'cross': (cache.source_k, cache.source_v)}
    elif cache is not None:
      empty = jnp.zeros((self._decoder_depth(), len(u), n + cache, self.heads,
                         self.head_dim), self.dtype)
      past = {'self': (empty, empty)}
    at = start + jnp.arange(n)
    keys = at if past is None else jnp.arange(past['self'][0].shape[2])
    pairs = layers.causal_mask(at[None], keys[None])
    if target_mask is not None:
      pairs &= _pairs(target_mask, n)
    source = cache.source_k.shape[2] if step else encoded.shape[1]
    h, new = self.decoder(u, pairs, at, keys, past, encoded,
                          _pairs(mask, source), start)
    out = self._output(self.readout(h[:, extra:], target_mask))
    if cache is None:
      return out
    # A write behind the last slot would land on others, unnoticed.
    out = jnp.where(start + n <= len(keys), out, jnp.nan)
    return out, Cache(*new['self'], *new['cross'], start + n)

  def embed(self, ids):
    """Source ids [B, T] -> token vectors [B, T, d]; prompts wrap it."""
    return self.lookup(ids)

  def embed_targets(self, ids):
    """Target ids [B, T] -> token vectors [B, T, d]; prompts wrap it."""
    return self.lookup(ids)

  def lookup(self, ids):
    """Ids [B, T] -> token vectors [B, T, d]."""
    return self.tokens(ids).astype(self.dtype)

  def readout(self, h, mask=None):
    """Decoder states [B, T, d], mask [B, T] or None -> the same, for logits."""
    del mask  # For interceptors.
    return h

  def _output(self, h):
    h = h.astype(jnp.float32)
    if self.head is None:
      return h
    if self.tied:
      return self.tokens.attend(h * self.width ** -0.5)
    return self.lm_head(h)

  def _decoder_depth(self):
    return self.depth if self.decoder_depth is None else self.decoder_depth


def _check(ids, mask, name):
  if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f'{name} of shape {ids.shape} and type {ids.dtype}: '
                     'expected integers [B, T]')
  if mask is not None and mask.shape != ids.shape:
    raise ValueError(f'mask of shape {mask.shape}: expected that of {name}, '
                     f'{ids.shape}')


def _pairs(mask, n):
  """Mask [B, T] -> [B, 1, 1, n]: tokens put in front are real; None stays."""
  if mask is None:
    return None
  if mask.shape[1] > n:
    raise ValueError(f'mask of {mask.shape[1]} tokens for {n}')
  return layers.padding_mask(layers.for_keys(mask.astype(bool), n, True))
