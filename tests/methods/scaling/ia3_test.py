"""(IA)^3: closed forms, the paper's attention, Hugging Face PEFT, errors."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax
from peftjax.methods.scaling.ia3 import ia3
from peftjax.models.vit import ViT
import pytest


class Perceptron(nn.Module):
  """Two layers, named as Hugging Face does."""

  @nn.compact
  def __call__(self, x):
    h = jnp.tanh(nn.Dense(10, name='up_proj')(x))
    return nn.Dense(6, name='down_proj')(h)


class Block(nn.Module):
  """Attention of Flax, whose kernels have three axes, and a perceptron."""

  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, name='attn')(x, x)
    return nn.Dense(8, name='down')(nn.relu(nn.Dense(12, name='up')(x)))


class Images(nn.Module):
  """Two convolutions, the second with a taller kernel and stride."""

  @nn.compact
  def __call__(self, x):
    x = jnp.tanh(nn.Conv(4, (2, 2), padding='VALID', name='one')(x))
    return nn.Conv(6, (3, 2), (2, 1), padding='VALID', name='two')(x)


def draw(rng, tree, mean=0., std=0.3):
  return jax.tree.map(
      lambda v: jnp.asarray(rng.normal(mean, std, v.shape), jnp.float32), tree)


def made(model, x, seed=0, **kwargs):
  """A model's params and sites, the method and a theta far from its start."""
  rng = np.random.default_rng(seed)
  method = ia3(**kwargs)
  params = draw(rng, jax.eval_shape(model.init, jax.random.key(0), x)['params'])
  sites = peftjax.describe(model, x)
  shapes = jax.eval_shape(
      lambda p: peftjax.init(method, jax.random.key(0), sites, p), params)
  return types.SimpleNamespace(
      model=model, x=x, params=params, sites=sites, method=method,
      theta=draw(rng, shapes, 1., 0.5))


def adapted(case):
  """(output, gradient of the sum of sines by theta)."""

  @jax.jit
  def run(theta):
    def loss(theta):
      y, _ = peftjax.apply(
          case.model, case.method, case.params, theta, case.x)
      return jnp.sin(y).sum(), y
    return jax.grad(loss, has_aux=True)(theta)

  grads, y = run(case.theta)
  return y, grads['ia3']


def inputs_of(*shape):
  return np.random.default_rng(9).normal(size=shape).astype(np.float32)


# ----------------------------------------------------------------- closed forms
def test_both_sides_by_hand():
  x = inputs_of(5, 8)
  case = made(nn.Dense(4, name='q'), x, sites=peftjax.select(kind='Dense'),
              inputs=())
  k, b = case.params['kernel'], case.params['bias']
  l = case.theta['ia3']['']['l']
  assert l.shape == (4,)
  y, _ = adapted(case)
  np.testing.assert_allclose(y, l * (x @ k + b), rtol=0, atol=1e-5)
  folded = peftjax.fold(case.method, case.params, case.theta, case.sites)
  np.testing.assert_allclose(folded['kernel'], k * l, rtol=1e-6)
  np.testing.assert_allclose(folded['bias'], b * l, rtol=1e-6)

  case = made(nn.Dense(4, name='q'), x, sites=peftjax.select(kind='Dense'),
              inputs='head')  # what puts out the model's output is its head
  k, b = case.params['kernel'], case.params['bias']
  l = case.theta['ia3']['']['l']
  assert l.shape == (8, 1)
  y, _ = adapted(case)
  np.testing.assert_allclose(y, (x * l[:, 0]) @ k + b, rtol=0, atol=1e-5)
  folded = peftjax.fold(case.method, case.params, case.theta, case.sites)
  np.testing.assert_allclose(folded['kernel'], np.diag(l[:, 0]) @ k, rtol=1e-6)
  np.testing.assert_array_equal(folded['bias'], b)


def test_is_the_attention_and_perceptron_of_the_paper():
  """softmax(q (l_k k)^T / sqrt(h)) (l_v v) and (l_ff relu(x W_1)) W_2."""
  case = made(Block(), inputs_of(3, 5, 8))
  theta = case.theta['ia3']
  assert set(theta) == {'attn/key', 'attn/value', 'down'}
  split = lambda name: theta[f'attn/{name}']['l'].reshape(2, 4)
  p = case.params
  project = lambda name: jnp.einsum(
      'btd,dhe->bthe', case.x, p['attn'][name]['kernel']) + (
          p['attn'][name]['bias'])
  q, k, v = map(project, ('query', 'key', 'value'))
  scores = jnp.einsum('bthe,bshe->bhts', q, split('key') * k) / np.sqrt(4)
  h = jnp.einsum('bhts,bshe->bthe', jax.nn.softmax(scores), split('value') * v)
  x = case.x + jnp.einsum('bthe,hed->btd', h, p['attn']['out']['kernel']) + (
      p['attn']['out']['bias'])
  h = jax.nn.relu(x @ p['up']['kernel'] + p['up']['bias'])
  want = (h * theta['down']['l'][:, 0]) @ p['down']['kernel'] + (
      p['down']['bias'])
  y, _ = adapted(case)
  np.testing.assert_allclose(y, want, rtol=0, atol=1e-5)
  assert np.abs(y - Block().apply({'params': p}, case.x)).max() > 0.1


