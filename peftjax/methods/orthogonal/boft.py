"""BOFT: orthogonal fine-tuning by butterfly factors, and an output scale.

Source: "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization"
(arXiv 2311.06243).

  y = (x M K) * s + b         x [..., d_in], K [d_in, d_out] frozen, s [d_out]
  fold: K' = (M K) * s        M = M_{m-1} ... M_1 M_0
  M_i = P_i blockdiag(R_i1 .. R_in) P_i^T,   n = d_in / B
  R_ij = (I + Q_ij)(I - Q_ij)^{-1}, Q_ij [B, B] skew-symmetric

P_i pairs half-blocks that lie 2^i apart. m factors of blocks B join inputs in
groups of B 2^{m-1}: m = log2(d_in / B) + 1 joins every input to every output
with m d_in (B - 1) / 2 numbers; a dense rotation has d_in (d_in - 1) / 2. The
permutations are reshapes of activations; no [d_in, d_in] matrix is formed.

Theta is q [m, n, B (B - 1) / 2], strict upper triangles in row-major order, and
s. Init q = 0, s = 1: exactly the base model. m = 1 is OFT with an output scale.
s takes no weight decay, which would pull it to 0 and not to 1.

Count: m d_in (B - 1) / 2 + d_out a kernel.

The scale leaves the bias b alone. b is the one the layer itself holds: a
method that changes the bias of the same layer goes outside (later in the tuple)
of this one.

Where sources differ:
  Sign and storage. Hugging Face PEFT trains a full A with Q = -(A - A^T) / 2 in
    our sign; the triangle has no redundant numbers, and other learning rates.
  Factors. PEFT without its CUDA extension silently sets m = 1. Here m is always
    what was asked for.
  Block dropout. As in PEFT, floor(p n) blocks of one random factor become I.
    The paper drops a share of the blocks in a share of the factors.
"""

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.method import Method
from peftjax.methods.orthogonal.oft import check_rate, inputs, key_of
from peftjax.ops import orthogonal

EXAMPLE = dict(block_size=4, factors=2)


def boft(block_size=8, factors=2, block_dropout=0.0, sites=sites_lib.kernels):
  """BOFT(m, B) of the paper, with m = factors and B = block_size.

  Args:
    block_size: B, at least 2, even where factors > 1.
    factors: m, at least 1; B 2^(m-1) must divide every site's d_in.
    block_dropout: Share of one factor's blocks set to the identity in training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: block_size and factors that do not fit a kernel, with the
      nearest that do; a rate outside [0, 1).
  """
  for name, value, least in (('block_size', block_size, 2),
                             ('factors', factors, 1)):
    if not isinstance(value, int) or value < least:
      raise ValueError(f'{name}={value!r}: expected a whole number of at least '
                       f'{least}; the nearest is {least}')
  check_rate(block_dropout)

  def check(found):
    for path, site in found.items():
      try:
        orthogonal.check_butterfly(inputs(site), block_size, factors)
      except ValueError as e:
        raise ValueError(f'{path!r}: {e}') from e

  def init(key, site, p, stats):
    del key, site, stats
    d_in, d_out = p['kernel'].shape
    triangle = block_size * (block_size - 1) // 2
    return dict(q=jnp.zeros((factors, d_in // block_size, triangle)),
                s=jnp.ones(d_out))

  def prepare(t, ctx):
    r = orthogonal.cayley(orthogonal.skew(t['q'], block_size))
    if block_dropout and ctx.train:
      r = orthogonal.drop_factor_blocks(key_of(ctx), r, block_dropout)
    return dict(r=r, s=t['s'])

  def fold(p, t):
    # The rows of K^T times M^T: the transpose of the map from x to x M.
    rotate = lambda x: orthogonal.butterfly_rotate(x, t['r'])
    new, = jax.linear_transpose(rotate, p['kernel'].T)(p['kernel'].T)
    return {**p, 'kernel': new.T * t['s']}

  def layer(f, x, t, ctx):
    y = f(orthogonal.butterfly_rotate(x, t['r'])) * t['s']
    if 'bias' in ctx.params:  # rather than (f(..) - b) s + b: exact at s = 1
      y += ctx.params['bias'].astype(y.dtype) * (1 - t['s'])
    return y

  def count(site):
    d_in, d_out = site.params['kernel'].shape
    return factors * d_in * (block_size - 1) // 2 + d_out

  return Method('boft', sites, init, prepare, fold, layer, check=check,
                labels=dict(s='no_decay'), count=count)
