"""What a compiled program costs: FLOPs, bytes, traffic, read from its HLO.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs,
so a scanned model of 32 layers seems to cost as much as one of a single layer.
`read` walks the program instead: every loop counts as often as it runs. All
figures are of one device.
"""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all',
               'collective-permute', 'collective-broadcast')
# What only moves numbers about, or names them.
MOVES = frozenset((
    'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'bitcast-convert',
    'copy', 'copy-start', 'copy-done', 'transpose', 'reshape', 'constant',
    'while', 'call', 'conditional', 'optimization-barrier', 'slice',
    'dynamic-slice', 'after-all', 'async-start', 'async-update', 'async-done'))
_BITS = dict(pred=8, s4=4, u4=4, s8=8, u8=8, s16=16, u16=16, f16=16, bf16=16,
             s32=32, u32=32, f32=32, s64=64, u64=64, f64=64, c64=64, c128=128)

_ARRAY = re.compile(r'\b([a-z]+\d*(?:e\d\w*)?)\[([\d,<=]*)\]')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_NAME = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
    r'\b(?:calls|to_apply|body|condition|branch_computations|'
    r'called_computations|true_computation|false_computation)='
    r'(\{[^}]*\}|%?[\w.\-]+)')
_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"(\d+)"')


class Traffic(NamedTuple):
  """Collectives of one kind: how many run in a step, and bytes of results."""

  count: int
  bytes: int


class Array(NamedTuple):
  """An array that one instruction makes, outside of fusions.

  Attributes:
    op: Its opcode; of a fusion, one that is no mere move of numbers, if any.
    dtype, shape: Of the array.
    times: How often the instruction runs.
    name: Where it comes from, as jax names it.
  """

  op: str
  dtype: str
  shape: tuple[int, ...]
  times: int
  name: str

  @property
  def bytes(self):
    return _bytes(self.dtype, self.shape)


class Program(NamedTuple):
  """Costs of a compiled program on one device.

  Attributes:
    flops: Of matrix products and convolutions, loops counted as they run.
    xla_flops: Of everything, as XLA counts: the body of a loop once.
    bytes_accessed: As XLA counts them: the body of a loop once.
    arguments, outputs, temp, aliased, peak: Bytes of memory. An output that
      takes the place of a donated argument is aliased; peak is what is needed
      at once.
    collectives: {kind: Traffic}.
    moved: The collectives one by one, as `Array`s.
    arrays: All arrays that are made outside of fusions.
    endless: Loops whose number of rounds is not known, counted as one.
  """

  flops: float
  xla_flops: float
  bytes_accessed: float
  arguments: int
  outputs: int
  temp: int
  aliased: int
  peak: int
  collectives: dict[str, Traffic]
  moved: tuple[Array, ...]
  arrays: tuple[Array, ...]
  endless: int

  def made(self, shapes):
    """Arrays of given shapes (axes in any order) that are computed.

    Args:
      shapes: Of weights, say. Axes of size 1 do not count.

    Returns:
      [Array]; copies, transposes and slices of other arrays are none.
    """
    key = lambda shape: tuple(sorted(n for n in shape if n != 1))
    keys = {key(s) for s in shapes}
    return [a for a in self.arrays
            if a.op not in MOVES and key(a.shape) in keys]


def read(compiled):
  """Costs of what `jax.jit(f).lower(...).compile()` returned, a `Program`."""
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  found = walk(compiled.as_text())
  sizes = dict.fromkeys(('arguments', 'outputs', 'temp', 'aliased'), 0)
  if memory is not None:
    sizes = dict(arguments=memory.argument_size_in_bytes,
                 outputs=memory.output_size_in_bytes,
                 temp=memory.temp_size_in_bytes,
                 aliased=memory.alias_size_in_bytes)
  peak = (sizes['arguments'] + sizes['outputs'] + sizes['temp']
          - sizes['aliased'])
  return Program(
      xla_flops=cost.get('flops', 0.),
      bytes_accessed=cost.get('bytes accessed', 0.), peak=peak, **sizes,
      **found)


# -------------------------------------------------------------------- parsing
class _Instruction(NamedTuple):
  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  inner: str  # the operands as they stand there; of a constant its value
  rest: str  # attributes

  def called(self) -> Iterator[str]:
    for group in _CALLED.findall(self.rest):
      yield from (n.strip(' %') for n in group.strip('{}').split(','))


