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
  Block.join(u, x, a, which)                residual stream, sub-layer in and out
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
import numpy as np

from peftjax.method import nearest
from peftjax.models import layers

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


def buckets(distance, count, furthest, both):
  """Buckets of key position minus query position: integers, like `distance`.

  Half of the buckets of a direction hold one distance each, the others grow
  with its logarithm up to `furthest`; what is further is in the last.

  Args:
    distance: Integers of any shape.
    count: Number of buckets.
    furthest: Distance where the last bucket begins.
    both: Keys after the query have buckets of their own, half of all; else
      they share the one of distance 0.
  """
  half = count // 2 if both else count
  exact = half // 2
  # A table in float32, as the released code rounds: no logarithm at run time.
  n = np.arange(furthest + 1)
  far = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(exact))
  far = far / np.float32(np.log(furthest / exact)) * np.float32(half - exact)
  far = np.minimum(exact + far.astype(np.int32), half - 1)
  table = jnp.asarray(np.where(n < exact, n, far), jnp.int32)
  back = jnp.abs(distance) if both else jnp.maximum(-distance, 0)
  out = table[jnp.minimum(back, furthest)]
  return out + jnp.where(distance > 0, half, 0) if both else out


class DistanceBias(nn.Module):
  """Biases of attention scores by distance, -> [1, H, T, S], float32."""

  heads: int
  count: int
  furthest: int
  both: bool
  width: int

  @nn.compact
  def __call__(self, queries, keys):
    """queries [T], keys [S]: their positions."""
    table = self.param('table', nn.initializers.normal(self.width ** -0.5),
                       (self.count, self.heads))
    at = buckets(keys[None, :] - queries[:, None], self.count, self.furthest,
                 self.both)
    return table.astype(jnp.float32)[at].transpose(2, 0, 1)[None]


class Attention(nn.Module):
  """Attention of x [B, T, d] to source [B, S, d] -> ([B, T, d], (k, v))."""

  heads: int
  head_dim: int
  dtype: Any

  @nn.compact
  def __call__(self, x, source, mask=None, bias=None, past=None, start=0):
    """One attention layer.

    Args:
      x: [B, T, d].
      source: What keys and values are made of, x itself in self-attention;
        None: they are `past`.
      mask, bias: As for `attend`.
      past: Keys and values of earlier calls, [B, S, H, h] each; new ones are
        written into them from slot `start` on.
      start: Scalar.

    Returns:
      ([B, T, d], (k, v) that were attended to).
    """
    d, inner = x.shape[-1], self.heads * self.head_dim
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, self.head_dim)

    def dense(name, features, std):
      return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name,
                      kernel_init=nn.initializers.normal(std))

    # Scores are unscaled, so queries start smaller by the root of h.
    q = split(dense('query', inner, (d * self.head_dim) ** -0.5)(x))
    if source is None:
      k, v = past
    else:
      k, v = (split(dense(n, inner, d ** -0.5)(source))
              for n in ('key', 'value'))
      if past is not None:
        k, v = (jax.lax.dynamic_update_slice_in_dim(
            old, new.astype(old.dtype), start, axis=1)
                for old, new in zip(past, (k, v)))
    # By keyword: interceptors that replace k, v and mask leave it as it is.
    y = self.attend(q, k, v, mask, bias=bias)
    y = y.reshape(*y.shape[:2], inner)
    return dense('out', d, inner ** -0.5)(y), (k, v)

  def attend(self, q, k, v, mask=None, bias=None):
    """Attention read: q [B, T, H, h], k and v [B, S, H, h] -> like q.

    mask: Booleans that broadcast to [B, H, T, S], True where a query may look.
    bias: [1, H, T, S] of the scores, or None. What is put in front of the keys
      has none.
    """
    return layers.attention(q, k, v, mask, bias, scale=1.)


class Mlp(nn.Module):
  """Perceptron over the last axis, [B, T, d] -> [B, T, d]."""

  dim: int
  act: str
  gated: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    def dense(name, features, std):
      return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name,
                      kernel_init=nn.initializers.normal(std))

    d, act = x.shape[-1], layers.activation(self.act)
    h = dense('up', self.dim, d ** -0.5)(x)
    h = act(dense('gate', self.dim, d ** -0.5)(x)) * h if self.gated else act(h)
    return dense('down', d, self.dim ** -0.5)(h)


class Block(nn.Module):
  """One layer of either stack: u [B, T, d] -> (u, keys and values or None)."""

  heads: int
  head_dim: int
  mlp_dim: int
  act: str
  gated: bool
  cross: bool  # attends to an encoded source too
  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, u, past, encoded, mask, bias, source_mask, start):
    """past: None, or {'self': (k, v)} and, after the first call, 'cross'."""
    norm = functools.partial(layers.RMSNorm, self.eps, dtype=self.dtype)
    read = functools.partial(Attention, self.heads, self.head_dim, self.dtype)
    past, new = past or {}, {}
    x = norm(name='norm1')(u)
    a, new['self'] = read(name='attn')(
        x, x, mask, bias, past.get('self'), start)
    u = self.join(u, x, a, 'attn')
    if self.cross:
      x = norm(name='cross_norm')(u)
      a, new['cross'] = read(name='cross_attn')(
          x, encoded, source_mask, None, past.get('cross'))
      u = self.join(u, x, a, 'cross_attn')
    x = norm(name='norm2')(u)
    a = Mlp(self.mlp_dim, self.act, self.gated, self.dtype, name='mlp')(x)
    return self.join(u, x, a, 'mlp'), new if past else None

  def join(self, u, x, a, which):
    """Residual join of stream u, sub-layer input x and output a [B, T, d].

    which: 'attn', 'cross_attn' or 'mlp', the sub-layer that made a.
    """
    del x, which  # For interceptors: parallel adapters read them.
    return u + a


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
    if self.buckets < 4 or self.buckets % 2 or self.furthest <= self.buckets:
      raise ValueError(f'buckets={self.buckets}, furthest={self.furthest}: '
                       'expected an even number from 4 on, and more than that')
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
        Cache that the last call gave, `targets` being the tokens that follow.

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
