"""Quantised kernels: blocks of codes with one scale each.

A kernel K [d_in, d_out] is taken output by output, w = K^T [d_out, d_in] row by
row, and cut into runs of `block` entries; the last run may be short, and a run
may reach into the next output. That is the order of bitsandbytes, whose bytes
are the same where a row fills whole bytes.

  absmax_n = max |block_n|                one a block
  code = the entry of the code book nearest to w / absmax, ties to the lower
  w ~ book[code] absmax

All take and give one matrix, are jittable and go over stacks by vmap. Scales
are float32.
"""

import functools
import math
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np

BITS = (2, 3, 4)
# As published. The closed form is 1.1e-7 away from it, which is rounding.
_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0)
_TAIL = 0.9677083  # 1 - (1/32 + 1/30) / 2, as it is cut off there
SECOND = 256  # absmax that share a scale of their own


@functools.cache
def normal_float(bits):
  """The code book NF2, NF3 or NF4: float32 [2^bits], ascending, from -1 to 1.

  Quantiles of the normal distribution at even steps of probability, on both
  sides of an exact zero, with one more entry above it than below.

  Raises:
    ValueError: bits other than 2, 3, 4.
  """
  if bits not in BITS:
    near = round(min(max(bits, 2), 4)) if bits == bits else 4
    raise ValueError(f'bits={bits}: expected 2, 3 or 4 (8 are those of int8); '
                     f'the nearest is {near}')
  if bits == 4:
    return np.float32(_NF4)
  return closed_form(bits)


def closed_form(bits):
  """What `normal_float` holds, from the quantiles."""
  half = 2 ** (bits - 1)
  quantiles = lambda n: [
      NormalDist().inv_cdf(p) for p in np.linspace(_TAIL, 0.5, n)[:-1]]
  book = np.sort([*quantiles(half + 1), 0, *(-np.array(quantiles(half)))])
  return np.float32(book / book.max())


@functools.cache
def dynamic_map():
  """The signed 8-bit map of bitsandbytes: float32 [256], ascending.

  2^i entries of either sign for every power of ten 10^(i - 6), i = 0 to 6; 0;
  and 1, without -1.
  """
  ends = [np.linspace(0.1, 1, 2 ** i + 1) for i in range(7)]
  positive = np.concatenate([
      (e[1:] + e[:-1]) / 2 * 10.0 ** (i - 6) for i, e in enumerate(ends)])
  return np.float32(np.sort([*positive, *(-positive), 0, 1]))


# ------------------------------------------------------------------ codes
def nearest(book, v):
  """uint8 codes of the entries of an ascending book nearest to v; ties down."""
  middle = jnp.asarray((book[1:] + book[:-1]) / 2)
  return jnp.searchsorted(middle, v, method='compare_all').astype(jnp.uint8)


def entries(book, codes):
  """book[codes], by selections alone.

  As a tree of len(book) - 1 selections it fuses with what comes before and
  after. A gather does not: on a CPU a product with a decoded kernel of 1024 x
  1024 and its gradient took 7.8 ms with one, 5.0 ms so.
  """
  level, bit = list(np.float32(book)), 0
  while len(level) > 1:
    one = (codes >> bit) & 1 == 1
    level = [jnp.where(one, b, a) for a, b in zip(level[::2], level[1::2])]
    bit += 1
  return level[0]


def _group(bits):
  """(codes, bytes) of the smallest whole number of bytes."""
  n = 8 // math.gcd(8, bits)
  return n, n * bits // 8


def pack(codes, bits):
  """Codes [..., d] one after another, the first in the highest bits.

  Returns:
    uint8 [..., d bits / 8]. Where a row does not fill whole groups of bytes (2
    codes at 4 bits, 4 at 2, 8 at 3) it stays one code a byte, int8 [..., d]:
    the dtype tells the two apart.
  """
  n, size = _group(bits)
  if codes.shape[-1] % n:
    return codes.astype(jnp.int8)
  codes = codes.reshape(*codes.shape[:-1], -1, n).astype(jnp.uint32)
  word = sum(codes[..., i] << (bits * (n - 1 - i)) for i in range(n))
  out = [word >> (8 * (size - 1 - i)) & 255 for i in range(size)]
  out = jnp.stack(out, -1).astype(jnp.uint8)
  return out.reshape(*out.shape[:-2], -1)


def unpack(packed, bits):
  """Inverse of `pack`: codes [..., d], uint8."""
  if packed.dtype == jnp.int8:
    return packed.astype(jnp.uint8)
  n, size = _group(bits)
  part = packed.reshape(*packed.shape[:-1], -1, size)
  if size > 1:
    part = part.astype(jnp.uint32)
  word = sum(part[..., i] << (8 * (size - 1 - i)) for i in range(size))
  codes = [word >> (bits * (n - 1 - i)) & (2 ** bits - 1) for i in range(n)]
  codes = jnp.stack(codes, -1).astype(jnp.uint8)
  return codes.reshape(*codes.shape[:-2], -1)


# ----------------------------------------------------------------- kernels
def _blocks(flat, block):
  """[n] -> [ceil(n / block), block], zeros at the end."""
  return jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)


def _scaled(blocks):
  """(blocks / absmax, absmax [n]); a block of zeros stays zeros."""
  absmax = jnp.abs(blocks).max(1)
  return blocks / jnp.where(absmax > 0, absmax, 1)[:, None], absmax


def quantise(kernel, bits, block):
  """Kernel [d_in, d_out] -> dict(codes, absmax).

  codes: [d_out, ...] as `pack` leaves rows of d_in.
  absmax: [ceil(d_in d_out / block)].
  """
  w = kernel.astype(jnp.float32).T
  scaled, absmax = _scaled(_blocks(w.reshape(-1), block))
  codes = nearest(normal_float(bits), scaled).reshape(-1)[:w.size]
  return dict(codes=pack(codes.reshape(w.shape), bits), absmax=absmax)


def dequantise(codes, absmax, bits, block):
  """Inverse of `quantise`: the rounded kernel [d_in, d_out], float32."""
  w = entries(normal_float(bits), unpack(codes, bits))
  scaled = _blocks(w.reshape(-1), block) * absmax.astype(jnp.float32)[:, None]
  return scaled.reshape(-1)[:w.size].reshape(w.shape).T


def quantise_scales(absmax):
  """Scales [n] quantised in turn: dict(absmax, absmax_scale, absmax_mean).

  absmax - mean in blocks of 256, by the signed dynamic map:
  absmax: uint8 [n]. absmax_scale: [ceil(n / 256)]. absmax_mean: a scalar.
  """
  mean = absmax.mean()
  scaled, scale = _scaled(_blocks(absmax - mean, SECOND))
  codes = nearest(dynamic_map(), scaled).reshape(-1)[:absmax.size]
  return dict(absmax=codes, absmax_scale=scale, absmax_mean=mean)


def dequantise_scales(absmax, absmax_scale, absmax_mean):
  """Inverse of `quantise_scales`: absmax [n], float32."""
  scaled = _blocks(jnp.asarray(dynamic_map())[absmax], SECOND)
  change = (scaled * absmax_scale[:, None]).reshape(-1)[:absmax.size]
  return change + absmax_mean
