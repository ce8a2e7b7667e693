"""Intruder dimensions: properties, closed forms, PEFT's mitigation."""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax.analysis import intruder_dimensions as lib
from peftjax.models.vit import ViT
import pytest

TOP, EPS = 10, 0.5


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def orthonormal(rng, d, r):
  return np.linalg.qr(rng.normal(size=(d, r)))[0]


def matrix(u, s, v):
  return np.float32(u * s @ v.T)


def count(base, tuned, **kwargs):
  found = lib.directions(base, tuned, **kwargs)
  return int((found.cosines < EPS).sum()), int((found.subspace < EPS).sum())


def tree(**by_layer):
  return {n: dict(kernel=np.float32(k)) for n, k in by_layer.items()}


# ------------------------------------------------------------------ properties
@pytest.mark.parametrize('shape', [(30, 40), (40, 30)])
def test_scaled_and_rotated_inputs_bring_no_intruders(rng, shape):
  base = np.float32(rng.normal(size=shape))
  turn = np.float32(orthonormal(rng, shape[0], shape[0]))
  for tuned in (base, 2 * base, -base, turn @ base):
    found = lib.directions(base, tuned)
    assert found.values.shape == found.cosines.shape == (TOP,)
    np.testing.assert_allclose(found.cosines, 1, atol=1e-3)
    np.testing.assert_allclose(found.subspace, 1, atol=1e-3)
    assert (np.diff(found.values) <= 0).all()


def test_a_kernel_of_few_directions_has_no_more(rng):
  base = np.float32(rng.normal(size=(4, 30)))
  assert lib.directions(base, base).values.shape == (4,)


def test_subspaces_hold_where_single_vectors_turn(rng):
  """40 equal singular values, and noise of 1e-4 that chooses the vectors."""
  u, v = orthonormal(rng, 60, 50), orthonormal(rng, 80, 50)
  s = np.array([5.] * 40 + [1.] * 10)
  base, tuned = (matrix(u, s, v) + np.float32(1e-4 * rng.normal(size=(60, 80)))
                 for _ in range(2))
  single, subspace = count(base, tuned)
  assert single > 0 and subspace == 0
  new = np.linalg.qr(np.concatenate([v, rng.normal(size=(80, 1))], 1))[0][:, 50]
  tuned += 9 * np.float32(np.outer(u[:, 42], new))
  assert count(base, tuned)[1] == 1
  assert count(base, tuned, near=0.0) == (count(base, tuned)[0],) * 2


def test_directions_without_a_singular_value(rng):
  """The base has 3 of 8; what a routine fills up with is no match."""
  base = matrix(orthonormal(rng, 8, 3), [3., 2., 1.], orthonormal(rng, 8, 3))
  _, _, vt = np.linalg.svd(base)
  tuned = base + np.float32(9 * np.outer(rng.normal(size=8), vt[-1]))
  found = lib.directions(base, base)
  np.testing.assert_allclose(found.subspace, 1, atol=1e-3)
  assert count(base, tuned)[1] == 1
  assert count(np.zeros((8, 8)), base)[1] == 3


# ---------------------------------------------------------------- closed forms
@pytest.mark.parametrize('c', [0.5, 1.6, 1.8, 30.0])
def test_a_change_along_a_new_direction(rng, c):
  """s_i becomes (s_i^2 + c^2)^1/2, at the cosine s_i / (s_i^2 + c^2)^1/2."""
  u, q = orthonormal(rng, 12, 12), orthonormal(rng, 20, 13)
  s = np.linspace(12, 1, 12)
  i, v = 9, q[:, 12]
  c = c * s[i]
  base = matrix(u, s, q[:, :12])
  tuned = base + np.float32(c * np.outer(u[:, i], v))
  found = lib.directions(base, tuned, top=12)
  new = np.hypot(s[i], c)
  np.testing.assert_allclose(
      found.values, np.sort(np.append(np.delete(s, i), new))[::-1], rtol=1e-5)
  at = int(np.abs(found.values - new).argmin())
  np.testing.assert_allclose(found.cosines[at], s[i] / new, rtol=1e-3)
  np.testing.assert_allclose(np.delete(found.cosines, at), 1, atol=1e-4)
  intruder = c > s[i] * np.sqrt(1 / EPS ** 2 - 1)  # 3^1/2 s_i
  assert count(base, tuned, top=12) == (intruder, intruder)
  if intruder:  # it is told only where its value is among the first
    assert not at or count(base, tuned, top=at)[0] == 0
    assert count(base, tuned, top=at + 1)[0] == 1
  assert (at == 0) == (c > 12)


