"""Quantised kernels: codes, scales, bytes; bitsandbytes."""

import jax
import jax.numpy as jnp
import numpy as np
from peftjax.ops import quantise
import pytest

RNG = np.random.default_rng(0)
SHAPES = [(64, 6), (16, 12), (10, 9), (7, 5)]


def kernel(shape, seed=1):
  return np.float32(np.random.default_rng(seed).normal(size=shape))


def rounded(k, bits, block):
  return quantise.dequantise(
      **quantise.quantise(k, bits, block), bits=bits, block=block)


def reference(k, bits, block):
  """(codes, absmax of every entry), both [d_out, d_in], entry by entry."""
  w = np.float64(k).T
  flat, book = w.reshape(-1), np.float64(quantise.normal_float(bits))
  codes, scale = np.zeros(flat.size, int), np.zeros(flat.size)
  for at in range(0, flat.size, block):
    part = flat[at:at + block]
    top = np.abs(part).max()
    scale[at:at + block] = top
    codes[at:at + block] = np.abs(
        part[:, None] / top - book).argmin(1)
  return codes.reshape(w.shape), scale.reshape(w.shape)


# ------------------------------------------------------------------ properties
@pytest.mark.parametrize('bits', [2, 3, 4])
def test_codes_come_back_exactly(bits):
  for d in (24, 8, 7, 1):
    codes = RNG.integers(0, 2 ** bits, (3, 5, d)).astype(np.uint8)
    packed = jax.jit(quantise.pack, static_argnums=1)(codes, bits)
    whole = d * bits % 8 == 0 and d > 1
    assert packed.shape == (3, 5, d * bits // 8 if whole else d)
    assert packed.dtype == (jnp.uint8 if whole else jnp.int8)
    for back in (quantise.unpack(packed, bits), jax.vmap(
        lambda p: quantise.unpack(p, bits))(packed)):
      np.testing.assert_array_equal(back, codes)
      assert back.dtype == jnp.uint8


@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('shape', SHAPES)
def test_error_is_at_most_half_a_gap(bits, shape):
  k, book = kernel(shape), quantise.normal_float(bits)
  _, scale = reference(k, bits, 64)
  error = np.abs(rounded(k, bits, 64) - k).T
  assert (error <= scale * (np.diff(book).max() / 2 + 1e-6)).all()
  if bits == 4:
    np.testing.assert_allclose(np.diff(book).max() / 2, 0.152, atol=1e-3)


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_a_second_time_changes_nothing(bits):
  once = quantise.quantise(kernel((24, 11)), bits, 32)
  k = quantise.dequantise(**once, bits=bits, block=32)
  for name, v in quantise.quantise(k, bits, 32).items():
    np.testing.assert_array_equal(v, once[name], err_msg=name)


def test_zeros_stay_zeros():
  k = kernel((16, 8))
  k[:, 2:4] = 0
  back = rounded(k, 4, 32)
  assert not np.any(back[:, 2:4]) and np.isfinite(back).all()
  assert not np.any(rounded(np.zeros((3, 3), np.float32), 2, 8))
  zeros = quantise.quantise_scales(jnp.zeros(5))
  assert not np.any(quantise.dequantise_scales(**zeros))


def test_halves_are_quantised_in_float32_and_stacks_by_vmap():
  k = jnp.asarray(RNG.normal(size=(2, 8, 16)), jnp.bfloat16)
  got = jax.vmap(lambda k: quantise.quantise(k, 4, 64))(k)
  assert got['absmax'].dtype == jnp.float32
  for i in range(2):
    want = quantise.quantise(np.float32(k[i]), 4, 64)
    jax.tree.map(np.testing.assert_array_equal, want,
                 jax.tree.map(lambda v, i=i: v[i], got))


# ---------------------------------------------------------------- closed forms
def test_code_books():
  four = quantise.normal_float(4)
  np.testing.assert_allclose(quantise.closed_form(4), four, atol=2e-7)
  np.testing.assert_allclose(four[[1, 6, 7, 8, 14]], [
      -0.6961928009986877, -0.09105003625154495, 0, 0.07958029955625534,
      0.7229568362236023], rtol=1e-7)
  np.testing.assert_allclose(quantise.normal_float(3), [
      -1, -0.47862916, -0.21714182, 0, 0.16093017, 0.33791519, 0.56261697, 1],
      atol=2e-7)
  np.testing.assert_allclose(
      quantise.normal_float(2), [-1, 0, 0.33791519, 1], atol=2e-7)
  for bits in (2, 3, 4):
    book = quantise.normal_float(bits)
    assert (np.diff(book) > 0).all() and (book == 0).sum() == 1
    assert (book > 0).sum() == (book < 0).sum() + 1 == 2 ** (bits - 1)


def test_dynamic_map():
  book = quantise.dynamic_map()
  assert book.shape == (256,) and (np.diff(book) > 0).all()
  np.testing.assert_allclose(
      book[[0, 127, 128, 254, 255]], [-0.99296875, 0, 5.5e-7, 0.99296875, 1],
      rtol=1e-6)
  np.testing.assert_array_equal(book[:127], -book[128:255][::-1])
  for i in range(7):  # 2^i entries from 10^(i - 7) to 10^(i - 6)
    inside = (book > 10.0 ** (i - 7)) & (book < 10.0 ** (i - 6))
    assert inside.sum() == 2 ** i


def test_bytes():
  """The first code of a byte stands highest."""
  np.testing.assert_array_equal(
      quantise.pack(np.uint8([1, 2, 15, 0]), 4), [0x12, 0xF0])
  np.testing.assert_array_equal(
      quantise.pack(np.uint8([0, 1, 2, 3]), 2), [0b00011011])
  np.testing.assert_array_equal(
      quantise.pack(np.uint8([1, 2, 3, 4, 5, 6, 7, 0]), 3),
      [0b00101001, 0b11001011, 0b10111000])


@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('shape', SHAPES)
def test_nearest_entries_in_runs_along_the_inputs(bits, shape):
  k = kernel(shape)
  codes, scale = reference(k, bits, 64)
  got = jax.jit(lambda k: quantise.quantise(k, bits, 64))(k)
  assert got['absmax'].shape == (-(-k.size // 64),)
  np.testing.assert_array_equal(
      quantise.unpack(got['codes'], bits).reshape(codes.shape), codes)
  np.testing.assert_allclose(
      rounded(k, bits, 64), (quantise.normal_float(bits)[codes] * scale).T,
      rtol=1e-6)


def test_ties_go_down():
  book = np.float32([-1, 0, 1])
  np.testing.assert_array_equal(
      quantise.nearest(book, jnp.float32([-2, -0.5, 0.5, 0.51, 3])),
      [0, 0, 1, 2, 2])


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_entries_are_those_of_the_book(bits):
  book = quantise.normal_float(bits)
  codes = np.arange(2 ** bits, dtype=np.uint8)
  np.testing.assert_array_equal(quantise.entries(book, codes), book)


def test_scales_of_scales():
  absmax = np.abs(kernel(600)) + 1
  got = quantise.quantise_scales(absmax)
  assert {n: (v.shape, str(v.dtype)) for n, v in got.items()} == dict(
      absmax=((600,), 'uint8'), absmax_scale=((3,), 'float32'),
      absmax_mean=((), 'float32'))
  mean = np.float64(absmax).mean()
  np.testing.assert_allclose(got['absmax_mean'], mean, rtol=1e-6)
  back = quantise.dequantise_scales(**got)
  book = np.float64(quantise.dynamic_map())
  for at in (0, 256, 512):
    change = absmax[at:at + 256] - mean
    top = np.abs(change).max()
    np.testing.assert_allclose(got['absmax_scale'][at // 256], top, rtol=1e-6)
    want = book[np.abs(change[:, None] / top - book).argmin(1)] * top + mean
    # One that lies in the middle may go either way.
    far = np.abs(back[at:at + 256] - want) > 1e-5
    assert far.sum() <= 1
  one = quantise.quantise_scales(jnp.float32([3.0]))  # nothing left to round
  assert quantise.dequantise_scales(**one) == 3


def test_bits_a_weight():
  size = lambda tree: 8 * sum(v.nbytes for v in jax.tree.leaves(tree))
  shape = (512, 256)  # 2048 blocks of 64, 8 of 256
  q = jax.eval_shape(lambda k: quantise.quantise(k, 4, 64), kernel(shape))
  q = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), q)
  assert size(q) == 4.5 * 512 * 256
  second = quantise.quantise_scales(jnp.ones(2048))
  assert size(dict(c=q['codes'], **second)) - 32 == (
      4 + 8 / 64 + 32 / (64 * 256)) * 512 * 256
  for bits in (2, 3):
    q = quantise.quantise(kernel((64, 8)), bits, 64)
    assert size(q['codes']) == bits * 512


@pytest.mark.parametrize('bits, near', [(0, 2), (5, 4), (8, 4), (2.4, 2)])
def test_bad_bits(bits, near):
  with pytest.raises(ValueError, match=(
      f'bits={bits}: expected 2, 3 or 4 .*the nearest is {near}')):
    quantise.normal_float(bits)


# ------------------------------------------------------------- another library
@pytest.mark.parametrize('shape', [(64, 6), (128, 300), (130, 40), (13, 7)])
def test_equals_bitsandbytes(shape):
  torch = pytest.importorskip('torch')
  bnb = pytest.importorskip('bitsandbytes').functional
  k = kernel(shape)
  theirs, state = bnb.quantize_4bit(
      torch.from_numpy(k.T.copy()), quant_type='nf4', blocksize=64)
  got = quantise.quantise(k, 4, 64)
  packed = theirs.numpy().reshape(-1)
  codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[:k.size]
  np.testing.assert_array_equal(
      quantise.unpack(got['codes'], 4).reshape(-1), codes)
  if shape[0] % 2 == 0:
    np.testing.assert_array_equal(got['codes'].reshape(-1), packed)
  np.testing.assert_array_equal(got['absmax'], state.absmax)
  np.testing.assert_array_equal(
      rounded(k, 4, 64), bnb.dequantize_4bit(theirs, state).numpy().T)


def test_scales_equal_those_of_bitsandbytes():
  torch = pytest.importorskip('torch')
  bnb = pytest.importorskip('bitsandbytes').functional
  book = quantise.dynamic_map()
  np.testing.assert_allclose(bnb.create_dynamic_map(), book, atol=1e-7)
  k = kernel((256, 512))
  _, state = bnb.quantize_4bit(
      torch.from_numpy(k.T.copy()), quant_type='nf4', blocksize=64,
      compress_statistics=True)
  absmax = quantise.quantise(k, 4, 64)['absmax']
  got = quantise.quantise_scales(absmax)
  np.testing.assert_allclose(got['absmax_mean'], state.offset, rtol=1e-6)
  np.testing.assert_allclose(
      got['absmax_scale'], state.state2.absmax, rtol=1e-6)
  # Its code for CPUs takes the second nearest where two are about as near.
  theirs = np.int32(state.absmax)
  assert np.abs(theirs - np.int32(got['absmax'])).max() <= 1
  scaled = (absmax - got['absmax_mean']) / np.repeat(got['absmax_scale'], 256)
  far = lambda codes: np.abs(book[codes] - scaled)
  assert (far(theirs) <= 1.05 * far(got['absmax']) + 1e-6).all()
  assert (theirs != got['absmax']).mean() < 0.01
