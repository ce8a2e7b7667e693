"""LoRA that starts at factors of the kernel, or beside a rounded one."""

import json

import jax
import numpy as np
import peftjax
from peftjax.artifact import save_adapter
from peftjax.interop.peft import source as source_lib
from peftjax.interop.peft.types import lora
from peftjax.ops import quantise
import pytest

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')


@pytest.mark.parametrize('name', ['pissa', 'olora'])
def test_written_against_the_original_base(family, kit, tmp_path, name):
  fam = family('llama')
  source = source_lib.open_base(fam.folder)
  for scaling in ('lora', 'rslora'):
    methods = (peftjax.load(f'lowrank.{name}', rank=3, alpha=6.,
                            scaling=scaling, sites=dict(roles='qv')),)
    theta = peftjax.init(methods, jax.random.key(0), source.sites,
                         source.base.params)
    trained, frozen = peftjax.partition(methods, theta)
    keys = iter(jax.random.split(jax.random.key(1), 50))
    trained = jax.tree.map(lambda v: v + 0.1 * jax.random.normal(
        next(keys), v.shape), trained)
    theta = peftjax.combine(trained, frozen)
    save_adapter(tmp_path / 'a', methods, theta, source.sites,
                 source.base.params, base=dict(weights=fam.folder, head='lm'))
    kit.export_adapter(tmp_path / 'a', tmp_path / 'b')
    config = json.loads((tmp_path / 'b' / 'adapter_config.json').read_text())
    assert config['r'] == 6 and config['init_lora_weights'] is True
    ours = np.asarray(kit.our_output(
        source, methods, source.base.params, theta))
    there = kit.torch_output(kit.reopened(fam, tmp_path / 'b'), 'llama')
    np.testing.assert_allclose(kit.real('llama', there.detach().numpy()),
                               kit.real('llama', ours), atol=1e-5)


@pytest.mark.parametrize('name, base, targets', [
    ('pissa', 'llama', ['q_proj', 'down_proj']),
    ('olora', 'llama', ['q_proj', 'down_proj']),
    ('pissa', 'gpt2', ['attn.c_proj', 'c_fc'])])
def test_read_from_peft(family, kit, tmp_path, name, base, targets):
  fam = family(base)
  model = kit.adapted(fam, peft.LoraConfig(
      r=3, lora_alpha=6, init_lora_weights=name, target_modules=targets,
      fan_in_fan_out=base == 'gpt2'))
  source, methods, theta = kit.imported(fam, model, tmp_path)
  assert methods[0].spec['name'] == f'lowrank.{name}'
  want = kit.torch_output(model, base).detach().numpy()
  got = np.asarray(kit.our_output(source, methods, source.base.params, theta))
  np.testing.assert_allclose(kit.real(base, got), kit.real(base, want),
                             atol=1e-5)


@pytest.mark.parametrize('name, base, target, kind', [
    ('pissa', 'llama', 'embed_tokens', 'embedding'),
    ('olora', 'gpt2', 'attn.c_proj', 'conv1d')])
def test_not_read_where_peft_leaves_the_base_or_turns_it(
    family, kit, tmp_path, name, base, target, kind):
  fam = family(base)
  model = kit.adapted(fam, peft.LoraConfig(
      r=3, init_lora_weights=name, target_modules=[target],
      fan_in_fan_out=base == 'gpt2'))
  with pytest.raises(ValueError, match=f'{name} of a module of kind {kind!r}'):
    kit.imported(fam, model, tmp_path)
  assert not (tmp_path / 'ours').exists()


def _rounded(weight):
  """A torch weight in NF4: runs of 64 of its entries as they lie."""
  flat, book = weight.reshape(-1), quantise.normal_float(4)
  out = np.zeros_like(flat)
  for at in range(0, flat.size, 64):
    run = flat[at:at + 64]
    top = np.abs(run).max()
    codes = np.abs(run[:, None] / top - book).argmin(1)
    out[at:at + 64] = book[codes] * top
  return out.reshape(weight.shape)


@pytest.mark.parametrize('scan', [False, True])
def test_loftq_is_read_with_the_kernels_that_peft_rounds(
    family, kit, tmp_path, scan):
  """PEFT rounds them on a GPU only, when it makes or loads the adapter."""
  fam = family('llama')
  model = kit.adapted(fam, peft.LoraConfig(
      r=3, lora_alpha=6, target_modules=['q_proj', 'down_proj']))
  for layer in model.modules():
    if isinstance(layer, peft.tuners.lora.Linear):
      with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(_rounded(layer.weight.numpy())))
  start = model.peft_config['default']
  start.init_lora_weights = 'loftq'
  start.loftq_config = dict(loftq_bits=4, loftq_iter=1)
  source, methods, theta = kit.imported(fam, model, tmp_path, scan=scan)
  assert methods[0].spec['name'] == 'quantised.loftq'
  want = kit.torch_output(model, 'llama').detach().numpy()
  got = np.asarray(kit.our_output(source, methods, source.base.params, theta))
  np.testing.assert_allclose(kit.real('llama', got), kit.real('llama', want),
                             atol=1e-5)


def test_loftq_beside_its_rounded_base_is_a_lora(
    family, kit, tmp_path):
  fam = family('llama')
  model = kit.adapted(fam, peft.LoraConfig(r=3, target_modules=['q_proj']))
  model.peft_config['default'].loftq_config = dict(loftq_bits=2, loftq_iter=5)
  _, methods, _ = kit.imported(fam, model, tmp_path)
  assert methods[0].spec['name'] == 'lowrank.lora'


@pytest.mark.parametrize('settings', [
    dict(loftq_bits=8, loftq_iter=1), dict(loftq_bits=4, loftq_iter=5)])
def test_other_loftq_is_refused(settings):
  with pytest.raises(ValueError, match=(
      'loftq_bits=%(loftq_bits)d, loftq_iter=%(loftq_iter)d: expected 4 and 1'
      % settings)):
    lora.read({**lora.CONFIG, 'init_lora_weights': 'loftq',
               'loftq_config': settings}, {}, None, None)