@pytest.mark.parametrize('lam', [0.0, 0.75, 1.0])
def test_mitigation_scales_the_intruder_alone(rng, lam):
  u, q = orthonormal(rng, 12, 12), orthonormal(rng, 20, 13)
  s = np.linspace(12, 1, 12)
  c, v = 30.0, q[:, 12]
  base = matrix(u, s, q[:, :12])
  tuned = base + np.float32(c * np.outer(u[:, 4], v))
  got = lib.mitigate_kernel(base, tuned, lam)
  want = tuned - (1 - lam) * np.outer(u[:, 4], s[4] * q[:, 4] + c * v)
  np.testing.assert_allclose(got, want, atol=2e-4)
  if lam == 1:
    np.testing.assert_array_equal(got, tuned)


# -------------------------------------------------------------- trees of params
@pytest.fixture(scope='module')
def mlp():
  """(base, tuned) of two layers and a head; the first has one intruder."""
  rng = np.random.default_rng(0)
  base = tree(one=rng.normal(size=(12, 20)), two=rng.normal(size=(20, 16)),
              head=rng.normal(size=(16, 3)))
  tuned = jax.tree.map(np.copy, base)
  _, _, vt = np.linalg.svd(base['one']['kernel'])
  tuned['one']['kernel'] += np.float32(
      12 * np.outer(orthonormal(rng, 12, 1), vt[-1]))
  tuned['head']['kernel'] += 1
  return base, tuned


def test_report_and_mitigation_leave_the_head_out(mlp):
  base, tuned = mlp
  sites = peftjax.describe(base)
  report = lib.report(base, tuned, sites)
  assert {n: r['intruders'] for n, r in report.items()} == dict(one=1, two=0)
  assert {n: r['subspace_intruders'] for n, r in report.items()} == dict(
      one=1, two=0)
  assert report['one']['cosines'].shape == (10,)
  assert lib.report(base, tuned, sites, eps=0.0)['one']['intruders'] == 0
  got = lib.mitigate(base, tuned, sites, lam=0.0)
  np.testing.assert_array_equal(got['two']['kernel'], base['two']['kernel'])
  np.testing.assert_array_equal(got['head']['kernel'], tuned['head']['kernel'])
  assert lib.report(base, got, sites)['one']['intruders'] == 0
  same = lib.mitigate(base, tuned, sites, lam=1.0)
  jax.tree.map(np.testing.assert_array_equal, same, tuned)


def test_the_change_as_a_lora(mlp):
  base, tuned = mlp
  base = {**base, 'head': tuned['head']}  # trained too, and folded in before
  sites = peftjax.describe(base)
  got = lib.mitigate(base, tuned, sites)
  lora = peftjax.load('lowrank.lora', rank=2, alpha=3.0, sites=dict(
      path='one|two'), alpha_pattern={'one': 5.0})
  theta, lost = lib.to_lora(lora, base, got, sites)
  start = peftjax.init(lora, jax.random.key(0), sites, base)
  assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, start)
  folded = peftjax.fold(lora, base, theta, sites)
  for name in ('one', 'two'):
    delta = np.float64(got[name]['kernel']) - base[name]['kernel']
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    change = folded[name]['kernel'] - base[name]['kernel']
    np.testing.assert_allclose(change, u[:, :2] * s[:2] @ vt[:2], atol=5e-6)
    whole = np.linalg.norm(s)
    share = np.linalg.norm(s[2:]) / whole if whole else 0
    np.testing.assert_allclose(lost[name], share, atol=1e-6)


