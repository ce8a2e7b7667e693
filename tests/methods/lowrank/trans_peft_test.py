"""Trans-PEFT: what is left out, how often, and what it is good for."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax
from peftjax import trees
from peftjax.models import convnet
from peftjax.models import decoder
import pytest

NAME = 'lowrank.trans_peft'
ARGS = dict(vocab=11, width=8, depth=2, heads=2, kv_heads=1, mlp_dim=16,
            head='classify', classes=3)
IDS = np.random.default_rng(0).integers(0, 11, (4, 5)).astype(np.int32)
FORMS = (dict(), dict(remat=True), dict(scan=True), dict(scan=True, remat=True))


def filled(shapes, seed=0, scale=0.4):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda v: jnp.asarray(
      scale * rng.normal(size=v.shape), jnp.float32), shapes)


def text(form, method):
  """(model, params, sites, theta): the same numbers in every form."""
  plain, model = decoder.Decoder(**ARGS), decoder.Decoder(**ARGS, **form)
  params = filled(jax.eval_shape(plain.init, jax.random.key(0), IDS)['params'])
  sites = peftjax.describe(plain, IDS)
  trained, frozen = peftjax.partition(
      method, peftjax.init(method, jax.random.key(0), sites, params))
  theta = peftjax.combine(filled(trained, 1), frozen)
  if form.get('scan'):
    params, sites = trees.stack(params), peftjax.describe(model, IDS)
    out, one = {}, theta['trans_peft']
    for path in one:
      if path.startswith('block_0'):
        each = [one[path.replace('block_0', f'block_{i}')] for i in range(2)]
        out[path.replace('block_0', 'blocks')] = jax.tree.map(
            lambda *v: jnp.stack(v), *each)
    theta = {'trans_peft': out}
  return model, params, sites, theta


def load(**kwargs):
  return peftjax.load(NAME, **{
      'rank': 2, 'alpha': 4.0, 'drop': 0.0, 'dropout': 0.0, **kwargs})


def training(model, method, params, theta, x=IDS):
  """key -> output while training, compiled."""
  return jax.jit(lambda key: peftjax.apply(
      model, method, params, theta, x, train=True, rng=key)[0])


# ------------------------------------------------------------ nothing perturbed
def test_without_either_it_trains_as_a_lora():
  """To the bit, the dropout's draws included."""
  kwargs = dict(rank=2, alpha=4.0, dropout=0.2, sites=dict(roles='qkvo'))
  lora = peftjax.load('lowrank.lora', **kwargs)
  method = load(**{**kwargs, 'sites': peftjax.select(roles='qkvo')})
  model = decoder.Decoder(**ARGS)
  params = filled(jax.eval_shape(model.init, jax.random.key(0), IDS)['params'])
  sites = peftjax.describe(model, IDS)
  goal = jnp.eye(3)[np.array([0, 2, 1, 1])]

  def trained(method):
    theta = peftjax.init(method, jax.random.key(0), sites, params)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(theta, state, key):
      def loss(theta):
        y, _ = peftjax.apply(
            model, method, params, theta, IDS, train=True, rng=key)
        return jnp.square(y - goal).mean()
      updates, state = tx.update(jax.grad(loss)(theta), state)
      return optax.apply_updates(theta, updates), state

    state = tx.init(theta)
    for i in range(3):
      theta, state = step(theta, state, jax.random.key(i))
    return theta[method.name]

  jax.tree.map(np.testing.assert_array_equal, trained(method), trained(lora))


@pytest.mark.parametrize('form', FORMS, ids=str)
def test_outside_of_training_nothing_is_left_out(form):
  method = load(drop=1.0, mask=1.0)
  model, params, sites, theta = text(form, method)
  lora = peftjax.load('lowrank.lora', rank=2, alpha=4.0,
                      sites=peftjax.select(roles='qkvo'))
  parts = {p: {n: v for n, v in t.items() if n in 'ab'}
           for p, t in theta['trans_peft'].items()}
  plain = {'lora': {p: t for p, t in parts.items() if t}}
  run = lambda m, t: jax.jit(lambda t: peftjax.apply(
      model, m, params, t, IDS)[0])(t)
  np.testing.assert_array_equal(run(method, theta), run(lora, plain))
  jax.tree.map(np.testing.assert_array_equal,
               peftjax.fold(method, params, theta, sites),
               peftjax.fold(lora, params, plain, sites))


# ----------------------------------------------------------------- dropping
def without(params, layers):
  """Params whose perceptrons in these layers put out zero."""
  flat = {p: v * np.float32(not any(f'block_{i}/mlp/down' in p for i in layers))
          for p, v in trees.flatten(params).items()}
  return trees.unflatten(flat)