@pytest.mark.parametrize('inputs', [(), ('two',), ('one', 'two')])
def test_convolutions_have_a_factor_a_channel(inputs):
  case = made(Images(), inputs_of(2, 7, 5, 3), inputs=inputs,
              sites=peftjax.select(kind='Conv'))
  widths = {n: case.theta['ia3'][n]['l'].shape for n in ('one', 'two')}
  assert widths == {n: (c, 1) if n in inputs else (d,) for n, c, d in (
      ('one', 3, 4), ('two', 4, 6))}
  y, _ = adapted(case)
  folded = peftjax.fold(case.method, case.params, case.theta, case.sites)
  np.testing.assert_allclose(
      y, case.model.apply({'params': folded}, case.x), rtol=0, atol=1e-5)
  for name, p in case.params.items():  # [kh, kw, c_in, c_out] by [c_in, 1]
    np.testing.assert_allclose(
        folded[name]['kernel'], p['kernel'] * case.theta['ia3'][name]['l'],
        rtol=1e-6)


def test_slices_of_a_fused_kernel_have_factors_of_their_own():

  class Fused(nn.Module):

    @nn.compact
    def __call__(self, x):
      q, k, v = jnp.split(nn.Dense(12, name='qkv')(x), 3, axis=-1)
      return nn.Dense(4, name='down')(q * k + v)

  case = made(Fused(), inputs_of(5, 8))
  assert set(case.theta['ia3']) == {'qkv[4:8]', 'qkv[8:12]', 'down'}
  l = np.concatenate([np.ones(4), *(
      case.theta['ia3'][f'qkv[{a}:{a + 4}]']['l'] for a in (4, 8))])
  folded = peftjax.fold(case.method, case.params, case.theta, case.sites)
  np.testing.assert_allclose(
      folded['qkv']['kernel'], case.params['qkv']['kernel'] * l, rtol=1e-6)
  np.testing.assert_allclose(
      folded['qkv']['bias'], case.params['qkv']['bias'] * l, rtol=1e-6)
  y, _ = adapted(case)
  np.testing.assert_allclose(
      y, Fused().apply({'params': folded}, case.x), rtol=0, atol=1e-5)


def test_starts_as_the_base_bit_for_bit_and_has_no_decay():
  case = made(Block(), inputs_of(3, 5, 8))
  theta = peftjax.init(case.method, jax.random.key(0), case.sites, case.params)
  y, base = jax.jit(lambda params, theta: (
      peftjax.apply(case.model, case.method, params, theta, case.x)[0],
      case.model.apply({'params': params}, case.x)))(case.params, theta)
  np.testing.assert_array_equal(y, base)
  assert case.method.labels == dict(l='no_decay')


