"""Anything foldable as a LoRA: what is kept, what is lost, what is told."""

import jax
import numpy as np
import peftjax
from peftjax.artifact import save_adapter
from peftjax.interop.peft import as_lora
from peftjax.interop.peft import reading
from peftjax.interop.peft import source as source_lib
from peftjax import trees
import pytest
import safetensors.numpy

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')


def saved(tmp_path, folder, methods, scale=0.2, **options):
  """Options are of `open_base`, such as scan."""
  source = source_lib.open_base(folder, **options)
  theta = peftjax.init(methods, jax.random.key(0), source.sites,
                       source.base.params)
  keys = iter(jax.random.split(jax.random.key(1), 200))
  trained, frozen = peftjax.partition(methods, theta)
  trained = jax.tree.map(lambda v: v + scale * jax.random.normal(
      next(keys), v.shape), trained)
  theta = peftjax.combine(trained, frozen)
  save_adapter(tmp_path / 'a', methods, theta, source.sites, source.base.params,
               base=dict(weights=folder, head=source.base.model.head,
                         **options))
  return source, theta


def test_the_nearest_matrix_of_a_rank():
  w = np.random.default_rng(0).normal(size=(12, 9))
  t, kept, whole = as_lora.nearest(w, 4)
  s = np.linalg.svd(w, compute_uv=False)
  assert t['a'].shape == (12, 4) and t['b'].shape == (4, 9)
  np.testing.assert_allclose(np.linalg.norm(w - t['a'] @ t['b']) ** 2,
                             (s[4:] ** 2).sum(), rtol=1e-5)
  np.testing.assert_allclose([kept, whole], [(s[:4] ** 2).sum(), (w ** 2).sum()])
  low, *_ = as_lora.nearest(w[:, :2] @ w[:2], 8)  # of rank 2: no more is kept
  assert low['a'].shape[1] == 2


@pytest.mark.parametrize('name', ['bert', 'gpt2'])
def test_full_rank_loses_nothing(family, kit, tmp_path, name):
  fam = family(name)
  methods = (peftjax.load('orthogonal.oft', block_size=4),
             peftjax.load('lowrank.lora', rank=2, sites=dict(roles='v')))
  source, theta = saved(tmp_path, fam.folder, methods)
  report = as_lora.export_lora(tmp_path / 'a', tmp_path / 'b', 16)
  assert report['residual'] < 1e-6
  assert all(s['rank'] <= 16 for s in report['sites'].values())
  ours = np.asarray(kit.our_output(source, methods, source.base.params, theta))
  there = kit.torch_output(kit.reopened(fam, tmp_path / 'b'), name)
  np.testing.assert_allclose(kit.real(name, there.detach().numpy()),
                             kit.real(name, ours), atol=1e-5)


@pytest.mark.parametrize('scan', [False, True])
def test_layers_of_unlike_ranks(family, kit, tmp_path, scan):
  fam = family('llama')
  methods = (peftjax.load('lowrank.lora', rank=2, alpha=6., rank_pattern=(
      ('query', 4),)),)
  source, theta = saved(tmp_path, fam.folder, methods, scan=scan)
  report = as_lora.export_lora(tmp_path / 'a', tmp_path / 'b', 16)
  assert {s['rank'] for s in report['sites'].values()} == {2, 4}
  ours = np.asarray(kit.our_output(source, methods, source.base.params, theta))
  there = kit.torch_output(kit.reopened(fam, tmp_path / 'b'), 'llama')
  np.testing.assert_allclose(kit.real('llama', there.detach().numpy()),
                             kit.real('llama', ours), atol=1e-5)


def test_a_base_in_bfloat16(family, tmp_path):
  """The change is that of float32, and the adapter finds its base again."""
  fam = family('llama')
  methods = (peftjax.load('lowrank.lora', rank=2, alpha=2., sites=dict(
      roles='qv')),)
  _, theta = saved(tmp_path, fam.folder, methods, scale=0.01,
                   param_dtype='bfloat16')
  report = as_lora.export_lora(tmp_path / 'a', tmp_path / 'b', 8)
  assert {s['rank'] for s in report['sites'].values()} == {2}
  reading.convert_adapter(tmp_path / 'b', tmp_path / 'c', fam.folder)
  source, back, _ = source_lib.open_adapter(tmp_path / 'c')
  assert source.param_dtype == 'bfloat16'
  for path, t in theta['lora'].items():
    got = back.theta['lora'][path]
    np.testing.assert_allclose(got['a'] @ got['b'], t['a'] @ t['b'],
                               atol=1e-7)
  file = tmp_path / 'b' / 'adapter_model.safetensors'
  safetensors.numpy.save_file(safetensors.numpy.load_file(file), file,
                              {'peftjax.param_dtype': 'bfloat61'})
  with pytest.raises(ValueError, match="'bfloat61'.*bfloat16"):
    reading.convert_adapter(tmp_path / 'b', tmp_path / 'd', fam.folder)
  assert not (tmp_path / 'd').exists()


def test_the_loss_is_what_it_says(family, kit, tmp_path):
  fam = family('bert')
  methods = (peftjax.load('scaling.ssf'),)
  source, theta = saved(tmp_path, fam.folder, methods)
  report = as_lora.export_lora(tmp_path / 'a', tmp_path / 'b', 2)
  assert report['sites']['block_0/attn/query']['rank'] == 2
  folded = trees.flatten(peftjax.fold(
      methods, source.base.params, theta, source.sites))
  plain = {n.replace('.lora_A', ''): p for n, p in kit.reopened(
      fam, tmp_path / 'b').merge_and_unload().named_parameters()}
  lost = total = 0.
  for path, site in report['sites'].items():
    module, _ = source.names.module(path)
    change = folded[f'{path}/kernel'] - source.flat[f'{path}/kernel']
    got = plain[f'{module.name}.weight'].detach().numpy().T
    gap = np.linalg.norm(folded[f'{path}/kernel'] - got)
    np.testing.assert_allclose(site['residual'], gap / np.linalg.norm(change),
                               rtol=1e-3)
    lost, total = lost + gap ** 2, total + np.linalg.norm(change) ** 2
    # Biases and norms go along as they are.
    np.testing.assert_allclose(
        plain[f'{module.name}.bias'].detach().numpy(), folded[f'{path}/bias'],
        atol=1e-6)
  np.testing.assert_allclose(report['residual'], np.sqrt(lost / total),
                             rtol=1e-3)
  np.testing.assert_allclose(
      plain['bert.encoder.layer.0.output.LayerNorm.weight'].detach().numpy(),
      folded['block_0/norm2/scale'], atol=1e-6)


def test_what_no_lora_can_be(family, tmp_path):
  folder = family('llama').folder
  saved(tmp_path, folder, (peftjax.load('prompts.prompt_tuning', length=2),))
  with pytest.raises(ValueError, match='no fold'):
    as_lora.export_lora(tmp_path / 'a', tmp_path / 'b', 2)
  saved(tmp_path, folder, (peftjax.load('selective.ln_tuning'),))
  with pytest.raises(ValueError, match='no kernel changed'):
    as_lora.export_lora(tmp_path / 'a', tmp_path / 'b', 2)
  assert not (tmp_path / 'b').exists()