@pytest.mark.parametrize('form', FORMS, ids=str)
def test_every_layer_and_batch_draws_its_own(form):
  """Outputs are those with some perceptrons out, each as often as it should."""
  method, draws, rate = load(drop=0.3), 400, 0.3
  model, params, _, theta = text(form, method)
  base, plain, _, unrolled = text({}, method)
  outs = jax.jit(jax.vmap(lambda key: peftjax.apply(
      model, method, params, theta, IDS, train=True, rng=key)[0]))(
          jax.random.split(jax.random.key(5), draws))
  counts = {}
  for out in itertools.product((False, True), repeat=2):
    left = without(plain, [i for i in range(2) if out[i]])
    want, _ = peftjax.apply(base, method, left, unrolled, IDS)
    counts[out] = int((np.abs(outs - want).max((1, 2)) < 1e-5).sum())
  assert sum(counts.values()) == draws
  for out, n in counts.items():
    share = math.prod(rate if o else 1 - rate for o in out)
    assert abs(n / draws - share) < 4 * math.sqrt(share * (1 - share) / draws)


def test_a_dropped_perceptron_has_no_gradient():
  method = load(drop=1.0, sites=peftjax.select(roles=('q', 'up', 'down')))
  model, params, _, theta = text({}, method)

  @jax.jit
  @jax.grad
  def grads(both):
    y, _ = peftjax.apply(model, method, both[0], {
        'trans_peft': both[1]}, IDS, train=True, rng=jax.random.key(0))
    return jnp.sin(y).sum()

  of_base, of_theta = grads((params, theta['trans_peft']))
  for path, g in {**trees.flatten(of_base), **trees.flatten(of_theta)}.items():
    inside = 'mlp/' in path or 'norm2' in path
    assert bool(np.any(g)) == (not inside and 'drop' not in path), path


@pytest.mark.parametrize('scan', [False, True])
def test_recomputed_layers_draw_the_same(scan):
  """Gradients under nn.remat are those without, and those of differences."""
  method = load(drop=0.5, mask=0.3, dropout=0.2)

  def gradient(form):
    model, params, _, theta = text(form, method)
    trained, frozen = peftjax.partition(method, theta)

    def loss(trained, key):
      y, _ = peftjax.apply(model, method, params, peftjax.combine(
          trained, frozen), IDS, train=True, rng=key)
      return jnp.sin(y).sum()

    return jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(
        trained, jax.random.split(jax.random.key(0), 8))

  got, want = (gradient(dict(scan=scan, remat=r)) for r in (True, False))
  assert len(np.unique(want[0])) == 8
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5), got, want)


# ------------------------------------------------------------------ masking
class Down(nn.Module):
  """A foreign model: nothing but a layer whose role its name tells."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(x.shape[-1], name='down')(nn.Dense(
        x.shape[-1], name='query')(x))


def down(d):
  """Params of `Down` that leave its input alone."""
  eye = dict(kernel=jnp.eye(d), bias=jnp.zeros(d))
  return dict(query=eye, down=eye)


def test_entries_are_masked_each_alone_and_not_rescaled():
  x = jnp.broadcast_to(1 + jnp.arange(64.), (8, 32, 64))
  params, method = down(64), load(mask=0.2)
  theta = peftjax.init(
      method, jax.random.key(0), peftjax.describe(Down(), x), params)
  run = training(Down(), method, params, theta, x)
  y, other = run(jax.random.key(0)), run(jax.random.key(1))
  assert ((y == 0) | (y == x)).all() and (y != other).any()
  np.testing.assert_array_equal(y, run(jax.random.key(0)))
  sd = math.sqrt(0.2 * 0.8 / x.size)
  assert abs((y == 0).mean() - 0.2) < 4 * sd
  for axes in ((0, 1), (0, 2), (1, 2)):  # no batch, token or unit of its own
    share = (y == 0).mean(axes)
    each = math.sqrt(0.2 * 0.8 / (x.size // share.size))
    np.testing.assert_allclose(share, 0.2, atol=5 * each)
  both = ((y == 0) & (jnp.roll(y, 1, 2) == 0)).mean()
  assert abs(both - 0.04) < 5 * math.sqrt(0.04 * 0.96 / x.size)


def test_a_lora_on_down_reads_what_is_left():
  x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
  sites = peftjax.describe(Down(), x)
  method = load(mask=0.5, sites=peftjax.select(roles=('q', 'down')))
  params = down(6)
  theta = peftjax.init(method, jax.random.key(0), sites, params)
  assert set(theta['trans_peft']['down']) == {'a', 'b', 'mask'}
  assert method.count(sites['down']) == 2 * 12
  t = theta['trans_peft']['down']
  t['b'] = jnp.ones_like(t['b'])
  y = np.asarray(training(Down(), method, params, theta, x)(jax.random.key(3)))
  found = []
  for row, out in zip(x, y):  # which of 2^6 masks was it
    fits = [h for m in itertools.product((0, 1), repeat=6)
            if np.abs((h := row * np.float32(m)) + 2 * h @ t['a'] @ t['b']
                      - out).max() < 1e-5]
    found.append(fits[0])
    assert len(fits) == 1
  assert len(np.unique(np.array(found) != 0, axis=0)) == 3


def test_masking_all_leaves_the_bias():
  method = load(mask=1.0)
  model, params, _, theta = text({}, method)
  cut = {p: v * np.float32('down/kernel' not in p)
         for p, v in trees.flatten(params).items()}
  want, _ = peftjax.apply(model, method, trees.unflatten(cut), theta, IDS)
  got = training(model, method, params, theta)(jax.random.key(0))
  np.testing.assert_allclose(got, want, atol=1e-5)


# ------------------------------------------------------- models of other people
class Block(nn.Module):
  """Flax's attention, whose layers have several axes, and a join."""

  @nn.compact
  def __call__(self, u):
    u = u + nn.MultiHeadDotProductAttention(2, name='attn')(u, u)
    h = nn.gelu(nn.Dense(12, name='up')(u))
    return self.join(u, u, nn.Dense(8, name='down')(h), 'mlp')

  def join(self, u, x, a, which):
    del x, which
    return u + a


