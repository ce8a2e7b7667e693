"""Decoder-only transformers with hook methods, one class for many families.

GPT-2, Llama 2 and 3, Mistral, Qwen 2, 2.5 and 3, Gemma 2, and mixtures of
experts (Mixtral, Qwen-MoE) differ in attributes alone. Letters: B batch, T new
tokens, S keys (cached and new), P tokens that a prompt adds, H heads, K
key-value heads, h head width, d model width, V vocabulary, E experts.

Hooks, ordinary methods that `nn.intercept_methods` sees:

  Decoder.embed(ids) -> [B, T, d]      token vectors, before learned positions;
                                       may be made to return P more tokens, in
                                       front. Called once: cached steps call
                                       `lookup` instead
  Decoder.place(positions, spare)      of all tokens; may be made larger
  Attention.attend(q, k, v, mask)      one attention read; more keys and values
                                       may be put in front, and the mask with
                                       them
  Block.join(u, x, a, which)           residual stream, sub-layer in and out
  Decoder.readout(h, mask) -> [B, d]   tokens to one vector an example

Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al.,
2019); "Llama 2" (arXiv 2307.09288) and "The Llama 3 Herd of Models" (arXiv
2407.21783); "Mistral 7B" (arXiv 2310.06825); "Qwen2.5" (arXiv 2412.15115) and
"Qwen3" (arXiv 2505.09388); "Gemma 2" (arXiv 2408.00118). No dropout.
"""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax.method import nearest
from peftjax.models import layers
from peftjax.models.decoder_block import attributes, Block, frequencies
from peftjax.models.decoder_block import Look, norm_layer

HEADS = (None, 'lm', 'classify', 'tag', 'pool')


class Cache(NamedTuple):
  """Keys and values of the tokens so far, in S slots, a pytree.

  k, v: [layers, B, S, K, h], rotated where the model rotates.
  positions: [B, S] of the tokens in the slots.
  mask: [B, S] True for slots that hold a real token.
  length: Scalar, slots written so far.
  """

  k: jax.Array
  v: jax.Array
  positions: jax.Array
  mask: jax.Array
  length: jax.Array