def _close(text, start):
  """Index after the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i + 1
  raise ValueError(f'no closing parenthesis in {text!r}')


def _parse(text):
  """({computation: {name: instruction}}, name of the entry)."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if line.startswith('}'):
      current = None
    head = _HEAD.match(line)
    if head and current is None:
      current = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
      continue
    found = _LINE.match(line) if current is not None else None
    if not found:
      continue
    name, body = found.groups()
    end = _close(body, 0) if body.startswith('(') else body.index(' ')
    kind, body = body[:end], body[end:].strip()
    at = body.index('(')
    end = _close(body, at)
    current[name] = _Instruction(
        name, kind, body[:at], tuple(_NAME.findall(body[at:end])),
        body[at + 1:end - 1], body[end:])
  if entry is None:
    raise ValueError('the text holds no HLO module: it has no ENTRY')
  return computations, entry


def _arrays(kind):
  """[(dtype, shape)] of a type, those of a tuple one by one."""
  return [(d, tuple(int(n.lstrip('<=')) for n in dims.split(',') if n))
          for d, dims in _ARRAY.findall(kind) if d in _BITS or d[:2] == 'f8']


def _bytes(dtype, shape):
  return math.prod(shape) * _BITS.get(dtype, 8) // 8


# -------------------------------------------------------------------- walking
def walk(text):
  """FLOPs, collectives and arrays of an HLO text; keywords of `Program`."""
  computations, entry = _parse(text)
  flops, endless, moved, arrays = 0., 0, [], []
  todo, seen = [(entry, 1, entry, False)], set()
  while todo:
    name, times, owner, fused = todo.pop()
    own = computations[name]
    for i in own.values():
      trips = 1
      if i.op == 'while':
        found = _rounds(i, own, computations)
        trips, endless = (1, endless + 1) if found is None else (found, endless)
      inside = fused or i.op == 'fusion'
      todo += [(c, times * trips, owner if inside else c, inside)
               for c in i.called() if c in computations]
      if i.op in ('dot', 'convolution'):
        flops += times * _product(i, own)
      if i.op == 'custom-call':
        flops += times * _custom(i, own)
      kind = i.op.removesuffix('-start')
      where = re.search(r'op_name="([^"]*)"', i.rest)
      made = lambda op, parts: [
          Array(op, d, s, times, where[1] if where else i.name)
          for d, s in parts]
      # TPUs spread one collective over several fusions, its channel in each.
      channel = re.search(r'channel_id=(\d+)', i.rest)
      again = bool(fused and channel and (owner, channel[1]) in seen)
      if kind in COLLECTIVES and not again:
        if fused and channel:
          seen.add((owner, channel[1]))
        parts = _arrays(i.type)
        if i.op.endswith('-start') and i.type.startswith('('):
          # A tuple of what goes in, what comes out, and contexts of the chip.
          parts = [p for p in parts if p[1]]
          parts = parts[len(parts) // 2:] if len(parts) > 1 else parts
        moved += made(kind, parts)
      if not fused and i.op not in ('tuple', 'while'):
        arrays += made(_kind(i, computations), _arrays(i.type))
  collectives = {}
  for a in moved:
    old = collectives.get(a.op, Traffic(0, 0))
    collectives[a.op] = Traffic(
        old.count + a.times, old.bytes + a.times * a.bytes)
  return dict(flops=flops, collectives=collectives, moved=tuple(moved),
              arrays=tuple(arrays), endless=endless)


def _rounds(loop, own, computations):
  """How often a loop runs; None: not known.

  XLA says so for some chips. For TPUs it does not, and a loop that counts from
  one constant to another by a third is looked through.
  """
  found = _TRIPS.search(loop.rest)
  if found:
    return int(found[1])
  part = {k: computations.get(n, {}) for k, n in re.findall(
      r'\b(condition|body)=%?([\w.\-]+)', loop.rest)}
  end = _root(part.get('condition', {}))
  body, start = _root(part.get('body', {})), own.get(loop.operands[0])
  if (end is None or end.op != 'compare' or 'direction=LT' not in end.rest
      or not (body and start and body.op == start.op == 'tuple')):
    return None
  place, last = (_source(part['condition'], o) for o in end.operands)
  at = re.search(r'\bindex=(\d+)', place.rest) if place else None
  if not at:
    return None
  at = int(at[1])
  add = _source(part['body'], body.operands[at])
  if add is None or add.op != 'add':
    return None
  by = [_whole(_source(part['body'], o)) for o in add.operands]
  by = next((v for v in by if v), None)
  first, last = _whole(_source(own, start.operands[at])), _whole(last)
  if None in (by, first, last) or by < 1:
    return None
  return max(0, -(-(last - first) // by))


def _root(own):
  """What a computation returns: what no other instruction in it reads."""
  read = {o for i in own.values() for o in i.operands}
  ends = [i for n, i in own.items() if n not in read]
  return ends[-1] if ends else None


def _source(own, name):
  """An instruction, looked up through copies of it."""
  i = own.get(name)
  while i is not None and i.op in ('copy', 'bitcast', 'copy-done',
                                   'copy-start'):
    i = own.get(i.operands[0])
  return i


def _whole(i):
  """The value of a constant, or None."""
  if i is None or i.op != 'constant' or not re.fullmatch(r'-?\d+', i.inner):
    return None
  return int(i.inner)


def _kind(i, computations):
  """Opcode; of a fusion that of something in it that computes, if any does."""
  if i.op != 'fusion':
    return i.op
  inner = [j.op for c in i.called() for j in computations.get(c, {}).values()]
  return next((op for op in inner if op in ('dot', 'convolution')), None) or (
      next((op for op in inner if op not in MOVES), 'copy'))


def _product(i, own):
  """FLOPs of a dot or a convolution."""
  (_, out), = _arrays(i.type)[:1]
  left, right = (_arrays(own[o].type)[0][1] for o in i.operands[:2])
  if i.op == 'dot':
    axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.rest)[1]
    inner = math.prod(left[int(a)] for a in axes.split(',') if a)
    return 2. * math.prod(out) * inner
  return _convolution(i.rest, left, right, out)


def _custom(i, own):
  """FLOPs of a product that a GPU's library makes; 0 for any other call."""
  target = re.search(r'custom_call_target="([^"]*)"', i.rest)
  target = target[1] if target else ''
  shapes = [_arrays(own[o].type)[0][1] for o in i.operands[:2] if o in own]
  if target.startswith('__cublas$'):
    axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.rest)
    if axes:
      inner = math.prod(shapes[0][int(a.strip('" '))]
                        for a in axes[1].split(',') if a.strip())
      return 2. * math.prod(_arrays(i.type)[0][1]) * inner
  if target.startswith('__cudnn$fmha'):
    # Queries [B, T, H, h], keys [B, S, K, h]: two products, five to go back.
    products = 5 if 'Backward' in target else 2
    return products * 2. * math.prod(shapes[0]) * shapes[1][1]
  return 0.


def _convolution(rest, left, right, out):
  """FLOPs of a convolution: padding and holes of dilation are not multiplied.

  XLA for TPU writes matrix products, batched ones too, as convolutions whose
  windows mostly lie outside, so these places must not count.
  """
  lhs, rhs, dims = re.search(
      r'dim_labels=(\w+)_(\w+)->(\w+)', rest).groups()
  window = re.search(r'window=\{([^}]*)\}', rest)
  window = dict(re.findall(r'(\w+)=(\S+)', window[1])) if window else {}
  spatial = sorted(c for c in dims if c.isdigit())
  n = len(spatial)
  ints = lambda key, default: [
      int(v) for v in window.get(key, 'x'.join([str(default)] * n)).split('x')
  ] if n else []
  pads = window.get('pad', 'x'.join(['0_0'] * n)).split('x') if n else []
  places = 1
  for c, stride, pad, dilate, holes in zip(
      spatial, ints('stride', 1), pads, ints('rhs_dilate', 1),
      ints('lhs_dilate', 1)):
    size = left[lhs.index(c)]
    end, low = (size - 1) * holes, int(pad.split('_')[0])
    places *= sum(
        0 <= at <= end and at % holes == 0
        for o in range(out[dims.index(c)]) for k in range(right[rhs.index(c)])
        for at in (o * stride - low + k * dilate,))
  groups = re.search(r'batch_group_count=(\d+)', rest)
  batch = left[lhs.index('b')] / int(groups[1] if groups else 1)
  return 2. * batch * places * out[dims.index('f')] * right[rhs.index('i')]