class Tied(nn.Module):
  own: bool = False

  @nn.compact
  def __call__(self, ids):
    table = nn.Embed(11, 8, name='table')
    block = Holds if self.own else Block
    return table.attend(block(name='block')(table(ids)))


class Holds(nn.Module):
  """A block with a kernel of its own."""

  @nn.compact
  def __call__(self, u):
    u = u @ self.param('mix', nn.initializers.normal(), (8, 8))
    return self.join(u, u, nn.Dense(8, name='query')(u), 'mlp')

  join = Block.join


def tied(method, own=False):
  """(function of theta, params, sites, theta) of `Tied`."""
  model = Tied(own)
  params = filled(jax.eval_shape(model.init, jax.random.key(0), IDS)['params'])
  sites = peftjax.describe(model, IDS)
  trained, frozen = peftjax.partition(
      method, peftjax.init(method, jax.random.key(0), sites, params))
  theta = peftjax.combine(filled(trained, 1), frozen)
  return model, params, sites, theta


@pytest.mark.parametrize('rates, own', [
    (dict(drop=0.5), False), (dict(mask=0.5), False), (dict(drop=0.5), True)])
def test_layers_of_several_axes_and_tied_tables(rates, own):
  """What is applied outside of training is what is folded."""
  method = load(sites=peftjax.select(path='query|value|out|table'), **rates)
  if own:
    method = load(sites=peftjax.select(path='query|table'), **rates)
  model, params, sites, theta = tied(method, own)
  got, _ = peftjax.apply(model, method, params, theta, IDS)
  want = model.apply(
      {'params': peftjax.fold(method, params, theta, sites)}, IDS)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  run = training(model, method, params, theta)
  if own:  # its kernel makes the engine fold the block
    with pytest.raises(ValueError, match="'block' is folded while training"):
      run(jax.random.key(2))
  else:
    assert np.abs(run(jax.random.key(2)) - got).max() > 1e-2


# ------------------------------------------------------------------ the point
class Deep(nn.Module):
  """Two blocks of a layer to adapt and a perceptron, and a frozen head."""

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      x = Wide(name=f'block_{i}')(x)
    return nn.Dense(3, use_bias=False, name='out')(x)


class Wide(nn.Module):

  @nn.compact
  def __call__(self, u):
    u = u + nn.Dense(8, name='query')(u)
    h = nn.relu(nn.Dense(32, name='up')(u))
    return self.join(u, u, nn.Dense(8, name='down')(h), 'mlp')

  join = Block.join