class Decoder(nn.Module):
  """Decoder-only transformer: ids [B, T] -> logits, see `head`.

  Attributes:
    vocab: V.
    width: d.
    depth: Number of blocks.
    heads: H.
    mlp_dim: Hidden width of the perceptrons; of one expert in a mixture.
    kv_heads: K, divides H; None: H. Each serves H / K heads.
    head_dim: h; None: d / H.
    activation: By its name in config files ('silu', 'gelu_new').
    gated: down(activation(gate(x)) * up(x)) instead of down(activation(up(x))).
    mlp_bias, qkv_bias, out_bias: Whether those layers add a bias.
    fused_qkv: One kernel 'attn/qkv' for queries, keys and values.
    qk_norm: RMSNorm of every query and key over its head.
    scale: Factor of the attention scores; None: 1 / sqrt(h).
    softcap: c in c tanh(scores / c); None: none.
    logit_softcap: The same for the logits of 'lm'.
    position: 'rotary' or 'learned'.
    max_positions: Rows of the table of learned positions; rotary ones have no
      limit.
    rope_theta, rope_scaling: See `decoder_block.frequencies`.
    windows: For each layer how many positions a query sees, its own included;
      0 for all. None: all everywhere.
    norm: 'rms' or 'layer'.
    norm_eps: Its epsilon.
    norm_offset: Of an RMSNorm's scale: 1 for Gemma.
    post_norms: Further norms on what a sub-layer returns.
    embed_scale: Factor of token vectors.
    experts: E of a mixture in each block; 0: one perceptron.
    experts_per_token: How many of them a token meets.
    normalise_gates: Gates of the chosen experts add up to 1.
    shared_dim: Hidden width of a gated expert that all tokens meet; 0: none.
    tied: 'lm' reads its logits with the table of token vectors.
    head: 'lm': logits [B, T, V]. 'classify': logits [B, classes], read at the
      last real token. 'tag': logits [B, T, classes]. 'pool': mean over real
      tokens, [B, d]. None: [B, T, d].
    classes: Outputs of 'classify' and 'tag', whose kernel starts at zero.
    dtype: Of the computation. Parameters, softmax and logits are float32.
    scan: One scanned module 'blocks' instead of 'block_0', 'block_1', ...
    remat: Recompute the blocks in the backward pass: less memory.
  """

  vocab: int = 512
  width: int = 64
  depth: int = 2
  heads: int = 4
  mlp_dim: int = 172
  kv_heads: Optional[int] = None
  head_dim: Optional[int] = None
  activation: str = 'silu'
  gated: bool = True
  mlp_bias: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  fused_qkv: bool = False
  qk_norm: bool = False
  scale: Optional[float] = None
  softcap: Optional[float] = None
  logit_softcap: Optional[float] = None
  position: str = 'rotary'
  max_positions: int = 1024
  rope_theta: float = 10_000.
  rope_scaling: Optional[Mapping[str, Any]] = None
  windows: Optional[tuple[int, ...]] = None
  norm: str = 'rms'
  norm_eps: float = 1e-5
  norm_offset: float = 0.
  post_norms: bool = False
  embed_scale: float = 1.
  experts: int = 0
  experts_per_token: int = 2
  normalise_gates: bool = True
  shared_dim: int = 0
  tied: bool = True
  head: Optional[str] = 'lm'
  classes: int = 2
  dtype: Any = jnp.float32
  scan: bool = False
  remat: bool = False

  def setup(self):
    self._check()
    kv_heads, head_dim = self._sizes()
    kwargs = attributes(Block, self) | dict(
        kv_heads=kv_heads, head_dim=head_dim)
    # Tables stay float32, as the logits that a tied one makes.
    table = functools.partial(
        nn.Embed, features=self.width,
        embedding_init=nn.initializers.normal(0.02))
    self.tokens = table(self.vocab)
    if self.position == 'learned':
      self.places = table(self.max_positions)
    # Window, cached keys and values: of a layer. Look: of all.
    self.inputs = (0, 0, nn.broadcast)
    blocks = layers.stacked(functools.partial(Block, **kwargs), self.depth,
                            self.scan, self.remat, self.inputs)
    if self.scan:
      self.blocks = blocks
    else:
      self.block = blocks  # block_0, block_1, ...
    self.final_norm = norm_layer(self)
    if self.head == 'lm' and not self.tied:
      self.head_layer = nn.Dense(
          self.vocab, use_bias=False, name='head',
          kernel_init=nn.initializers.normal(0.02))
    elif self.head in ('classify', 'tag'):
      self.head_layer = nn.Dense(
          self.classes, use_bias=self.head == 'tag', name='head',
          kernel_init=nn.initializers.zeros)

  def __call__(self, ids, mask=None, positions=None, segments=None, cache=None):
    """Token ids to what `head` says.

    Args:
      ids: [B, T] integers.
      mask: [B, T], True for real tokens, padding on either side; None: all.
      positions: [B, T] integers; None: counts real tokens from 0, anew in each
        segment.
      segments: [B, T] integers: attend only within the same one (packed
        examples). Tokens that a prompt adds are seen by all segments.
      cache: None; or N, to start a cache with room for N tokens more; or the
        Cache that the last call gave, `ids` being the tokens that follow. One
        that has no room for them gives NaN.

    Returns:
      The output; with a cache, (output, Cache). Outputs are of the tokens of
      `ids`, those that a prompt adds are left out.

    Raises:
      ValueError: shapes that do not fit each other, more positions than learned
        ones, or segments together with a cache.
    """
    real = self._real(ids, mask, positions, segments, cache)
    step = isinstance(cache, Cache)
    u = self.lookup(ids) if step else self.embed(ids)
    extra = u.shape[1] - ids.shape[1]
    front = lambda x, v: jnp.pad(x, ((0, 0), (extra, 0)), constant_values=v)
    if positions is None:
      positions = _count(real, segments)
      if step:
        positions += cache.mask.sum(1, dtype=jnp.int32)[:, None]
    order = jnp.arange(extra, dtype=jnp.int32)
    positions = jnp.concatenate(
        [jnp.broadcast_to(order, (len(ids), extra)), positions + extra], axis=1)
    mask = front(real, True)
    room = cache if isinstance(cache, int) else 0
    positions = self.place(positions, self._spare(mask.shape[1] + room))
    if self.position == 'learned':
      u = u + self.places(positions).astype(u.dtype)

    start, past, keys, seen = 0, None, positions, mask
    if cache is not None:
      if not step:
        cache = self._empty(mask.shape[0], mask.shape[1] + room)
      start, past = cache.length, (cache.k, cache.v)
      put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
          old, new, start, axis=1)
      keys, seen = put(cache.positions, keys), put(cache.mask, seen)
    ahead = (positions[:, :, None] - keys[:, None, :])[:, None]
    pairs = (ahead >= 0) & layers.padding_mask(seen)
    if segments is not None:
      s = front(segments, -1)  # Of a prompt: belongs to every segment.
      same = s[:, :, None] == s[:, None, :]
      pairs &= (same | (s == -1)[:, None, :])[:, None]
    window = None
    if self.windows is not None:
      far = jnp.iinfo(jnp.int32).max
      window = jnp.asarray([w or far for w in self.windows], jnp.int32)
    turn = None
    if self.position == 'rotary':
      turn = layers.turns(positions, frequencies(
          self._sizes()[1], self.rope_theta, self.rope_scaling))
    look = Look(pairs, None if window is None else ahead, turn, start)
    u, new = layers.run_stack(self.blocks if self.scan else self.block, u,
                              window, past, look, inputs=self.inputs)
    out = self._output(self.final_norm(u)[:, extra:], real)
    if cache is None:
      return out
    k, v = (jax.lax.dynamic_update_slice_in_dim(
        old, a.astype(old.dtype), start, axis=2) for old, a in zip(past, new))
    end = start + mask.shape[1]
    # A write behind the last slot would land on others, unnoticed.
    out = jnp.where(end <= keys.shape[1], out, jnp.nan)
    return out, Cache(k, v, keys, seen, end)

  def embed(self, ids):
    """Ids [B, T] -> token vectors [B, T, d]; prompts wrap it."""
    return self.lookup(ids)

  def lookup(self, ids):
    """Ids [B, T] -> token vectors [B, T, d], scaled."""
    u = self.tokens(ids).astype(self.dtype)
    return u * jnp.asarray(self.embed_scale, u.dtype)

  def place(self, positions, spare):
    """Positions [B, T]; methods may move them by up to `spare` (None: any)."""
    del spare  # Rows of the table that are left over.
    return positions

  def readout(self, h, mask):
    """h [B, T, d], mask [B, T] -> [B, d]: the last real token, or the mean."""
    if self.head == 'pool':
      w = mask.astype(h.dtype)[..., None]
      return (h * w).sum(axis=1) / jnp.maximum(w.sum(axis=1), 1.)
    last = jnp.argmax(jnp.arange(mask.shape[1]) * mask, axis=1)
    return jnp.take_along_axis(h, last[:, None, None], axis=1)[:, 0]

  def _output(self, h, mask):
    """Last hidden states [B, T, d] -> what `head` says, float32."""
    h = h.astype(jnp.float32)
    if self.head is None:
      return h
    if self.head == 'tag':
      return self.head_layer(h)
    if self.head == 'lm':
      y = self.tokens.attend(h) if self.tied else self.head_layer(h)
      c = self.logit_softcap
      return y if c is None else c * jnp.tanh(y / c)
    h = self.readout(h, mask)
    return h if self.head == 'pool' else self.head_layer(h)

  def _sizes(self):
    """K and h."""
    return (self.kv_heads or self.heads,
            self.head_dim or self.width // self.heads)

  def _empty(self, batch, slots):
    """A cache with nothing in it."""
    kv = jnp.zeros((self.depth, batch, slots, *self._sizes()), self.dtype)
    return Cache(kv, kv, jnp.zeros((batch, slots), jnp.int32),
                 jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))

  def _real(self, ids, mask, positions, segments, cache):
    """Checks the inputs -> mask [B, T] of real tokens, booleans."""
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(f'ids of shape {ids.shape} and type {ids.dtype}: '
                       'expected integers [B, T]')
    for name, a in dict(mask=mask, positions=positions,
                        segments=segments).items():
      if a is not None and a.shape != ids.shape:
        raise ValueError(f'{name} of shape {a.shape}: expected that of ids, '
                         f'{ids.shape}')
    if segments is not None and cache is not None:
      raise ValueError('segments with a cache: packed examples are not for '
                       'generation; give one example a row')
    return jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)

  def _spare(self, n):
    """Learned positions that n tokens leave over; None: there is no limit."""
    if self.position != 'learned':
      return None
    if n > self.max_positions:
      raise ValueError(f'{n} tokens, with those of prompts and generation: the '
                       f'model has {self.max_positions} learned positions')
    return self.max_positions - n

  def _check(self):
    choices = dict(head=HEADS, norm=('rms', 'layer'),
                   position=('rotary', 'learned'))
    for name, known in choices.items():
      if getattr(self, name) not in known:
        raise ValueError(f'{name}={getattr(self, name)!r}'
                         f'{nearest(getattr(self, name), known)}')
    if self.head_dim is None and self.width % self.heads:
      raise ValueError(f'width {self.width} does not divide into {self.heads} '
                       'heads; give head_dim')
    if self.heads % self._sizes()[0]:
      raise ValueError(
          f'kv_heads={self.kv_heads} does not divide heads={self.heads}')
    if self.windows is not None and len(self.windows) != self.depth:
      raise ValueError(f'windows={self.windows}: expected one for each of '
                       f'{self.depth} layers')


def _count(real, segments):
  """Positions [B, T] of real tokens, from 0 in every segment."""
  n = jnp.cumsum(real, axis=1, dtype=jnp.int32)
  if segments is not None:
    first = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    before = jnp.where(first, n - real, 0)  # Real tokens of other segments.
    n = n - jax.lax.cummax(before, axis=1)
  return jnp.maximum(n - 1, 0)
