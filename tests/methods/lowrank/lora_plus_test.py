"""LoRA+: sizes of steps, and the parameter groups of Hugging Face PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax
from peftjax import config as config_lib
from peftjax import optim
import pytest

ETA = 0.01


def load(case, name='lora_plus', **kwargs):
  return peftjax.load(f'lowrank.{name}',
                      **{'rank': 2, 'alpha': 3.0, 'sites': case.chosen,
                         **kwargs})


def config(ratio=None, **changes):
  c = config_lib.defaults().optim
  c.lr, c.schedule, c.warmup, c.clip = ETA, 'constant', 0.0, 0.0
  c.groups.fast.lr = ratio
  for key, value in changes.items():
    c[key] = value
  return c


def trained(case, methods, theta, c, steps):
  """Theta after every step, and the gradients of each."""
  part, frozen = peftjax.partition(methods, theta)
  tx = optim.make(c, methods, part, steps)
  state, thetas, grads = tx.init(part), [part], []

  @jax.jit
  @jax.grad
  def gradient(part):
    y, _ = peftjax.apply(case.model, methods, case.params,
                         peftjax.combine(part, frozen), case.x)
    return jnp.sin(y).sum()

  for _ in range(steps):
    grads.append(gradient(part))
    updates, state = tx.update(grads[-1], state, part)
    part = optax.apply_updates(part, updates)
    thetas.append(part)
  return thetas, grads


# ----------------------------------------------------------------- closed forms
@pytest.mark.parametrize('given, ratio', [(None, 16), (4.0, 4), (80.0, 80)])
def test_first_step_of_adam_is_eta_for_a_and_ratio_times_eta_for_b(
    case, moved, given, ratio):
  c = case('mlp')
  method = load(c)
  (before, after), grads = trained(
      c, method, moved(method, c), config(given, eps=0.0), 1)
  for site, t in after['lora_plus'].items():
    for leaf, size in (('a', ETA), ('b', ratio * ETA)):
      g = grads[0]['lora_plus'][site][leaf]
      assert np.abs(g).min() > 0
      np.testing.assert_allclose(
          t[leaf] - before['lora_plus'][site][leaf], -size * np.sign(g),
          rtol=1e-4)


def test_ratio_one_is_lora_to_the_bit(case):
  c = case('mlp')
  runs = {}
  for name in ('lora', 'lora_plus'):
    method = load(c, name)
    theta = peftjax.init(method, jax.random.key(0), c.sites, c.params)
    thetas, _ = trained(c, method, theta, config(1.0, weight_decay=0.1), 4)
    runs[name] = thetas[-1][name]
  jax.tree.map(np.testing.assert_array_equal, *runs.values())


def test_with_clipping_each_factor_has_a_norm_of_its_own(case, moved):
  """Ratio 1 is then plain LoRA but for the norms it is clipped by."""
  c = case('mlp')
  method = load(c)
  part, _ = peftjax.partition(method, moved(method, c))
  tx = optim.make(config(1.0, clip=1.0), method, part, 1)
  grads = jax.tree.map(lambda v: jnp.full(v.shape, 100.0), part)
  _, state = tx.update(grads, tx.init(part), part)
  for group in ('', 'fast'):
    moments = jax.tree.leaves(
        optax.tree_utils.tree_get(state.inner_states[group], 'mu'))
    np.testing.assert_allclose(  # the first moment is 0.1 of what was clipped
        np.sqrt(sum(np.square(m).sum() for m in moments)), 0.1, rtol=1e-5)


def test_a_schedule_multiplies_both(case, moved):
  """A step of half the factor is half as large, in A and in B."""
  c = case('mlp')
  method = load(c)
  conf = config(4.0, eps=0.0, schedule='linear', b1=0.0, b2=0.0)
  thetas, _ = trained(c, method, moved(method, c), conf, 4)
  for i, factor in enumerate((1, 0.75, 0.5, 0.25)):
    new, old = (thetas[j]['lora_plus']['one'] for j in (i + 1, i))
    for leaf, size in (('a', ETA), ('b', 4 * ETA)):
      np.testing.assert_allclose(
          np.abs(new[leaf] - old[leaf]), factor * size, rtol=1e-3)


def test_a_new_head_takes_the_plain_rate(case, moved):
  c = case('mlp')
  methods = (load(c, sites=peftjax.select(path='one')),
             peftjax.load('selective.full', group='head',
                          sites=peftjax.select(path='two')))
  (before, after), _ = trained(
      c, methods, moved(methods, c), config(eps=0.0), 1)
  head = jax.tree.map(lambda new, old: np.abs(new - old), after['full'],
                      before['full'])['two']
  for leaf in ('kernel', 'bias'):
    np.testing.assert_allclose(head[leaf], ETA, rtol=1e-4)


def test_is_lora_but_for_the_labels(case, moved):
  c = case('mlp')
  plus, plain = load(c), load(c, 'lora')
  assert plus.labels == dict(b='fast') and plain.labels == {}
  assert plus.count(c.sites['one']) == plain.count(c.sites['one'])
  theta = moved(plus, c)
  got, _ = peftjax.apply(c.model, plus, c.params, theta, c.x)
  want, _ = peftjax.apply(
      c.model, plain, c.params, {'lora': theta['lora_plus']}, c.x)
  np.testing.assert_array_equal(got, want)


# ------------------------------------------------------------- another library
@pytest.fixture
def pefts(case, twin):
  """(the same model in PEFT, its optimiser for LoRA+, ratio 16)."""
  torch = pytest.importorskip('torch')
  optimizers = pytest.importorskip('peft.optimizers')

  def make(c, **options):
    other = twin(c, r=2, lora_alpha=3, **options)
    return other, optimizers.create_loraplus_optimizer(
        other.model, torch.optim.AdamW, lr=ETA, loraplus_lr_ratio=16,
        loraplus_weight_decay=0.1, eps=1e-8)

  return make


def test_groups_are_pefts(case, pefts):
  c = case('mlp')
  other, optimizer = pefts(c, bias='lora_only')
  method = load(c)
  rates = {id(p): (g['lr'], g['weight_decay'])
           for g in optimizer.param_groups for p in g['params']}
  settings = optim.settings(config(weight_decay=0.1), {'', 'fast'})
  for name, parts in other.parts.items():
    for leaf, parameter in parts.items():
      mine = settings[method.labels.get(leaf, '')]
      assert rates[id(parameter)] == (mine['lr'], mine['weight_decay'])
    # Where PEFT differs: a bias has the rate of B, and no decay.
    assert rates[id(other.layers[name].base_layer.bias)] == (16 * ETA, 0.0)


def test_steps_are_pefts(case, moved, pefts):
  torch = pytest.importorskip('torch')
  c = case('mlp')
  other, optimizer = pefts(c)
  method = load(c)
  theta = moved(method, c)
  other.put(theta['lora_plus'])
  thetas, _ = trained(c, method, theta, config(weight_decay=0.1), 3)
  for _ in range(3):
    optimizer.zero_grad()
    torch.sin(other.run(c.x)).sum().backward()
    optimizer.step()
  for name, parts in other.parts.items():
    for leaf, parameter in parts.items():
      np.testing.assert_allclose(
          thetas[-1]['lora_plus'][name][leaf], other.matrix(parameter),
          rtol=0, atol=1e-4, err_msg=f'{name}/{leaf}')