def test_an_adapter_loses_less_on_a_new_base():
  """The new base has the old one's kernels with noise in its perceptrons."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x = draw(256, 8)
  goal = jnp.tanh(x @ draw(8, 3))
  params = Deep().init(jax.random.key(0), x)['params']
  sites = peftjax.describe(Deep(), x)

  def updated(key):
    new = {}
    for i, (path, v) in enumerate(trees.flatten(params).items()):
      inside = path.endswith(('up/kernel', 'down/kernel'))
      more = jax.random.normal(jax.random.fold_in(key, i), v.shape)
      new[path] = v + 0.3 * inside * v.std() * more
    return trees.unflatten(new)

  def errors(**rates):
    """Of an adapter of the old base, on it and, on average, on new ones."""
    method = load(rank=8, alpha=8.0, **rates)
    trained, frozen = peftjax.partition(
        method, peftjax.init(method, jax.random.key(1), sites, params))
    tx = optax.adam(1e-2)

    def error(trained, params, **kwargs):
      y, _ = peftjax.apply(Deep(), method, params, peftjax.combine(
          trained, frozen), x, **kwargs)
      return jnp.square(y - goal).mean()

    def step(carry, key):
      trained, state = carry
      grads = jax.grad(error)(trained, params, train=True, rng=key)
      updates, state = tx.update(grads, state)
      return (optax.apply_updates(trained, updates), state), None

    @jax.jit
    def run(trained):
      (trained, _), _ = jax.lax.scan(
          step, (trained, tx.init(trained)),
          jax.random.split(jax.random.key(2), 300))
      news = jax.vmap(lambda key: error(trained, updated(key)))(
          jax.random.split(jax.random.key(7), 16))
      return error(trained, params), news.mean()

    return run(trained)

  old, new = errors()
  assert old < 0.12 and new > 2 * old  # it is good, and suffers
  for rates in (dict(drop=0.1), dict(mask=0.1)):
    old_too, new_too = errors(**rates)
    assert new_too - old_too < 0.85 * (new - old) and new_too < new


# ------------------------------------------------------------- what is refused
@pytest.mark.parametrize('kwargs, message', [
    (dict(drop=1.5), 'drop=1.5: expected a probability, 0 to 1; .* is 1.0'),
    (dict(mask=-0.1), 'mask=-0.1: expected a probability, 0 to 1; .* is 0.0'),
    (dict(drop=0.1), 'drop=0.1 needs blocks with a hook join.* has none; with'),
    (dict(rank=7), "rank 7 at 'query': expected .* nearest is 6"),
    (dict(dropout=1.0), r'dropout=1.0: expected a rate .* nearest is 0.9')])
def test_bad_arguments(kwargs, message):
  x = jnp.ones((3, 6))
  with pytest.raises(ValueError, match=message):
    peftjax.init(load(**kwargs), jax.random.key(0),
                 peftjax.describe(Down(), x), down(6))


def test_places_that_are_not_there_are_refused():
  class Query(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(4, name='query')(x)

  x = jnp.ones((2, 4))
  params = Query().init(jax.random.key(0), x)['params']
  with pytest.raises(ValueError, match="mask=0.5 needs kernels of the role 'd"):
    peftjax.init(load(mask=0.5), jax.random.key(0),
                 peftjax.describe(Query(), x), params)
  method = load(mask=0.5)
  x, params = jnp.ones((3, 6)), down(6)
  theta = peftjax.init(
      method, jax.random.key(0), peftjax.describe(Down(), x), params)
  with pytest.raises(ValueError, match="mask=0.5 at 'down' needs a key"):
    peftjax.apply(Down(), method, params, theta, x, train=True)


def test_a_layer_that_is_folded_while_training_is_refused():
  x, params = jnp.ones((3, 6)), down(6)
  sites = peftjax.describe(Down(), x)
  mask = peftjax.load(
      'sparse.random_mask', density=0.5, sites=peftjax.select(path='down'))
  outside, inside = (load(mask=0.5), mask), (mask, load(mask=0.5))
  for methods in (outside, inside):
    theta = peftjax.init(methods, jax.random.key(0), sites, params)
    run = lambda train, m=methods, t=theta: peftjax.apply(
        Down(), m, params, t, x, train=train, rng=jax.random.key(0))[0]
    np.testing.assert_allclose(run(False), x)
    if methods is inside:
      assert (run(True) == 0).any()
      continue
    with pytest.raises(ValueError, match="'down' is folded while training"):
      run(True)


def test_blocks_without_a_perceptron_are_refused():
  model = convnet.ConvNeXt(widths=(8,), depths=(1,), classes=3)
  images = jnp.ones((1, 8, 8, 3))
  params = model.init(jax.random.key(0), images)['params']
  method = load(drop=0.5, sites=peftjax.select(roles=('up', 'down')))
  theta = peftjax.init(
      method, jax.random.key(0), peftjax.describe(model, images), params)
  with pytest.raises(ValueError, match="drop=0.5: .* joins 'conv', expected o"):
    peftjax.apply(model, method, params, theta, images)
