"""LoRA that starts at factors of the kernel: written against the whole kernel."""

import json

import jax
import numpy as np
import peftjax
from peftjax.artifact import save_adapter
from peftjax.interop.peft import source as source_lib
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


@pytest.mark.parametrize('name', ['pissa', 'olora'])
def test_read_from_peft(family, kit, tmp_path, name):
  fam = family('llama')
  model = kit.adapted(fam, peft.LoraConfig(
      r=3, lora_alpha=6, init_lora_weights=name,
      target_modules=['q_proj', 'down_proj']))
  source, methods, theta = kit.imported(fam, model, tmp_path)
  assert methods[0].spec['name'] == f'lowrank.{name}'
  want = kit.torch_output(model, 'llama').detach().numpy()
  got = np.asarray(kit.our_output(source, methods, source.base.params, theta))
  np.testing.assert_allclose(kit.real('llama', got), kit.real('llama', want),
                             atol=1e-5)
