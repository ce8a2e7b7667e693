"""OFT: orthogonal fine-tuning, a block rotation of a layer's input space.

Source: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (arXiv
2306.07280); rotating activations and cayley='neumann': "Orthogonal Finetuning
Made Scalable" (OFTv2, arXiv 2506.19847).

  y = (x R) K + b             x [..., d_in], K [d_in, d_out] frozen
  fold: K' = R K              R = blockdiag(R_1 .. R_n), n = d_in / B
  R_i = (I + Q_i)(I - Q_i)^{-1}, Q_i [B, B] skew-symmetric

Theta is q [n, B (B - 1) / 2], the strict upper triangles of Q_i in row-major
order ([1, ...] if shared). Init q = 0: exactly the base model. Angles between
the columns of K and their norms never change, since K'^T K' = K^T K. Neither R
nor R K is formed in training, and no gradient of the shape of K.

Count: d_in (B - 1) / 2 a kernel; B (B - 1) / 2 if shared.

Where sources differ:
  Sign. That of the paper. Hugging Face PEFT has it in its Neumann branch; its
    exact branch is the transpose, so such an adapter holds our q negated.
  Storage. The paper's code trains a full A with Q = (A - A^T) / 2; the triangle
    (PEFT's choice) has no redundant numbers, and other learning rates.
  Block size. One that does not divide d_in is an error here; PEFT moves it
    silently to the nearest divisor.
  Block dropout. Here (and in the BOFT paper) exactly floor(p n) blocks become I
    in each training call, never rescaled; skipped where blocks are shared. PEFT
    stores the rate but never applies it.
  Neumann. T terms as in PEFT (see `ops.orthogonal.cayley_neumann`): needs small
    Q, and keeps angles only approximately.
  Convolutions rotate the flattened patch (c_in, kh, kw), as PEFT merges them.
  Fused kernels. Each slice of a fused qkv kernel has a rotation of its own.
  Magnitude. The paper's optional second stage, a trained scale per output, is
    not here; `orthogonal.boft` trains one, and with factors=1 it is OFT.
"""

import math

import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.method import Method, nearest
from peftjax.ops import orthogonal

EXAMPLE = dict(block_size=4)
CAYLEYS = ('exact', 'neumann')
LARGEST = 32  # of the default block sizes
TERMS = 64  # each is a block product of its own in the program


def oft(block_size=None, blocks=None, shared=False, cayley='exact', terms=5,
        block_dropout=0.0, sites=sites_lib.kernels):
  """OFT.

  Args:
    block_size: B, a divisor of every site's d_in, at least 2. If neither it nor
      `blocks` is given: per site, the largest divisor of d_in up to 32.
    blocks: n, instead of block_size; B = d_in / n.
    shared: Whether all blocks of a kernel are one and the same.
    cayley: 'exact', or 'neumann' for a truncated series without a solve.
    terms: T, terms of that series, from 1 to 64.
    block_dropout: Share of the blocks set to the identity while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: both block_size and blocks, one that does not divide d_in,
      blocks of size 1, an unknown cayley, terms or a rate out of range.
  """
  if block_size is not None and blocks is not None:
    raise ValueError(f'block_size={block_size} and blocks={blocks}: expected '
                     'one of them; the other follows from d_in')
  if cayley not in CAYLEYS:
    raise ValueError(f'unknown cayley {cayley!r}{nearest(cayley, CAYLEYS)}')
  if not isinstance(terms, int) or not 1 <= terms <= TERMS:
    near_terms = min(max(int(terms), 1), TERMS)
    raise ValueError(f'terms={terms!r}: expected a whole number from 1 to '
                     f'{TERMS}; the nearest is {near_terms}')
  check_rate(block_dropout)

  def size(site):
    d = inputs(site)
    fine = [b for b in range(2, d + 1) if d % b == 0]  # a block of 1 is a 1
    if blocks is not None:
      name, value, fine = 'blocks', blocks, [d // b for b in reversed(fine)]
    else:
      name, value = 'block_size', block_size
      if value is None:
        value = max((b for b in fine if b <= LARGEST), default=LARGEST)
    if value not in fine or not isinstance(value, int):
      raise ValueError(
          f'{name}={value} at {site.path!r}: expected a divisor of its {d} '
          f'inputs that leaves blocks of at least 2; {near(value, fine)}')
    return value if blocks is None else d // value

  def check(found):
    for site in found.values():
      size(site)

  def init(key, site, p, stats):
    del key, stats
    b = size(site)
    n = 1 if shared else p['kernel'].shape[0] // b
    return dict(q=jnp.zeros((n, b * (b - 1) // 2)))

  def prepare(t, ctx):
    b = (1 + math.isqrt(1 + 8 * t['q'].shape[-1])) // 2
    q = orthogonal.skew(t['q'], b)
    r = (orthogonal.cayley(q) if cayley == 'exact'
         else orthogonal.cayley_neumann(q, terms))
    if block_dropout and ctx.train:
      r = orthogonal.drop_blocks(key_of(ctx), r, block_dropout)
    return dict(r=r)

  def fold(p, t):  # R K = (K^T R^T)^T, block by block
    new = orthogonal.block_rotate(p['kernel'].T, t['r'].swapaxes(-1, -2)).T
    return {**p, 'kernel': new}

  def layer(f, x, t, ctx):
    del ctx
    return f(orthogonal.block_rotate(x, t['r']))

  def count(site):
    b = size(site)
    n = 1 if shared else site.params['kernel'].shape[0] // b
    return n * b * (b - 1) // 2

  return Method('oft', sites, init, prepare, fold, layer, check=check,
                count=count)


def inputs(site):
  """d_in of a site's kernel."""
  kernel = site.params.get('kernel')
  if kernel is None or len(kernel.shape) != 2:
    raise ValueError(f'{site.path!r} ({site.kind}) has no kernel to rotate; it '
                     f'has {sorted(site.params)}')
  return kernel.shape[0]


def check_rate(rate):
  if not 0 <= rate < 1:
    raise ValueError(f'block_dropout={rate}: expected a share in [0, 1); the '
                     f'nearest is {0.0 if rate < 0 else 0.99}')


def near(value, fine):
  """'the nearest: 4 or 8': the entries of `fine` on both sides of value."""
  found = {*[v for v in fine if v <= value][-1:],
           *[v for v in fine if v >= value][:1]}
  return f'the nearest: {" or ".join(map(str, sorted(found))) or "none"}'


def key_of(ctx):
  """The key of this site and step, which block dropout needs."""
  if ctx.rng is None:
    raise ValueError(f'block dropout at {ctx.path!r} needs a key in training: '
                     'pass rng=..., or set block_dropout=0')
  return ctx.rng
