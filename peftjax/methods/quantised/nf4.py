"""NF4 base: kernels kept as 4-bit codes in blocks, the base of QLoRA.

Source: "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314).

  w = K^T row by row, in blocks of 64    absmax_n = max |block_n|
  code = nearest entry of NF to w / absmax
  w' = NF[code] absmax                   two codes a byte
  y = x K' + b,  fold: K'                |w' - w| <= 0.152 absmax (4 bits)

NF holds 16 quantiles of the normal distribution (`ops.quantise`), or 8 or 4 for
3 and 2 bits. With scales='double' the scales are quantised as well:

  absmax' = map[code2] scale2 + mean     blocks of 256, 8-bit codes

which takes 4 + 8/64 + 32/(64 256) = 4.127 bits a weight and not 4.5.

Trains nothing by itself: (nf4(), lora(rank=64, alpha=16)) is QLoRA, and this
method stands first. The kernel is made where the layer runs, in the layer's
dtype, and again in the backward pass: it is not kept in between, nor is x. Not
exact at init: the adapted model is the quantised one. A block of zeros stays
zeros.

Count: 0.

Where sources differ:
  The 8 bits of the scales. The paper calls them floats; its code has a map of
    256 values with a mean taken off first, and so has this.
  Rows that fill no whole bytes (an odd d_in at 4 bits, one that 4 or 8 does not
    divide at 2 or 3) stay one code a byte; bitsandbytes packs across rows. The
    codes are the same. It packs no 2 and 3 bits.
"""

import numbers

import jax

from peftjax import sites as sites_lib
from peftjax.method import Method, nearest
from peftjax.methods.quantised.int8 import biased, whole_kernels
from peftjax.ops import quantise

EXAMPLE = dict(block=16)
SCALES = ('double', 'float32')
SECOND = ('absmax_scale', 'absmax_mean')


def nf4(bits=4, block=64, scales='double', sites=sites_lib.kernels):
  """NF4 kernels, frozen.

  Args:
    bits: Of a code: 4, 3 or 2.
    block: Entries that share a scale, from 8 to 4096.
    scales: 'double', quantised in turn; or 'float32'.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: other bits, a block outside [8, 4096], unknown scales, a site
      without a kernel, or a slice of a fused kernel.
  """
  quantise.normal_float(bits)  # refuses
  if not isinstance(block, numbers.Integral) or not 8 <= block <= 4096:
    near = 64 if block != block else min(max(block, 8), 4096)
    raise ValueError(f'block={block}: expected a whole number from 8 to 4096; '
                     f'the nearest is {round(near)}')
  if scales not in SCALES:
    raise ValueError(f'unknown scales {scales!r}{nearest(scales, SCALES)}')
  double = scales == 'double'

  def init(key, site, p, stats):
    del key, site, stats
    t = quantise.quantise(p['kernel'], bits, block)
    return {**t, **quantise.quantise_scales(t['absmax'])} if double else t

  def prepare(t, ctx):
    del ctx
    if double:
      second = {n: t[n] for n in ('absmax', *SECOND)}
      t = {**t, 'absmax': quantise.dequantise_scales(**second)}
    return {n: v for n, v in t.items() if n not in SECOND}

  def kernel(codes, absmax):
    return quantise.dequantise(codes, absmax, bits, block)

  def fold(p, t):
    return {**p, 'kernel': kernel(t['codes'], t['absmax'])}

  def layer(f, x, t, ctx):
    del f  # it would look for the kernel
    dtype = t['absmax'].dtype

    @jax.checkpoint
    def product(x, codes, absmax):
      return x @ kernel(codes, absmax).astype(dtype)

    return biased(product(x.astype(dtype), t['codes'], t['absmax']), ctx)

  return Method('nf4', sites, init, prepare, fold, layer,
                frozen=('codes', 'absmax', *(SECOND if double else ())),
                drops=('kernel',), tolerance=float('inf'),
                check=whole_kernels('nf4'), count=lambda site: 0)
