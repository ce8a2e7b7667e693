"""LoRA-GA against the gradient's singular vectors and Hugging Face PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax
import pytest


def load(case, **kwargs):
  return peftjax.load('lowrank.lora_ga', **{'sites': case.chosen, **kwargs})


def batches(case):
  """Two batches, enough for gradients of full rank."""
  rng = np.random.default_rng(1)
  if case.x.dtype.kind == 'i':
    return [rng.integers(0, 9, (8, 3)) for _ in range(2)]
  return [rng.normal(size=(8, *case.x.shape[1:])).astype(np.float32)
          for _ in range(2)]


def start(method, case, stats):
  return peftjax.init(
      method, jax.random.key(0), case.sites, case.params, stats)


# ----------------------------------------------------------------- closed forms
@pytest.mark.parametrize('name', ['mlp', 'image', 'words'])
def test_starts_at_singular_vectors_of_the_gradient(case, collected, name):
  c = case(name)
  method = load(c, rank=3, gamma=9.0)
  stats = collected(method, c, batches(c))
  theta = start(method, c, stats)
  for site, t in theta['lora_ga'].items():
    g = np.float64(stats['lora_ga'][site]['gradient'])
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    size = g.shape[1] ** 0.5 / 9
    for gram in (t['a'].T @ t['a'], t['b'] @ t['b'].T):
      np.testing.assert_allclose(gram, size * np.eye(3), atol=2e-6)
    for mine, theirs in ((t['a'], u[:, :3]), (t['b'].T, vt[3:6].T)):
      same = np.abs((mine * theirs).sum(0)) / size ** 0.5
      np.testing.assert_allclose(same, 1, atol=1e-4, err_msg=site)
    np.testing.assert_array_equal(t['a'], t['a0'])
    np.testing.assert_array_equal(t['b'], t['b0'])
  y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
  np.testing.assert_array_equal(y, c.model.apply({'params': c.params}, c.x))
  jax.tree.map(np.testing.assert_array_equal, c.params,
               peftjax.fold(method, c.params, theta, c.sites))


@pytest.mark.parametrize('scaling', ['lora', 'rslora'])
def test_first_step_is_along_the_nearest_gradient_of_twice_the_rank(
    case, collected, scaling):
  """Theorem of the paper: d K = -lr (s c)^2 times G's best rank 2 r part."""
  c = case('mlp')
  method = load(c, rank=2, alpha=3.0, gamma=4.0, scaling=scaling)
  stats = collected(method, c, [c.x])
  trained, frozen = peftjax.partition(method, start(method, c, stats))

  def loss(trained):
    theta = peftjax.combine(trained, frozen)
    y, _ = peftjax.apply(c.model, method, c.params, theta, c.x)
    return jnp.sin(y).sum(-1).mean()

  def kernels(step):
    moved = jax.tree.map(lambda v, g: v - step * g, trained, grads)
    return peftjax.fold(
        method, c.params, peftjax.combine(moved, frozen), c.sites)

  grads = jax.grad(loss)(trained)
  _, slope = jax.jvp(kernels, (0.0,), (1.0,))
  s = 3 / (2 if scaling == 'lora' else 2 ** 0.5)
  for site, found in stats['lora_ga'].items():
    g = np.float64(found['gradient'])
    u, values, vt = np.linalg.svd(g, full_matrices=False)
    want = -s ** 2 * g.shape[1] ** 0.5 / 4 * u[:, :4] * values[:4] @ vt[:4]
    np.testing.assert_allclose(
        slope[site]['kernel'], want, atol=1e-5 * np.abs(want).max())


def test_size_of_the_gradient_does_not_count(case, collected):
  c = case('mlp')
  method = load(c, rank=2)
  stats = collected(method, c, batches(c))
  far = jax.tree.map(lambda v: 128 * v, stats)
  for a, b in zip(*map(jax.tree.leaves, (
      start(method, c, stats), start(method, c, far)))):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_trains_a_and_b_from_the_first_step(case, collected):
  c = case('mlp')
  method = load(c, rank=2)
  trained, frozen = peftjax.partition(
      method, start(method, c, collected(method, c, [c.x])))
  assert {n: set(v) for n, v in frozen['lora_ga'].items()} == dict(
      one={'a0', 'b0'}, two={'a0', 'b0'})
  assert {n: method.count(c.sites[n]) for n in trained['lora_ga']} == dict(
      one=2 * 22, two=2 * 16)


