"""What a training step costs: FLOPs, memory, traffic, traces. No clocks.

The step is the one that `peftjax.train` runs. The models are small, with sizes
that do not meet by chance: an array of a kernel's shape is one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from peftjax import config as config_lib
from peftjax import phases
from peftjax import program
from peftjax import sharding
from peftjax import step as step_lib
from peftjax import trees
from peftjax.models.decoder import Decoder
from peftjax.models.encoder import Encoder
from peftjax.tasks import classification
from peftjax.tasks import lm

ROWS, TOKENS, RANK, BLOCK = 16, 13, 4, 6
ENCODER = functools.partial(
    Encoder, vocab=61, width=48, depth=2, heads=3, mlp_dim=150, positions=32,
    head='classify')
DECODER = functools.partial(
    Decoder, vocab=61, width=48, depth=2, heads=4, kv_heads=2, mlp_dim=150,
    tied=False)
KERNELS = dict(leaf='kernel', path='block')

METHODS = dict(
    lora=dict(name='lowrank.lora', rank=RANK, sites=KERNELS),
    dora=dict(name='lowrank.dora', rank=RANK, sites=KERNELS),
    oft=dict(name='orthogonal.oft', block_size=BLOCK, sites=KERNELS),
    boft=dict(name='orthogonal.boft', block_size=BLOCK, factors=1,
              sites=KERNELS),
    ia3=dict(name='scaling.ia3'),
    ssf=dict(name='scaling.ssf'),
    bitfit=dict(name='selective.bitfit'),
    ln_tuning=dict(name='selective.ln_tuning'),
    prompt=dict(name='prompts.prompt_tuning', length=4),
    prefix=dict(name='prompts.prefix_tuning', length=4),
    full=dict(name='selective.full'))


def steps(model, method, devices=1):
  """(lowered step, sites, state) of a method on a model of random weights."""
  rng = np.random.default_rng(0)
  batch = dict(ids=rng.integers(3, 61, (ROWS, TOKENS)).astype(np.int32),
               mask=np.ones((ROWS, TOKENS), bool))
  config = config_lib.defaults()
  config.batch = ROWS
  config.optim.clip = 0.0
  if isinstance(model, Encoder):
    batch['label'] = np.zeros(ROWS, np.int32)
    task = classification.classify('classify', classification.inputs, 2)
  else:
    batch['weights'] = np.ones((ROWS, TOKENS), np.float32)
    task = lm.task(config.task, None, None, None)
  if not isinstance(method, peftjax.Method):
    method = peftjax.load(**METHODS[method])
  args, kwargs = task.inputs(batch)
  params = jax.jit(model.init)(jax.random.key(0), *args, **kwargs)['params']
  sites = peftjax.describe(model, *args, **kwargs)
  mesh = sharding.make_mesh(dict(data=devices, model=1))
  at = sharding.params_sharding(mesh, (), params)
  run = step_lib.Run(config, task, model, sharding.put_global(params, at),
                     sites, mesh, at, jax.random.key(0))
  stage = phases.schedule((method,), 9)[0]
  theta = peftjax.init((method,), jax.random.key(1), sites, params)
  state = step_lib.start(run, stage, theta, 0)
  lowered, _ = step_lib.lower_step(run, stage, state, batch)
  return lowered, sites, state


@functools.cache
def cost(model, name, devices=1):
  """(Program, sites, trained part of theta) of an arm; model by its partial."""
  lowered, sites, state = steps(model(), name, devices)
  return program.read(lowered.compile()), sites, state['trained']


def blocks(sites):
  return {p: s for p, s in sites.items() if 'block' in p
          and 'kernel' in s.params and s.role != 'norm'}


def floor(model, sites, name):
  """Matrix FLOPs that no step on a frozen base can save, counted by hand.

  Every kernel once there and once back, but for those that see the embeddings,
  through which nothing goes back unless what they see is trained, a norm or a
  rotation; attention's two products once there and twice back; the head there
  and back.
  """
  below = {'ssf', 'bitfit', 'ln_tuning', 'oft', 'boft'}
  n = ROWS * TOKENS
  total = 0
  for path, site in blocks(sites).items():
    d_in, d_out = site.params['kernel'].shape
    first = name not in below and 'block_0/attn' in path and (
        site.role in ('q', 'k', 'v'))
    total += 2 * n * d_in * d_out * (1 if first else 2)
  built = model()
  h = 48 // built.heads
  total += built.depth * 6 * 2 * ROWS * built.heads * TOKENS * TOKENS * h
  if isinstance(built, Encoder):  # a dense layer and an output of 2, a text
    total += 2 * 2 * ROWS * (48 * 48 + 48 * 2)
  else:
    total += 2 * 2 * n * 48 * 61
  return total


def own(name, sites):
  """FLOPs of a method's own products."""
  n, total = ROWS * TOKENS, 0
  for site in blocks(sites).values():
    d_in, d_out = site.params['kernel'].shape
    if name == 'lora':
      total += 6 * n * RANK * (d_in + d_out)
    elif name in ('oft', 'boft'):
      total += 6 * n * d_in * BLOCK
  return total


