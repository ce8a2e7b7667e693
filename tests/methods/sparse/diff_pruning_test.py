"""sparse.diff_pruning: gates, projection, and training on a fixed support."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax import trees
from peftjax.methods.sparse import diff_pruning
from peftjax.phases import schedule

DEPTH = 2


class Block(nn.Module):

  @nn.compact
  def __call__(self, x, _=None):
    return x + nn.Dense(5, name='dense')(nn.LayerNorm(name='norm')(x)), None


class Net(nn.Module):
  scan: bool = False

  @nn.compact
  def __call__(self, x):
    x = x + self.param('pos', nn.initializers.zeros, (5,))
    if self.scan:
      x, _ = nn.scan(
          Block, variable_axes={'params': 0}, split_rngs={'params': True},
          length=DEPTH)(name='blocks')(x, None)
    else:
      for i in range(DEPTH):
        x, _ = Block(name=f'block_{i}')(x)
    return nn.Dense(3, name='head')(x)


MODEL = Net()
X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)
SITES = pj.describe(MODEL, X)
NAMES = {'': ('pos',), **{f'block_{i}/{layer}': names for i in range(DEPTH)
                          for layer, names in (('dense', ('bias', 'kernel')),
                                               ('norm', ('bias', 'scale')))}}
N = 5 + DEPTH * (25 + 5 + 10)  # all but the head


def noisy(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda v: jnp.asarray(
      v + rng.normal(0, 0.3, v.shape).astype(v.dtype)), tree)


PARAMS = noisy(jax.tree.map(
    lambda v: np.zeros(v.shape, v.dtype),
    jax.eval_shape(MODEL.init, jax.random.key(0), X)['params']), 2)


def dense_theta(seed, open_share=1.0):
  """Phase-one theta with random w, and gates that leave nothing to chance."""
  rng = np.random.default_rng(seed)
  theta = {}
  for path, names in NAMES.items():
    theta[path] = {}
    for n in names:
      shape = SITES[path].params[n].shape
      opened = rng.random(shape) < open_share
      theta[path] |= {
          f'w.{n}': jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32),
          f'alpha.{n}': jnp.where(opened, 50., -50.),
          f'group.{n}': jnp.float32(50)}
  return theta


def open_differences(theta):
  return {(p, n): np.where(theta[p][f'alpha.{n}'] > 0, theta[p][f'w.{n}'], 0)
          for p, names in NAMES.items() for n in names}


def test_starts_as_the_base_and_draws_gates():
  method = pj.load('sparse.diff_pruning', density=0.1)
  theta = pj.init(method, jax.random.key(3), SITES, PARAMS)
  assert set(theta['diff_pruning']) == set(NAMES)  # the head is left alone
  assert pj.count(theta) == 2 * N + sum(map(len, NAMES.values()))
  assert pj.count(theta) == sum(method.count(SITES[p]) for p in NAMES)

  @jax.jit
  def run(theta, key):
    def train(key):
      plain = pj.fold(method, PARAMS, theta, SITES, train=True, rng=key)
      return plain, pj.apply(
          MODEL, method, PARAMS, theta, X, train=True, rng=key)[0]

    still = pj.apply(MODEL, method, PARAMS, theta, X)[0]
    folded = MODEL.apply(
        {'params': pj.fold(method, PARAMS, theta, SITES)}, X)
    base = MODEL.apply({'params': PARAMS}, X)
    plain, drawn = jax.lax.map(train, jax.random.split(key, 3))
    return plain, drawn, still, folded, base

  plain, drawn, still, _, base = run(theta, jax.random.key(4))
  jax.tree.map(lambda v, p: np.testing.assert_array_equal(v, [p] * 3),
               plain, PARAMS)
  np.testing.assert_allclose(still, base, atol=1e-6)
  np.testing.assert_allclose(drawn, [base] * 3, atol=1e-6)
  # Logits that leave many gates between 0 and 1.
  theta = noisy(jax.tree_util.tree_map_with_path(
      lambda path, v: jnp.full_like(v, 0.7 * ('w.' not in str(path[-1]))),
      theta), 5)
  _, drawn, still, folded, base = run(theta, jax.random.key(4))
  np.testing.assert_allclose(still, folded, atol=1e-5)
  different = lambda a, b: jnp.abs(a - b).max() > 1e-3
  assert different(still, base) and different(drawn[0], still)
  assert different(drawn[0], drawn[1]) and different(drawn[1], drawn[2])
  again = run(theta, jax.random.key(4))[1]
  np.testing.assert_array_equal(again, drawn)


def test_each_layer_of_a_scan_draws_its_own_gates():
  """Read from the gradient of w: with kernels at zero, the stream adds up
  z_g z w of every layer's bias, and the gradient is z_g z times the head."""
  method = pj.load('sparse.diff_pruning', density=0.1, structured=False,
                   sites=dict(path='blocks/dense'))
  model, params = Net(scan=True), trees.stack(PARAMS)
  params['blocks']['dense'] = jax.tree.map(
      jnp.zeros_like, params['blocks']['dense'])
  sites = pj.describe(model, X)
  theta = pj.init(method, jax.random.key(0), sites, params)
  theta['diff_pruning']['blocks/dense']['alpha.bias'] *= 0

  def total(theta):
    y = pj.apply(model, method, params, theta, X, train=True,
                 rng=jax.random.key(1))[0]
    return y.mean(0).sum()

  grads = jax.jit(jax.grad(total))(theta)['diff_pruning']['blocks/dense']
  z = np.asarray(grads['w.bias'] / params['head']['kernel'].sum(1))
  assert z.shape == (DEPTH, 5) and (-1e-5 < z).all() and (z < 1 + 1e-5).all()
  assert len({tuple(row.round(4)) for row in z}) == DEPTH
  assert ((z > 1e-4) & (z < 1 - 1e-4)).any()


