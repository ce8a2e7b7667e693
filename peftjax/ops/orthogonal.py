"""Rotations with few parameters: Cayley blocks, butterflies and their noise.

One sign convention everywhere, that of the OFT paper:

  R = (I + Q) (I - Q)^{-1},   Q^T = -Q,   hence R R^T = I and det R = +1.

The inverse rotation R^T belongs to -Q. Code that writes (I - Q)(I + Q)^{-1}
(Hugging Face PEFT's exact OFT branch, its BOFT) holds our Q negated.

Blocks are arrays [..., n, b, b]: n blocks of size b on the diagonal of one
[n b, n b] rotation, which is never formed. Rows rotate: y = x R, x [..., n b].
Parameter maps compute in float32 at least, whatever they are given, and leave
the cast back to the caller; R in bfloat16 is orthogonal to 2 digits only.

Sources: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (OFT,
COFT; arXiv 2306.07280), "Orthogonal Finetuning Made Scalable" (Cayley-Neumann;
arXiv 2506.19847), "Parameter-Efficient Orthogonal Finetuning via Butterfly
Factorization" (BOFT; arXiv 2311.06243).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.ops import linalg

# Up to this block size a batch of blocks is inverted by elementwise operations,
# which vectorise over the batch, up to the second by halves. See `_inverse`.
_SMALL, _HALVED = 16, 256


def _at_least_float32(x):
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _block_size(q, name):
  if q.ndim < 2 or q.shape[-1] != q.shape[-2]:
    raise ValueError(
        f'{name}: got shape {q.shape}, expected square blocks [..., b, b].')
  return q.shape[-1]


def _matmul(x, y):
  # Full precision on accelerators too, where the default rounds to bfloat16.
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _product(x, y):
  """x @ y for batches of blocks; elementwise, so up to 5x faster, when small.

  Good as it stands and as a linear map of one argument. Differentiated in both
  arguments through a chain of products it reduces over strided axes and is far
  slower than `_matmul`, which `cayley_neumann` uses for that reason.
  """
  if x.shape[-1] <= _SMALL:
    return (x[..., :, :, None] * y[..., None, :, :]).sum(-2)
  return _matmul(x, y)


def skew(v, b):
  """Skew-symmetric blocks from their strict upper triangles.

  Args:
    v: [..., b (b - 1) / 2], the triangle above the diagonal in row-major order.
    b: block size.

  Returns:
    [..., b, b], Q = triu(v) - triu(v)^T.

  Raises:
    ValueError: if the last axis of v does not hold b (b - 1) / 2 numbers.
  """
  v = _at_least_float32(v)
  if v.ndim < 1 or v.shape[-1] != b * (b - 1) // 2:
    raise ValueError(
        f'skew: v has shape {v.shape}, but blocks of size {b} take a last axis '
        f'of {b * (b - 1) // 2} numbers.')
  rows, cols = np.triu_indices(b, 1)
  index, sign = np.zeros((b, b), np.int32), np.zeros((b, b), np.float32)
  index[rows, cols] = index[cols, rows] = np.arange(rows.size)
  sign[rows, cols], sign[cols, rows] = 1, -1
  # The gathered axis comes first: then the gather, and the scatter-add that is
  # its gradient, move contiguous rows instead of single numbers.
  if rows.size:
    q = jnp.moveaxis(v, -1, 0)[index]
  else:  # b = 1: nothing to gather, R = 1
    q = jnp.zeros((1, 1) + v.shape[:-1], v.dtype)
  return jnp.moveaxis(q, (0, 1), (-2, -1)) * jnp.asarray(sign, v.dtype)


def unskew(q):
  """Inverse of `skew`: [..., b, b] -> [..., b (b - 1) / 2]."""
  q = _at_least_float32(q)
  rows, cols = np.triu_indices(_block_size(q, 'unskew'), 1)
  return q[..., rows, cols]


def cayley(q):
  """Exact Cayley transform R = (I + Q)(I - Q)^{-1} of skew blocks.

  The derivative is written out. From R (I - Q) = I + Q,

    dR = (I + R) dQ (I - Q)^{-1} = (I + R) dQ (I + R) / 2,

  so forward and reverse mode need R and two block products, no second solve.

  R R^T = I holds to 1e-6 for entries of Q up to 10 and to 1e-4 up to 100 (a
  turn of 178.9 degrees; the transform reaches 180 only at infinity).

  Args:
    q: [..., b, b], skew-symmetric (this is not checked).

  Returns:
    [..., b, b] rotations, exactly I where Q = 0.
  """
  _block_size(q, 'cayley')
  return _cayley(_at_least_float32(q))


@jax.custom_jvp
def _cayley(q):
  eye = jnp.eye(q.shape[-1], dtype=q.dtype)
  return 2 * _inverse(eye - q) - eye


@_cayley.defjvp
def _cayley_jvp(primals, tangents):
  (q,), (dq,) = primals, tangents
  r = _cayley(q)
  a = r + jnp.eye(r.shape[-1], dtype=r.dtype)
  return r, _product(_product(a, dq), a / 2)


def _inverse(a):
  """Inverses of [..., b, b] blocks whose symmetric part is the identity.

  No pivoting: such matrices do not need it, every pivot is at least 1. What is
  lost in accuracy to growth when Q is large, Newton steps X (2 I - A X) give
  back, one up to b = 16 and two above. LU would do as well, but batched LUs can stop a program on CPUs
  (`ops.linalg`), and cost more on all devices: forward + backward of 1152
  blocks in ms on 2 CPU cores, without / with LU: b=4 0.22 / 1.21, b=8 0.45 /
  1.29, b=16 1.4 / 2.2. Compiled for TPU v5e at b=16: a sixth of the compile
  time, 34 / 890 MiB accessed by XLA's estimate. Largest error of R at
  unit-normal Q, b=16: 2e-7 / 9e-7.
  """
  b = a.shape[-1]
  flat = a.reshape((-1, b, b))
  if b <= _HALVED:
    x = _by_halves(flat)
  else:
    x = jax.vmap(linalg.inverse)(flat)
  eye = jnp.eye(b, dtype=a.dtype)
  for _ in range(1 if b <= _SMALL else 2):
    x += _product(x, eye - _product(flat, x))
  return x.reshape(a.shape)


def _by_halves(a):
  """Inverses of [n, b, b] blocks whose symmetric part is at least the identity.

  Of [[A, B], [C, D]] by X = A^-1 and Y = S^-1, the Schur complement S being D -
  C X B. The symmetric part of S is again at least the identity, as that of X is
  at least zero and, where a = I - Q, C = -B^T.
  """
  b = a.shape[-1]
  if b <= _SMALL:
    return _eliminated(a)
  h = b // 2
  upper, left, right = a[:, :h, :h], a[:, h:, :h], a[:, :h, h:]
  x = _by_halves(upper)
  xb, cx = _product(x, right), _product(left, x)
  y = _by_halves(a[:, h:, h:] - _product(left, xb))
  xby = _product(xb, y)
  return jnp.concatenate([
      jnp.concatenate([x + _product(xby, cx), -xby], -1),
      jnp.concatenate([-_product(y, cx), y], -1)], -2)


def _eliminated(a):
  """The same by Gauss-Jordan; every operation is elementwise over the batch."""
  b = a.shape[-1]
  index = jnp.arange(b)
  x = jnp.moveaxis(a, 0, -1)

  def eliminate(k, x):
    here = (index == k)[:, None]
    row = jax.lax.dynamic_index_in_dim(x, k, 0, keepdims=False)
    col = jax.lax.dynamic_index_in_dim(x, k, 1, keepdims=False)
    pivot = 1 / jax.lax.dynamic_index_in_dim(row, k, 0, keepdims=False)
    row = jnp.where(here, pivot, row * pivot)
    rest = jnp.where(here[None], 0, x) - col[:, None] * row[None]
    return jnp.where(here[:, None], row[None], rest)

  return jnp.moveaxis(jax.lax.fori_loop(0, b, eliminate, x), -1, 0)


def cayley_neumann(q, terms):
  """Cayley transform with (I - Q)^{-1} as a truncated Neumann series.

  For T >= 4 terms R = (I + Q)(I + Q + ... + Q^{T-2})
                     = I + 2 Q + ... + 2 Q^{T-2} + Q^{T-1};
  T = 3 gives the same as T = 4, T = 2 gives I + 2 Q and T = 1 gives I: the
  series of Hugging Face PEFT, so its adapters load unchanged. R is orthogonal
  only approximately, and the series converges only where the spectral radius
  of Q is below 1: for T >= 4 it is the exact rotation times I - Q^{T-1}. Its
  defect R R^T - I is -Q^{2T-2} for even T, but about -2 Q^{T-1} for odd T.

  Args:
    q: [..., b, b], skew-symmetric.
    terms: T, a whole number of at least 1.

  Returns:
    [..., b, b].

  Raises:
    ValueError: if terms is not a whole number of at least 1.
  """
  if terms != int(terms) or terms < 1:
    raise ValueError(
        f'cayley_neumann: terms={terms}, expected a whole number of at least '
        f'1; the nearest valid choice is {max(1, round(terms))}.')
  terms = int(terms)
  b, q = _block_size(q, 'cayley_neumann'), _at_least_float32(q)
  eye = jnp.broadcast_to(jnp.eye(b, dtype=q.dtype), q.shape)
  if terms == 1:
    return eye
  if terms == 2:
    return eye + 2 * q
  series = eye + q  # Horner: I + Q (I + Q (...)) with T - 2 factors
  for _ in range(max(terms, 4) - 3):
    series = eye + _matmul(q, series)
  return series + _matmul(q, series)


def block_rotate(x, r):
  """x times a block-diagonal matrix, without forming it.

  The product runs in the promoted type of x and r: cast r to x.dtype first for
  a bfloat16 product.

  The block axis is moved to the front of both operands, so that forward, dx
  and dR are plain batched matrix products. Forward + backward of 2048 tokens
  in ms on 2 CPU cores, against einsum('...nb,nbc->...nc') and blocks gathered
  into a 128-wide dense diagonal:

    d=192   b=4 0.9 / 1.2 / 1.8   b=8  0.8 / 0.6 / 1.9   b=32 0.7 / 0.7 / 1.7
    d=768   b=4 6.3 / 8.4 / 9.0   b=8 3.9 / 12.0 / 8.8   b=32 5.1 / 6.1 / 9.2

  (a 768 x 768 product of the same tokens takes 5.1 forward). Multiply-and-sum
  has the fastest forward but a backward of up to 270 ms. Compiled for TPU v5e,
  the first two have equal estimates for x [tokens, d], the third more FLOPs.

  Args:
    x: [..., d] rows.
    r: [n, b, b] blocks with n b = d, or [1, b, b], shared by all d / b places.

  Returns:
    [..., d], x @ blockdiag(r).

  Raises:
    ValueError: if the blocks do not cover d.
  """
  n, b, d = r.shape[0], _block_size(r, 'block_rotate'), x.shape[-1]
  if r.ndim != 3 or (n * b != d and (n != 1 or d % b)):
    raise ValueError(
        f'block_rotate: blocks of shape {r.shape} do not cover the {d} features'
        f' of x; expected [n, b, b] with n b = {d}, or [1, b, b], shared, with '
        f'b a divisor of {d}.')
  if n == 1:
    return (x.reshape(x.shape[:-1] + (d // b, b)) @ r[0]).reshape(x.shape)
  z = x.reshape((-1, n, b)).swapaxes(0, 1)
  return jnp.matmul(z, r).swapaxes(0, 1).reshape(x.shape)


def butterfly_rotate(x, rs):
  """x times a product of butterfly factors, x M_{m-1} ... M_1 M_0.

  Factor i is M_i = P_i blockdiag(R_i) P_i^T. With half-blocks of b / 2 entries
  and groups of 2^{i+1} half-blocks, block k of a group (0 <= k < 2^i) is made
  of half-block k and half-block k + 2^i; P_0 = I, so one factor is
  `block_rotate`. The permutations are a reshape and a swap of axes.

  2 m d b operations a token. (One einsum per factor over the split axes does
  the same work and took 0.9 to 3 times as long on CPU, forward + backward.)

  Args:
    x: [..., d] rows.
    rs: [m, n, b, b], n = d / b; rs[i] are the blocks of factor i.

  Returns:
    [..., d].

  Raises:
    ValueError: if d, b and m do not fit, see `check_butterfly`.
  """
  if rs.ndim != 4 or rs.shape[1] * rs.shape[2] != x.shape[-1]:
    raise ValueError(
        f'butterfly_rotate: factors of shape {rs.shape} do not fit x of shape '
        f'{x.shape}; expected [m, n, b, b] with n b = {x.shape[-1]}.')
  m, n, b, _ = rs.shape
  check_butterfly(x.shape[-1], b, m)
  lead, h = x.shape[:-1], b // 2

  def swap(x, *axes):
    return x.reshape(lead + axes).swapaxes(-3, -2).reshape(lead + (n * b,))

  for i in reversed(range(1, m)):
    x = swap(x, n // 2**i, 2, 2**i, h)
    x = swap(block_rotate(x, rs[i]), n // 2**i, 2**i, 2, h)
  return block_rotate(x, rs[0])


def check_butterfly(d, block_size, factors):
  """Raises ValueError unless m butterfly factors of blocks b fit width d.

  The condition is d % (b 2^{m-1}) == 0 and, for m > 1, b even; d / b then is
  even too.
  """
  for name, value in (('block_size', block_size), ('factors', factors)):
    if value < 1:
      raise ValueError(f'{name}={value}, expected at least 1, which is the '
                       'nearest valid choice.')
  if _fits(d, block_size, factors):
    return
  sizes = [b for b in range(1, d + 1) if _fits(d, b, factors)]
  near = [b for b in sizes if b < block_size][-1:]
  near += [b for b in sizes if b > block_size][:1]
  choices = [f'block_size={b} with factors={factors}' for b in near]
  choices += [f'factors={m} with block_size={block_size}'
              for m in range(1, min(factors, d.bit_length() + 1))
              if _fits(d, block_size, m)][-1:]
  even = ' and block_size even' if factors > 1 else ''
  raise ValueError(
      f'block_size={block_size} with factors={factors} does not fit width {d}: '
      f'expected width % (block_size * 2**(factors - 1)) == 0{even}; the '
      f'nearest valid choice is {" or ".join(choices) or "factors=1"}.')


def _fits(d, b, m):
  if m > d.bit_length():  # 2^{m-1} > d, and may be too large to write down
    return False
  return d % (b * 2**(m - 1)) == 0 and (m == 1 or b % 2 == 0)


def drop_blocks(key, r, rate):
  """Multiplicative dropout: replaces floor(rate n) blocks of n by I.

  Exactly so many are replaced, chosen uniformly and independently for each
  leading index; there is no rescaling. A single block (n = 1, shared by all
  places) is never dropped.

  Args:
    key: random key.
    r: [..., n, b, b].
    rate: a number in [0, 1); anything else raises ValueError.

  Returns:
    Same shape and dtype as r.
  """
  return _to_identity(r, _dropped(key, r.shape[:-2], rate, 'drop_blocks'))


def drop_factor_blocks(key, rs, rate):
  """Multiplicative dropout of BOFT: in one random factor, as `drop_blocks`.

  This is the form of Hugging Face PEFT. (The paper drops blocks in a share of
  the factors; `drop_blocks` on [m, n, b, b] is its case of all factors.)

  Args:
    key: random key.
    rs: [m, n, b, b].
    rate: share of the n blocks of that factor, as in `drop_blocks`.

  Returns:
    Same shape and dtype as rs.
  """
  which, blocks = jax.random.split(key)
  m, n, _, _ = rs.shape
  dropped = _dropped(blocks, (n,), rate, 'drop_factor_blocks')
  chosen = jnp.arange(m) == jax.random.randint(which, (), 0, m)
  return _to_identity(rs, chosen[:, None] & dropped)


def _dropped(key, shape, rate, name):
  """Booleans of `shape`, exactly floor(rate * shape[-1]) True in each row."""
  if not 0 <= rate < 1:
    raise ValueError(
        f'{name}: rate={rate}, expected a share in [0, 1); the nearest valid '
        f'choice is {"0.0" if rate < 0 else "a number just below 1"}.')
  # The allowance keeps 0.29 * 100 = 28.999999999999996 at 29.
  count = math.floor(rate * shape[-1] + 1e-9)
  fixed = jnp.broadcast_to(jnp.arange(shape[-1]) < count, shape)
  return jax.random.permutation(key, fixed, axis=-1, independent=True)


def _to_identity(r, dropped):
  eye = jnp.eye(r.shape[-1], dtype=r.dtype)
  return jnp.where(dropped[..., None, None], eye, r)


def project_ball(v, eps):
  """COFT: scales blocks back into the ball ||Q||_F <= eps.

  The norm is that of the full skew matrix, sqrt(2) times the norm of the
  stored triangle. Blocks inside the ball come back bit for bit. The radius is
  per block: Hugging Face PEFT's `eps` means a radius of eps / sqrt(number of
  stored blocks) here, the paper's released code one of eps b^2 / sqrt(r).

  Args:
    v: [..., b (b - 1) / 2], stored triangles as `skew` takes them.
    eps: radius, a number of at least 0 (else ValueError) or an array that
      broadcasts against v.shape[:-1]; inf changes nothing.

  Returns:
    Same shape as v.
  """
  if isinstance(eps, (int, float)) and not eps >= 0:
    raise ValueError(
        f'project_ball: eps={eps}, expected at least 0; the nearest valid '
        'choice is 0.0.')
  v = _at_least_float32(v)
  square = 2 * jnp.sum(v**2, axis=-1, keepdims=True)
  # Neither the root at 0 nor an infinite radius may reach the branch that is
  # not taken: a `where` on the result alone leaves NaN in the gradient.
  norm = jnp.sqrt(jnp.where(square > 0, square, 1))
  eps = jnp.asarray(eps, v.dtype)[..., None]
  outside = (square > 0) & (norm > eps)
  return jnp.where(outside, v * (jnp.where(outside, eps, 1) / norm), v)