@pytest.mark.parametrize('model', [ENCODER, DECODER],
                         ids=['encoder', 'decoder'])
@pytest.mark.parametrize('name, most', [
    ('lora', 1.02), ('ia3', 1.02), ('ssf', 1.02), ('bitfit', 1.02),
    ('ln_tuning', 1.02), ('oft', 1.05), ('boft', 1.05)])
def test_flops_are_at_the_bound_of_a_frozen_base(model, name, most):
  if model is DECODER and name == 'bitfit':
    pytest.skip('a Llama has no biases')
  p, sites, _ = cost(model, name)
  bound = floor(model, sites, name) + own(name, sites)
  # Not far below either: the bound would be wrong, or the step incomplete.
  assert 0.9 * bound < p.flops <= most * bound


def test_the_count_sees_the_gradients_of_kernels():
  """Full fine-tuning costs half as much again: the bound is not vacuous."""
  p, sites, _ = cost(ENCODER, 'full')
  assert p.flops > 1.3 * floor(ENCODER, sites, 'full')


# ------------------------------------------------------- nothing weight-shaped
def kernel_shapes(sites):
  return {(*s.stack, *s.params['kernel'].shape) for s in blocks(sites).values()}


FACTORED = [n for n in METHODS if n != 'full']


@pytest.mark.parametrize('name', FACTORED)
def test_no_array_of_a_kernels_shape_is_computed(name):
  """Unrolled: neither a delta, nor a gradient, nor a changed kernel.

  DoRA squares the kernel for the norms of its columns, which is kept for
  nothing later.
  """
  p, sites, _ = cost(ENCODER, name)
  made = p.made(kernel_shapes(sites))
  assert not [(a.op, a.shape, a.name) for a in made
              if not (name == 'dora' and a.name.endswith('/square'))]


def test_the_search_finds_them_in_full_fine_tuning():
  p, sites, _ = cost(ENCODER, 'full')
  shapes = kernel_shapes(sites)
  assert len(p.made(shapes)) >= len(blocks(sites))
  lora = peftjax.load(**METHODS['lora'])._replace(layer=None)  # folded
  lowered, sites, _ = steps(ENCODER(), lora)
  assert program.read(lowered.compile()).made(shapes)


@pytest.mark.parametrize('name', FACTORED)
def test_devices_exchange_theta_s_gradient_and_nothing_larger(name):
  """8 devices that split the batch: sums of theta's size, and of numbers.

  Rotations are summed as whole blocks, b b numbers for the b (b - 1) / 2 that
  are trained: what makes them of these stands behind the sum.
  """
  p, sites, trained = cost(ENCODER, name, 8)
  assert set(p.collectives) <= {'all-reduce'}, p.collectives
  size = 4 * trees.count(trained)
  most = size * 2 * BLOCK / (BLOCK - 1) if name in ('oft', 'boft') else size
  assert size <= p.collectives['all-reduce'].bytes <= most + 4096
  shapes = {tuple(sorted(s)) for s in kernel_shapes(sites)}
  assert not [a for a in p.moved if tuple(sorted(a.shape)) in shapes]