def test_counts():
  """L (d_k + d_v + d_ff): 12 (768 + 768 + 3072) = 55,296 in ViT-B/16."""
  model = ViT(width=768, depth=12, heads=12, mlp_dim=3072, patch=16, scan=True)
  sites = peftjax.describe(
      model, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
  method = ia3()
  assert sum(method.count(s) * int(np.prod(s.stack))
             for s in sites.values() if method.sites(s)) == 55_296
  case = made(Block(), inputs_of(3, 5, 8))
  assert peftjax.count(case.theta) == 8 + 8 + 12 == sum(
      case.method.count(case.sites[p]) for p in case.theta['ia3'])


# -------------------------------------------------------------- another library
def put(torch, parameter, value):
  with torch.no_grad():
    assert parameter.numel() == np.size(value)
    parameter.copy_(torch.from_numpy(np.array(value)).reshape(parameter.shape))


def equals_peft(case, net, sizes, back, feedforward):
  """Output, gradients and merged weights of PEFT's IA3.

  Args:
    case: What `made` made.
    net: The same as a torch module; its weights are overwritten.
    sizes: Axes from our kernel to torch's.
    back: Axes from torch's activations to ours.
    feedforward: PEFT's feedforward_modules.
  """
  peft = pytest.importorskip('peft')
  torch = pytest.importorskip('torch')
  for name, p in case.params.items():
    put(torch, net.get_submodule(name).weight, p['kernel'].transpose(sizes))
    put(torch, net.get_submodule(name).bias, p['bias'])
  model = peft.get_peft_model(net, peft.IA3Config(
      target_modules=list(case.params), feedforward_modules=feedforward))
  factors = {n: model.base_model.model.get_submodule(n).ia3_l['default']
             for n in case.params}
  for name, t in case.theta['ia3'].items():
    assert (factors[name] == 1).all()  # the same start
    put(torch, factors[name], t['l'])
  y, grads = adapted(case)
  want = model(torch.from_numpy(case.x.transpose(np.argsort(back))))
  np.testing.assert_allclose(
      y, want.detach().numpy().transpose(back), rtol=0, atol=1e-5)
  torch.sin(want).sum().backward()
  for name, t in grads.items():
    g = factors[name].grad.numpy().reshape(t['l'].shape)
    np.testing.assert_allclose(t['l'], g, rtol=0, atol=1e-4 * np.abs(g).max())
  merged = model.merge_and_unload()
  folded = peftjax.fold(case.method, case.params, case.theta, case.sites)
  for name, p in folded.items():
    layer = merged.get_submodule(name)
    np.testing.assert_allclose(p['kernel'].transpose(sizes),
                               layer.weight.detach(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(p['bias'], layer.bias.detach(), rtol=0,
                               atol=1e-5)


@pytest.mark.parametrize('inputs, feedforward', [
    (('down',), ['down_proj']), ((r'(^|/)up_proj$',), ['up_proj']),
    (('up', r'down_pro'), ['up_proj', 'down_proj']), ((), [])])
def test_equals_peft_on_a_perceptron(inputs, feedforward):
  torch = pytest.importorskip('torch')
  case = made(Perceptron(), inputs_of(4, 12), inputs=inputs,
              sites=peftjax.select(kind='Dense'))
  net = torch.nn.Sequential()
  net.add_module('up_proj', torch.nn.Linear(12, 10))
  net.add_module('act', torch.nn.Tanh())
  net.add_module('down_proj', torch.nn.Linear(10, 6))
  equals_peft(case, net, (1, 0), (0, 1), feedforward)


@pytest.mark.parametrize('inputs', [(), ('two',)])
def test_equals_peft_on_convolutions(inputs):
  torch = pytest.importorskip('torch')
  case = made(Images(), inputs_of(2, 7, 5, 3), inputs=inputs,
              sites=peftjax.select(kind='Conv'))
  net = torch.nn.Sequential()
  net.add_module('one', torch.nn.Conv2d(3, 4, 2))
  net.add_module('act', torch.nn.Tanh())
  net.add_module('two', torch.nn.Conv2d(4, 6, (3, 2), (2, 1)))
  equals_peft(case, net, (3, 2, 0, 1), (0, 2, 3, 1), list(inputs))


# ----------------------------------------------------------------------- errors
class Odd(nn.Module):
  """Layers whose input cannot be scaled."""

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(5, 6, name='words')(ids)
    x = nn.Conv(6, (3,), feature_group_count=3, name='grouped')(x)
    return nn.LayerNorm(name='norm')(x)


def test_what_takes_ids_or_has_groups_is_scaled_on_the_output_side_alone():
  ids = np.array([[0, 3, 4, 3]])
  case = made(Odd(), ids, inputs=(), sites=peftjax.select(leaf='kernel'))
  y, _ = adapted(case)
  folded = peftjax.fold(case.method, case.params, case.theta, case.sites)
  np.testing.assert_allclose(y, Odd().apply({'params': folded}, ids), rtol=0,
                             atol=1e-5)
  for name in ('words', 'grouped'):
    with pytest.raises(ValueError, match=(
        f"'{name}'.* takes ids or has groups .*leave it out")):
      made(Odd(), ids, inputs=name, sites=peftjax.select(leaf='kernel'))


def test_refuses():
  x, dense = inputs_of(4, 12), peftjax.select(kind='Dense')
  with pytest.raises(ValueError, match=r"inputs='\(': expected a role"):
    ia3(inputs=('(',))
  with pytest.raises(ValueError, match='inputs=3: expected a role'):
    ia3(inputs=(3,))
  with pytest.raises(ValueError, match=(
      "inputs='down_prjo' matches none of its sites.*'down_proj'")):
    made(Perceptron(), x, inputs='down_prjo', sites=dense)
  with pytest.raises(ValueError, match="roles='k' matches no site"):
    made(Perceptron(), x)
  with pytest.raises(ValueError, match=r"'norm' \(LayerNorm\) has no kernel"):
    made(Odd(), np.array([[0, 3]]), sites=peftjax.select(roles='norm'))


def test_a_role_that_no_site_has_is_a_rule_without_a_case():
  case = made(Block(), inputs_of(3, 5, 8), sites=peftjax.select(roles='kv'))
  assert {t['l'].shape for t in case.theta['ia3'].values()} == {(8,)}