def test_scanned_layers_are_kernels_of_their_own():
  model = ViT(classes=3, width=16, depth=2, heads=2, mlp_dim=24, scan=True)
  x = jnp.zeros((1, 8, 8, 3))
  params = jax.jit(model.init)(jax.random.key(0), x)['params']
  sites = peftjax.describe(model, x)
  lora = peftjax.load('lowrank.lora', rank=2, sites=dict(roles='up'))
  theta = peftjax.init(lora, jax.random.key(1), sites, params)
  t = theta['lora']['blocks/mlp/up']
  t['b'] = t['b'].at[1].set(9 * jax.random.normal(jax.random.key(2), (2, 24)))
  tuned = peftjax.fold(lora, params, theta, sites)
  found = {n: r['intruders'] for n, r in lib.report(
      params, tuned, sites, chosen=lora.sites).items()}
  assert found == {'blocks/mlp/up (layer 0)': 0, 'blocks/mlp/up (layer 1)': 2}
  less = lib.mitigate(params, tuned, sites, lam=0.5)
  back, lost = lib.to_lora(lora, params, less, sites)
  assert back['lora']['blocks/mlp/up']['a'].shape == (2, 16, 2)
  assert lost['blocks/mlp/up (layer 0)'] == 0
  assert 0 < lost['blocks/mlp/up (layer 1)'] < 1
  back, lost = lib.to_lora(lora, params, tuned, sites)
  assert max(lost.values()) < 1e-5
  again = peftjax.fold(lora, params, back, sites)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
               again, tuned)


@pytest.mark.parametrize('run, match', [
    (lambda b, t, s: lib.report(b, t, s, top=0), 'top=0: expected a whole'),
    (lambda b, t, s: lib.report(b, t, s, eps=1.5), 'eps=1.5: expected a cosi'),
    (lambda b, t, s: lib.report(b, t, s, near=-1), 'near=-1: expected a num'),
    (lambda b, t, s: lib.mitigate(b, t, s, lam=2), 'lam=2: expected a number'),
    (lambda b, t, s: lib.to_lora(peftjax.load('lowrank.lora', rank=2), b, t, s),
     "'head/kernel' changed too"),
    (lambda b, t, s: lib.to_lora(
        peftjax.load('lowrank.dora', rank=2), b, t, s), "method is 'dora'")])
def test_what_is_refused(mlp, run, match):
  base, tuned = mlp
  with pytest.raises(ValueError, match=match):
    run(base, tuned, peftjax.describe(base))


# ------------------------------------------------------------- another library
@pytest.mark.parametrize('lam', [0.75, 0.2])
def test_equals_peft(rng, lam):
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  from peft.tuners.lora.intruders import reduce_intruder_dimension
  sizes = dict(one=(12, 20), two=(20, 16))
  net = torch.nn.Sequential()
  for name, (d_in, d_out) in sizes.items():
    net.add_module(name, torch.nn.Linear(d_in, d_out, bias=False))
  model = peft.get_peft_model(net, peft.LoraConfig(
      target_modules=list(sizes), r=2, lora_alpha=6))
  copy = lambda p, v: p.data.copy_(torch.from_numpy(np.array(v.T, np.float32)))
  layers = {n: model.base_model.model.get_submodule(n) for n in sizes}
  base, theta = {}, {}
  lora = peftjax.load('lowrank.lora', rank=2, alpha=6.0)
  for i, (name, (d_in, d_out)) in enumerate(sizes.items()):
    base[name] = dict(kernel=np.float32(rng.normal(size=(d_in, d_out))))
    size = (3.0, 1e-3)[i]  # the second layer keeps its directions
    theta[name] = dict(a=np.float32(size * rng.normal(size=(d_in, 2))),
                       b=np.float32(rng.normal(size=(2, d_out))))
    copy(layers[name].base_layer.weight, base[name]['kernel'])
    copy(layers[name].lora_A['default'].weight, theta[name]['a'])
    copy(layers[name].lora_B['default'].weight, theta[name]['b'])
  told = []
  reduce_intruder_dimension(
      model, mitigation_lambda=lam, logging_sink=told.append)
  sites = peftjax.describe(base)
  tuned = peftjax.fold(lora, base, {'lora': theta}, sites)
  report = lib.report(base, tuned, sites)
  n = report['one']['intruders']
  assert n and any(f'one: Intruders: {n}' in line for line in told)
  assert not report['two']['intruders'] and any('two: No' in t for t in told)
  less = lib.mitigate(base, tuned, sites, lam)
  new, _ = lib.to_lora(lora, base, less, sites)
  folded = peftjax.fold(lora, base, new, sites)
  for name, layer in layers.items():
    delta = layer.get_delta_weight('intruder_reduced').detach().numpy().T
    np.testing.assert_allclose(
        folded[name]['kernel'] - base[name]['kernel'], delta,
        atol=1e-5 * max(1, np.abs(delta).max()))