def test_full_fine_tuning_exchanges_kernels():
  p, sites, trained = cost(ENCODER, 'full', 8)
  assert p.collectives['all-reduce'].bytes > 0.9 * 4 * trees.count(trained)


# ----------------------------------------------------------- memory and depth
def deep(depth, name='lora', **kwargs):
  """Lowered step of a model of so many layers."""
  return steps(ENCODER(depth=depth, **kwargs), name)[0]


@pytest.mark.parametrize('name', ['lora', 'oft', 'ssf', 'bitfit'])
def test_arguments_are_the_base_and_theta_with_its_moments(name):
  """No moments, nor a second copy, of what is frozen."""
  full, _, weights = cost(ENCODER, 'full')
  p, _, trained = cost(ENCODER, name)
  base, theta = 4 * trees.count(weights), 4 * trees.count(trained)
  batch = ROWS * TOKENS * 5 + 4 * ROWS
  assert p.arguments <= base + 3 * theta + batch + 1024
  assert full.arguments >= 3 * base  # of which one is the base itself, unused
  # Activations: as full fine-tuning's, which keeps every kernel's input too.
  assert p.temp <= 1.15 * full.temp


def test_scanned_and_rematerialised_memory_grows_slower_than_depth():
  """4, 8, 16 and 32 layers: temporaries of a step, base and state beside."""
  read = lambda *a, **k: program.read(deep(*a, **k).compile()).temp
  temp = {d: read(d, scan=True, remat=True) for d in (4, 8, 16, 32)}
  plain = {d: read(d) for d in (2, 4)}
  # A layer more costs its input and little else: [rows, tokens, width].
  a_layer = (temp[32] - temp[16]) / 16
  assert a_layer <= 2.5 * 4 * ROWS * TOKENS * 48
  assert a_layer < 0.25 * (plain[4] - plain[2]) / 2
  for d in (4, 8, 16):
    assert temp[2 * d] < 1.9 * temp[d]


def test_the_program_does_not_grow_with_depth_under_scan():
  """Nor, without, faster than the number of sites: what compiling costs."""
  size = lambda *a, **k: len(deep(*a, **k).as_text())
  assert size(16, scan=True) < 1.05 * size(4, scan=True)
  two, four, eight = (size(d) for d in (2, 4, 8))
  assert eight - four < 1.1 * 2 * (four - two)


def test_equations_do_not_grow_with_depth_under_scan():
  """What tracing costs: equations of the step's jaxpr, inner ones with them."""
  def count(depth, scan):
    model = ENCODER(depth=depth, scan=scan)
    ids = jnp.ones((2, 5), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)['params']
    method = peftjax.load(**METHODS['lora'])
    sites = peftjax.describe(model, ids)
    theta = jax.eval_shape(lambda p: peftjax.init(
        method, jax.random.key(0), sites, p), params)
    loss = lambda t, p: peftjax.apply(model, method, p, t, ids)[0].sum()
    return equations(jax.make_jaxpr(jax.grad(loss))(theta, params).jaxpr)

  assert count(2, True) == count(6, True)
  one, two, four = (count(d, False) for d in (1, 2, 4))
  assert four - two == 2 * (two - one)


def equations(jaxpr):
  total = len(jaxpr.eqns)
  for e in jaxpr.eqns:
    for v in jax.tree.leaves(
        list(e.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')
        or hasattr(v, 'jaxpr')):
      inner = getattr(v, 'jaxpr', v)
      if hasattr(inner, 'eqns'):
        total += equations(inner)
  return total
