"""The small models that conformance runs methods on, and their parameters.

One knows nothing of this library; methods on hooks need a backbone that calls
them. Parameters are the same numbers in all forms, stacked where scanned.
"""

import functools
import math
from typing import Any
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftjax import method as method_lib
from peftjax import sites as sites_lib
from peftjax import theta as theta_lib
from peftjax import trees
from peftjax.models import decoder
from peftjax.models import vit

DEPTH, BATCH = 2, 8


@functools.cache
def _options():
  """Compiler options that halve the time to compile tiny models on a CPU."""
  options = dict(xla_backend_optimization_level=0,
                 xla_llvm_disable_expensive_passes=True,
                 xla_cpu_use_fusion_emitters=False,
                 xla_cpu_parallel_codegen_split_count=1)
  if jax.default_backend() != 'cpu':
    return {}
  try:
    jax.jit(lambda: 0, compiler_options=options)()
  except jax.errors.JaxRuntimeError:  # not an option of this version
    return {}
  return options


def jit(fn, **kwargs):
  """jax.jit, for functions that are compiled once and hardly run."""
  return jax.jit(fn, compiler_options=_options(), **kwargs)


def noise(path, shape):
  return np.random.default_rng(zlib.crc32(path.encode())).normal(
      size=shape).astype(np.float32)


def _random(shapes):
  """Parameters without zeros: kernels of unit gain, scales around 1."""
  def one(path, s):
    v = noise(path, s.shape)
    if path.endswith('scale'):
      return 1 + 0.1 * v
    return v / math.sqrt(max(math.prod(s.shape[:-1]), 1))

  flat = trees.flatten(shapes)
  return trees.unflatten({p: jnp.asarray(one(p, s)) for p, s in flat.items()})


def _attend(query, key, value, **unused):
  """Attention with a sigmoid for scores, [..., T, H, hd] each.

  Under softmax the gradient of a key's bias is zero in exact arithmetic, and
  no test could tell it from a dead parameter.
  """
  del unused
  scores = nn.sigmoid(jnp.einsum('...qhd,...khd->...hqk', query, key))
  return jnp.einsum('...hqk,...khd->...qhd', scores, value) / key.shape[-3]


class Block(nn.Module):
  """Pre-norm transformer block of Flax's own layers."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, _=None):
    h = nn.LayerNorm(dtype=self.dtype, name='norm1')(x)
    x += nn.MultiHeadDotProductAttention(
        2, dtype=self.dtype, attention_fn=_attend, name='attn')(h, h)
    h = nn.LayerNorm(dtype=self.dtype, name='norm2')(x)
    h = nn.gelu(nn.Dense(16, dtype=self.dtype, name='up')(h))
    return x + nn.Dense(8, dtype=self.dtype, name='down')(h), None


class Tiny(nn.Module):
  """Convolution, table, blocks, norm, head: [B, 4, 4, 2] -> [B, 3]."""

  scan: bool = False
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images):
    x = nn.Conv(8, (2, 2), (2, 2), dtype=self.dtype, name='stem')(images)
    x = x.reshape(x.shape[0], -1, 8)
    ids = jnp.arange(x.shape[1])  # images have no other
    x += nn.Embed(8, 8, dtype=self.dtype, name='embed')(ids)
    block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
    if self.scan:
      x, _ = nn.scan(
          block, variable_axes={'params': 0, 'aux': 0},
          split_rngs={'params': True, 'dropout': True},
          length=DEPTH)(self.dtype, name='blocks')(x, None)
    else:
      for i in range(DEPTH):
        x, _ = block(self.dtype, name=f'block_{i}')(x)
    x = nn.LayerNorm(dtype=self.dtype, name='norm')(x)
    return nn.Dense(3, dtype=self.dtype, name='head')(x.mean(1))


def model_for(kind, scan, remat):
  """(model, inputs, labels).

  kind: 'layers', a model that knows nothing of this library; or a backbone with
    hook methods, of 'text' or 'images'.
  """
  rng = np.random.default_rng(0)
  images = rng.normal(size=(BATCH, 4, 4, 3)).astype(np.float32)
  labels = rng.normal(size=(BATCH, 3)).astype(np.float32)
  if kind == 'layers':
    return Tiny(scan, remat), images[..., :2], labels
  if kind == 'text':
    model = decoder.Decoder(
        vocab=11, width=8, depth=DEPTH, heads=2, kv_heads=1, mlp_dim=16,
        gated=False, position='learned', max_positions=16, head='classify',
        classes=3, scan=scan, remat=remat)
    return model, rng.integers(0, 11, (BATCH, 5)).astype(np.int32), labels
  model = vit.ViT(classes=3, width=8, depth=DEPTH, heads=2, mlp_dim=16, patch=2,
                  scan=scan, remat=remat)
  return model, images, labels


@functools.cache
def base_of(kind, scan):
  """(sites, params) of a model; the same numbers, stacked where scanned."""
  unrolled, x, _ = model_for(kind, False, False)
  shapes = jax.eval_shape(unrolled.init, jax.random.key(0), x)['params']
  params = _random(shapes)
  if scan:
    params = trees.stack(params)
  return sites_lib.describe(model_for(kind, scan, False)[0], x), params


@functools.cache
def int8_of(kind, scan):
  """(method, theta) of an int8 base."""
  method = method_lib.load('quantised.int8')
  sites, params = base_of(kind, scan)
  return method, jit(lambda p: theta_lib.init(
      method, jax.random.key(0), sites, p))(params)


def kind_for(method):
  """Which model a method is run on: a hook needs a backbone that calls it."""
  if method.on == '__call__':
    return 'layers'
  try:
    sites_lib.matched(method, base_of('text', False)[0])
  except ValueError:
    return 'images'
  return 'text'