def test_penalty_is_the_expected_number_of_open_gates():
  sigmoid = 1 / (1 + np.exp(-5))
  for structured in (True, False):
    kwargs = dict(structured=structured, density=0.1)
    method = pj.load('sparse.diff_pruning', l0=0.25, **kwargs)
    theta = pj.init(method, jax.random.key(3), SITES, PARAMS)
    open_gates = sigmoid * (N + structured * sum(map(len, NAMES.values())))
    np.testing.assert_allclose(
        pj.penalty(method, theta, {}, 0), 0.25 * open_gates, rtol=1e-5)
    scaled = pj.load('sparse.diff_pruning', **kwargs)
    np.testing.assert_allclose(
        pj.penalty(scaled, theta, {}, 0), 1.25e-7 * 334e6 * open_gates / N,
        rtol=1e-5)
    groups = {n for t in theta['diff_pruning'].values() for n in t
              if n.startswith('group.')}
    assert bool(groups) == structured
    grads = jax.grad(lambda t: pj.penalty(method, t, {}, 0))(theta)
    for t in grads['diff_pruning'].values():
      for n, g in t.items():
        assert bool((g != 0).all()) == (not n.startswith('w.')), n
  groups = {n: method.labels.get(n, '') for n in
            ('w.kernel', 'alpha.kernel', 'group.kernel')}
  assert list(groups.values()) == ['', 'gate', 'gate']


def project(method, theta, sites=SITES, key=7):
  """Theta of the second phase, as the training loop makes it."""
  stage = schedule(method, 10)[1]
  assert stage.start == 5 and stage.methods[0].name == 'diff_pruning'
  theta = stage.convert({'diff_pruning': theta}, jax.random.key(key), sites)
  return stage.methods[0], theta


def fold(method, params, theta, sites):
  """Folded leaves by path."""
  return trees.flatten(jax.jit(
      lambda t: pj.fold(method, params, t, sites))(theta))


@pytest.mark.parametrize('density', [0.02, 0.1, 0.56, 1.0])
def test_projection_keeps_exactly_the_largest(density):
  theta = dense_theta(3, open_share=0.7)
  method, sparse = project(
      pj.load('sparse.diff_pruning', density=density), theta)
  differences = open_differences(theta)
  sizes = np.concatenate([np.abs(v).ravel() for v in differences.values()])
  k = sum(v.size for t in sparse['diff_pruning'].values()
          for n, v in t.items() if n.startswith('value.'))
  assert k / N <= density and (k + 1) / N > density
  least = np.sort(sizes)[-k]
  found, fill = 0, 0
  for (path, n), v in differences.items():
    t = sparse['diff_pruning'].get(path, {})
    index = np.asarray(t.get(f'index.{n}', []), np.int32)
    assert len(set(index.tolist())) == len(index) and (index < v.size).all()
    np.testing.assert_array_equal(t.get(f'value.{n}', []), v.ravel()[index])
    kept = np.zeros(v.size, bool)
    kept[index] = True
    assert kept[np.abs(v.ravel()) > least].all()
    found += (v.ravel()[index] != 0).sum()
    fill += (v.ravel()[index] == 0).sum()
  assert found == min(k, (sizes > 0).sum()) and found + fill == k
  folded = fold(method, PARAMS, sparse, SITES)
  if not fill:
    for (path, n), v in differences.items():
      name = f'{path}/{n}' if path else n
      np.testing.assert_array_equal(folded[name], trees.flatten(PARAMS)[name]
                                    + np.where(np.abs(v) >= least, v, 0))


