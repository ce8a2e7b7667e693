"""What a compiled program costs, read from its HLO, against counts by hand."""

import jax
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import pytest

from peftjax import program
from peftjax import sharding


def compiled(f, *args, **kwargs):
  return jax.jit(f, **kwargs).lower(*args).compile()


def scanned(x, w):
  return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, w)[0].sum()


def test_loops_count_as_often_as_they_run():
  x, w = jnp.ones((16, 24)), jnp.ones((6, 24, 24))
  p = program.read(compiled(jax.grad(scanned, argnums=1), x, w))
  assert p.flops == 6 * 3 * 2 * 16 * 24 * 24
  assert not p.endless
  # Which XLA does not: its figure is that of one round.
  assert p.xla_flops < 2 * 3 * 2 * 16 * 24 * 24


def test_a_loop_without_a_known_end_is_told():
  f = lambda x: jax.lax.while_loop(
      lambda x: x.sum() < 100, lambda x: x @ x + 1, x)
  p = program.read(compiled(f, jnp.ones((4, 4))))
  assert p.endless == 1
  assert p.flops == 2 * 4**3


@pytest.mark.parametrize('f, shapes, flops', [
    (lambda a, b: a @ b, [(7, 5), (5, 3)], 2 * 7 * 5 * 3),
    (lambda a, b: jnp.einsum('bthd,bshd->bhts', a, b),
     [(2, 6, 3, 5), (2, 4, 3, 5)], 2 * 2 * 3 * 6 * 4 * 5),
    (lambda a, b: a @ b, [(7, 5), (5,)], 2 * 7 * 5)])
def test_products(f, shapes, flops):
  p = program.read(compiled(f, *(jnp.ones(s) for s in shapes)))
  # A product with a vector may become a sum, which is none.
  assert p.flops in ((flops,) if len(shapes[1]) > 1 else (flops, 0))


@pytest.mark.parametrize('strides, padding, groups', [
    ((1, 1), 'SAME', 1), ((2, 2), 'SAME', 1), ((2, 1), 'VALID', 2)])
def test_convolutions_as_xla_counts_them(strides, padding, groups):
  def f(x, k):
    return jax.lax.conv_general_dilated(
        x, k, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups)

  x, k = jnp.ones((2, 9, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))
  c = compiled(f, x, k)
  assert program.read(c).flops == c.cost_analysis()['flops'] > 0


def test_products_that_are_written_as_convolutions():
  """As XLA for TPU writes a batch of 16 products [8, 32] x [32, 128]."""
  text = '''HloModule m

ENTRY %main (a: bf16[16,8,32], b: bf16[16,32,128]) -> bf16[16,8,128] {
  %a = bf16[16,8,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,32,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf
}
'''
  assert program.walk(text)['flops'] == 16 * 2 * 8 * 32 * 128


def test_products_of_a_gpu_library():
  text = '''HloModule m

ENTRY %main (a: bf16[8,32], b: bf16[32,64], q: bf16[2,6,3,8], k: bf16[2,4,3,8]) -> bf16[8,64] {
  %a = bf16[8,32]{1,0} parameter(0)
  %b = bf16[32,64]{1,0} parameter(1)
  %q = bf16[2,6,3,8]{3,2,1,0} parameter(2)
  %k = bf16[2,4,3,8]{3,2,1,0} parameter(3)
  %f = (bf16[2,6,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
  %c = (bf16[8,64]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %d = bf16[8,64]{1,0} get-tuple-element(%c), index=0
}
'''
  assert program.walk(text)['flops'] == 2 * 8 * 32 * 64 + (
      2 * 2 * (2 * 6 * 3 * 8) * 4)


def test_asynchronous_collectives_count_what_comes_out():
  text = '''HloModule m

ENTRY %main (a: bf16[8,32]) -> bf16[64,32] {
  %a = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  %s = (bf16[8,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%a), dimensions={0}
  ROOT %d = bf16[64,32]{1,0} all-gather-done(%s)
}
'''
  assert program.walk(text)['collectives'] == {
      'all-gather': program.Traffic(1, 64 * 32 * 2)}


def test_collectives_of_a_loop():
  mesh = sharding.make_mesh(dict(data=8, model=1))
  at = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))
  x = jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=at('data'))
  w = jax.ShapeDtypeStruct((6, 24, 24), jnp.float32, sharding=at(None, 'data'))
  p = program.read(compiled(jax.grad(scanned, argnums=1), x, w))
  # The kernel is gathered on the way there and back, its gradient is summed.
  assert p.collectives['all-gather'] == program.Traffic(12, 12 * 24 * 24 * 4)
  assert p.collectives['all-reduce'].bytes >= 6 * 24 * 24 * 4
  assert p.flops == 6 * 3 * 2 * 2 * 24 * 24  # of one device: 2 rows of 16


def test_what_is_computed_and_what_is_only_moved():
  x, w = jnp.ones((5, 17)), jnp.ones((24, 17))
  p = program.read(compiled(lambda x, w: (x @ w.T, jnp.tanh(w.T)), x, w))
  made = p.made([(24, 17)])
  assert sum(a.bytes for a in made) == 24 * 17 * 4
  assert not p.made([(24, 18)])
  # A kernel that is only transposed is none that was computed.
  p = program.read(compiled(lambda x, w: (x @ w.T, w.T), x, w))
  assert not p.made([(24, 17)])


def test_donated_arguments_cost_once():
  x = jnp.ones((1000,))
  p = program.read(compiled(lambda x: x + 1, x, donate_argnums=0))
  assert (p.arguments, p.outputs, p.aliased) == (4000, 4000, 4000)
  assert p.peak == 4000 + p.temp


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match='ENTRY'):
    program.walk('nothing')
