"""Programs for TPUs: loops without a count, collectives in several pieces."""

from peftjax import program

# A scan over 6 layers, as XLA for TPU writes it: the first layer's kernel is
# gathered in two fusions that other work stands between.
TEXT = '''HloModule m

%gather.1 (p: bf16[1,8,16]) -> (bf16[1,32,16], u32[]) {
  %p = bf16[1,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[1,32,16]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={1}
}

%gather.2 (q: bf16[1,8,16]) -> bf16[1,32,16] {
  %q = bf16[1,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %h = bf16[1,32,16]{2,1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, dimensions={1}
}

%body (b: (s32[], bf16[4,32], bf16[1,8,16])) -> (s32[], bf16[4,32], bf16[1,8,16]) {
  %one = s32[]{:T(128)} constant(1)
  %b = (s32[]{:T(128)}, bf16[4,32]{1,0}, bf16[1,8,16]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = bf16[4,32]{1,0} get-tuple-element(%b), index=1
  %k = bf16[1,8,16]{2,1,0} get-tuple-element(%b), index=2
  %next = s32[]{:T(128)} add(%i, %one)
  %start = bf16[1,32,16]{2,1,0} fusion(%k), kind=kCustom, calls=%gather.1
  %done = bf16[1,32,16]{2,1,0} fusion(%k), kind=kCustom, calls=%gather.2
  %r = bf16[4,32]{1,0} all-reduce(%x), channel_id=8, to_apply=%sum
  ROOT %t = (s32[]{:T(128)}, bf16[4,32]{1,0}, bf16[1,8,16]{2,1,0}) tuple(%next, %r, %k)
}

%condition (c: (s32[], bf16[4,32], bf16[1,8,16])) -> pred[] {
  %six = s32[]{:T(128)} constant(6)
  %c = (s32[]{:T(128)}, bf16[4,32]{1,0}, bf16[1,8,16]{2,1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %six), direction=LT
}

ENTRY %main (x0: bf16[4,32], k0: bf16[1,8,16]) -> (s32[], bf16[4,32], bf16[1,8,16]) {
  %zero = s32[]{:T(128)} constant(FIRST)
  %copy.1 = s32[]{:T(128)S(6)} copy(%zero)
  %x0 = bf16[4,32]{1,0} parameter(0)
  %k0 = bf16[1,8,16]{2,1,0} parameter(1)
  %t0 = (s32[]{:T(128)}, bf16[4,32]{1,0}, bf16[1,8,16]{2,1,0}) tuple(%copy.1, %x0, %k0)
  ROOT %w = (s32[]{:T(128)}, bf16[4,32]{1,0}, bf16[1,8,16]{2,1,0}) while(%t0), condition=%condition, body=%body
}
'''


def test_a_loop_from_a_constant_to_a_constant_is_counted():
  for first, rounds in ((0, 6), (1, 5), (6, 0)):
    found = program.walk(TEXT.replace('FIRST', str(first)))
    assert not found['endless']
    assert found['collectives']['all-reduce'] == program.Traffic(
        rounds, rounds * 4 * 32 * 2)
  by_two = TEXT.replace('FIRST', '0').replace('constant(1)', 'constant(2)')
  assert program.walk(by_two)['collectives']['all-reduce'].count == 3


def test_a_loop_with_another_end_is_told():
  for old, new in (('direction=LT', 'direction=NE'),
                   ('constant(6)', 'parameter(1)'),
                   ('constant(FIRST)', 'parameter(2)'),
                   ('add(%i, %one)', 'multiply(%i, %one)')):
    found = program.walk(TEXT.replace(old, new).replace('FIRST', '0'))
    assert found['endless'] == 1
    assert found['collectives']['all-reduce'].count == 1


def test_pieces_of_one_collective_count_once():
  found = program.walk(TEXT.replace('FIRST', '0'))
  assert found['collectives']['all-gather'] == program.Traffic(
      6, 6 * 32 * 16 * 2)
  two = TEXT.replace('FIRST', '0').replace('channel_id=7', 'channel_id=9', 1)
  assert program.walk(two)['collectives']['all-gather'].count == 12