def test_projection_samples_gates_and_groups():
  """Ties the kept entries to one draw: closed gates and groups are left out."""
  theta = dense_theta(3)
  theta = {p: {n: jnp.full_like(v, -50) if n == 'group.kernel' else v
               for n, v in t.items()} for p, t in theta.items()}
  method = pj.load('sparse.diff_pruning', density=0.2)
  kept = {n for t in project(method, theta)[1]['diff_pruning'].values()
          for n in t}
  assert 'value.bias' in kept and 'value.kernel' not in kept
  theta = {p: {n: jnp.zeros_like(v) if n.startswith('alpha') else v
               for n, v in t.items()} for p, t in dense_theta(3).items()}
  choose = lambda key: project(method, theta, key=key)[1]['diff_pruning']
  flat = lambda t: jnp.concatenate([
      t[p][n] for p in sorted(t) for n in sorted(t[p]) if n[0] == 'i'])
  one, same, other = flat(choose(1)), flat(choose(1)), flat(choose(2))
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)


def test_scanned_projection_equals_unrolled():
  theta = dense_theta(4, open_share=0.7)
  stacked = {'': theta[''], **{
      f'blocks/{layer}': jax.tree.map(
          lambda *v: jnp.stack(v),
          *(theta[f'block_{i}/{layer}'] for i in range(DEPTH)))
      for layer in ('dense', 'norm')}}
  model, params = Net(scan=True), trees.stack(PARAMS)
  sites = pj.describe(model, X)
  method = pj.load('sparse.diff_pruning', density=0.1)
  fixed, sparse = project(method, theta)
  _, padded = project(method, stacked, sites)
  index = padded['diff_pruning']['blocks/dense']['index.kernel']
  assert index.shape[0] == DEPTH and (index == 25).any()  # so one is padded
  plain = fold(fixed, PARAMS, sparse, SITES)
  folded = trees.flatten(trees.unstack(
      trees.unflatten(fold(fixed, params, padded, sites))))
  for path, v in plain.items():
    np.testing.assert_array_equal(folded[path], v, err_msg=path)
  y, want = jax.jit(lambda t: (
      pj.apply(model, fixed, params, t, X)[0],
      MODEL.apply({'params': trees.unflatten(plain)}, X)))(padded)
  np.testing.assert_allclose(y, want, atol=1e-5)


def test_fixed_support_trains_nothing_else():
  method, theta = project(
      pj.load('sparse.diff_pruning', density=0.1), dense_theta(3))
  trained, frozen = pj.partition(method, theta)
  assert {n.split('.')[0] for t in trained['diff_pruning'].values()
          for n in t} == {'value'}
  assert pj.count(trained) == pj.count(frozen) == int(0.1 * N)
  tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(
      0.1, weight_decay=0.1))

  def loss(trained):
    y = pj.apply(MODEL, method, PARAMS, pj.combine(trained, frozen), X)[0]
    return jnp.square(y - 1).mean()

  @jax.jit
  def step(trained, state):
    value, grads = jax.value_and_grad(loss)(trained)
    updates, state = tx.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state, value, grads

  def dense(params):
    return jnp.square(MODEL.apply({'params': params}, X) - 1).mean()

  # The gradient of a value is the dense gradient's entry.
  start = trees.unflatten(fold(method, PARAMS, theta, SITES))
  want = trees.flatten(jax.jit(jax.grad(dense))(start))
  *_, grads = step(trained, tx.init(trained))
  for path, t in grads['diff_pruning'].items():
    for n, g in t.items():
      name = n.removeprefix('value.')
      index = frozen['diff_pruning'][path][f'index.{name}']
      np.testing.assert_allclose(
          g, want[f'{path}/{name}' if path else name].ravel()[index],
          rtol=1e-4, atol=1e-6)

  state, losses = tx.init(trained), []
  for _ in range(5):
    trained, state, value, _ = step(trained, state)
    losses.append(float(value))
  assert losses[-1] < losses[0]
  folded = fold(method, PARAMS, pj.combine(trained, frozen), SITES)
  moved = 0
  for path, v in trees.flatten(PARAMS).items():
    site, _, name = path.rpartition('/')
    index = frozen['diff_pruning'].get(site, {}).get(f'index.{name}', [])
    mask = np.zeros(v.size, bool)
    mask[np.asarray(index, np.int32)] = True
    same = np.asarray(folded[path]).ravel() == np.asarray(v).ravel()
    assert same[~mask].all(), path
    moved += (~same).sum()
  assert moved == int(0.1 * N)