@pytest.mark.parametrize('kwargs, message', [
    (dict(rank=4), r"rank 4 at .two.: .*half .*\[10, 6\].*nearest is 3"),
    (dict(rank=7), "rank 7 at 'two': expected .* from 1 to 6"),
    (dict(gamma=0.0), 'lora_ga: gamma=0.0: expected a positive number'),
    (dict(scaling='rs'), "unknown scaling 'rs'.*'rslora'")])
def test_bad_arguments(case, kwargs, message):
  c = case('mlp')
  with pytest.raises(ValueError, match=message):
    start(load(c, **{'rank': 2, **kwargs}), c, None)


def test_a_kernel_of_one_column_has_no_rank():
  sites = peftjax.describe(dict(w=jnp.ones((6, 1))))
  method = peftjax.load('lowrank.lora_ga', rank=1)
  with pytest.raises(ValueError, match=r'\[6, 1\]; leave it out of the sites'):
    method.check({p: sites[p] for p in sites})


def test_needs_statistics(case):
  c = case('mlp')
  with pytest.raises(ValueError, match=(
      "lora_ga starts from statistics of the data, and has none of 'one'.*"
      'peftjax.calibrate.collect')):
    start(load(c, rank=2), c, None)


# ------------------------------------------------------------- another library
@pytest.mark.parametrize('scaling', ['lora', 'rslora'])
def test_equals_peft(case, collected, scaling):
  """PEFT's own gradient, directions and weights; it scales them otherwise."""
  torch, peft = pytest.importorskip('torch'), pytest.importorskip('peft')
  loraga = pytest.importorskip('peft.tuners.lora.loraga')
  c = case('mlp')
  method = load(c, rank=3, alpha=5.0, scaling=scaling)
  stats = collected(method, c, batches(c))['lora_ga']
  theta = start(method, c, {'lora_ga': stats})['lora_ga']
  net = torch.nn.Sequential()
  for name, p in c.params.items():
    net.add_module(name, torch.nn.Linear(*p['kernel'].shape))
    net.get_submodule(name).load_state_dict(dict(
        weight=torch.tensor(p['kernel'].T), bias=torch.tensor(p['bias'])))
    if name == 'one':
      net.add_module('tanh', torch.nn.Tanh())
  weights = {n: net.get_submodule(n).weight.detach().clone() for n in c.params}

  def train_step():
    for x in batches(c):
      torch.sin(net(torch.tensor(x))).sum(-1).mean().backward()

  config = peft.LoraConfig(
      r=3, lora_alpha=5, target_modules=list(c.params),
      init_lora_weights='lora_ga', use_rslora=scaling == 'rslora',
      lora_ga_config=peft.LoraGAConfig())
  loraga.preprocess_loraga(net, config, train_step)
  for name in c.params:
    np.testing.assert_allclose(
        stats[name]['gradient'],
        net.get_submodule(name)._peft_loraga_grad.T, atol=1e-6)
  model = peft.get_peft_model(net, config)
  for name, t in theta.items():
    layer = model.base_model.model.get_submodule(name)
    a = layer.lora_A['default'].weight.detach().numpy().T
    b = layer.lora_B['default'].weight.detach().numpy().T
    d_out = b.shape[1]
    size = d_out ** 0.25 / 16 ** 0.5
    values = np.linalg.svd(stats[name]['gradient'], compute_uv=False)[3:6]
    for mine, theirs in ((t['a'].T, size * a.T), (values[:, None] * t['b'], b)):
      sign = np.sign((mine * theirs).sum(1, keepdims=True))  # is free
      np.testing.assert_allclose(sign * mine, theirs, atol=1e-4)
    s = 5 / (3 if scaling == 'lora' else 3 ** 0.5)
    np.testing.assert_allclose(
        layer.get_base_layer().weight.detach().T + s * a @ b,
        weights[name].T, atol=1e-5)