class Linear(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name='layer')(x)


def test_fixed_support_equals_shira():
  """Hugging Face PEFT's SHiRA with the same mask: output and gradient."""
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  d_in, d_out = 6, 4
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(d_in, d_out)).astype(np.float32)
  bias = rng.normal(size=d_out).astype(np.float32)
  x = rng.normal(size=(3, d_in)).astype(np.float32)
  index = np.sort(rng.permutation(d_in * d_out)[:d_in + d_out])
  values = rng.normal(size=len(index)).astype(np.float32)

  mask = np.zeros((d_in, d_out), np.float32)
  mask.ravel()[index] = 1
  config = peft.ShiraConfig(r=1, mask_type='custom', target_modules=['layer'])
  config.mask_fn = lambda base, r, **kw: torch.tensor(mask.T)
  base = torch.nn.Sequential()
  base.add_module('layer', torch.nn.Linear(d_in, d_out))
  with torch.no_grad():
    base.layer.weight.copy_(torch.tensor(kernel.T))
    base.layer.bias.copy_(torch.tensor(bias))
  theirs = peft.get_peft_model(base, config)
  weight, = (p for n, p in theirs.named_parameters() if 'shira_weight' in n)
  # Their values follow the mask of [d_out, d_in], ours that of [d_in, d_out].
  order = np.argsort((index % d_out) * d_in + index // d_out)
  with torch.no_grad():
    weight.copy_(torch.tensor(values[order]))
  y_theirs = theirs(torch.tensor(x))
  y_theirs.square().sum().backward()

  params = dict(layer=dict(kernel=jnp.asarray(kernel), bias=jnp.asarray(bias)))
  model = Linear()
  method = pj.load('sparse.diff_pruning', phase=1)

  def ours(values):
    theta = {'diff_pruning': {'layer': {
        'index.kernel': jnp.asarray(index, jnp.int32),
        'value.kernel': values}}}
    y = pj.apply(model, method, params, theta, jnp.asarray(x))[0]
    return jnp.square(y).sum(), y

  grads, y = jax.jit(jax.grad(ours, has_aux=True))(jnp.asarray(values))
  np.testing.assert_allclose(y, y_theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(grads[order], weight.grad.numpy(), rtol=1e-4,
                             atol=1e-5)


def test_second_phase_on_its_own_is_a_random_support():
  method = pj.load('sparse.diff_pruning', density=0.1, phase=1)
  theta = pj.init(method, jax.random.key(0), SITES, PARAMS)
  supports = [theta['diff_pruning'][f'block_{i}/dense'] for i in range(DEPTH)]
  for t in supports:  # 10 % of 25 is 2, of 5 nothing
    assert set(t) == {'index.kernel', 'value.kernel'}
    first, second = t['index.kernel'].tolist()
    assert 0 <= first < second < 25 and (t['value.kernel'] == 0).all()
  assert not np.array_equal(*(t['index.kernel'] for t in supports))
  assert 'block_0/norm' not in theta['diff_pruning']
  y = jax.jit(lambda t: pj.apply(MODEL, method, PARAMS, t, X)[0])(theta)
  np.testing.assert_allclose(y, MODEL.apply({'params': PARAMS}, X), atol=1e-6)


def test_budget_is_not_lost_to_rounding():
  assert 0.29 * 100 < 29  # in binary
  assert diff_pruning.budget(0.29, 100) == 29
  assert diff_pruning.budget(0.289, 100) == 28


def test_errors():
  for density in (0, -0.1, 1.5):
    with pytest.raises(ValueError, match=f'density={density}: expected a sha'):
      pj.load('sparse.diff_pruning', density=density)
  for l0 in (-1, float('nan'), float('inf')):
    with pytest.raises(ValueError, match=f'l0={l0}: expected a finite number'):
      pj.load('sparse.diff_pruning', l0=l0)
  with pytest.raises(ValueError, match="'densty'; did you mean 'density'"):
    pj.load('sparse.diff_pruning', densty=0.1)
  start = lambda **kwargs: pj.init(pj.load('sparse.diff_pruning', **kwargs),
                                   jax.random.key(0), SITES, PARAMS)
  with pytest.raises(ValueError, match=f'0.001 of {N} parameters keeps none; '
                     'the smallest that keeps one is 0.0118'):
    start(density=0.001)
  with pytest.raises(ValueError, match="'block_0' .Block. has no parameters"):
    start(sites=dict(path='^block_0'))
