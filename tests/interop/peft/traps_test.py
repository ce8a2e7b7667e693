"""The wrong conventions that are easy to take, each shown to be wrong."""

import json
import re

import jax
import numpy as np
import peftjax
from peftjax.artifact import save_adapter
from peftjax.interop.peft import reading
from peftjax.interop.peft import source as source_lib
import pytest
import safetensors.numpy

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')


def files(folder):
  return (json.loads((folder / 'adapter_config.json').read_text()),
          safetensors.numpy.load_file(folder / 'adapter_model.safetensors'))


def rewrite(folder, config=None, tensors=None):
  old, values = files(folder)
  (folder / 'adapter_config.json').write_text(json.dumps(config or old))
  safetensors.numpy.save_file(
      values if tensors is None else tensors,
      folder / 'adapter_model.safetensors', {'format': 'pt'})


def output(kit, source, methods, theta):
  return np.asarray(kit.our_output(source, methods, source.base.params, theta))


def far(kit, family, model, tmp_path):
  """Largest difference of the imported adapter from PEFT's model."""
  source, methods, theta = kit.imported(family, model, tmp_path)
  want = kit.torch_output(model, family.name).detach().numpy()
  return np.abs(output(kit, source, methods, theta) - want).max(), (
      source, methods, theta, want)


def test_square_kernels_are_transposed(family, kit, tmp_path):
  # query is 16 x 16: no shape tells A^T from A.
  fam = family('bert')
  model = kit.adapted(fam, peft.LoraConfig(r=16, target_modules=['query']), 1, .3)
  near, (source, methods, theta, want) = far(kit, fam, model, tmp_path)
  assert near < 1e-5
  wrong = {'lora': {p: dict(a=t['a'].T, b=t['b'].T)
                    for p, t in theta['lora'].items()}}
  wrong = {**theta, **wrong}
  assert np.abs(output(kit, source, methods, wrong) - want).max() > 1e-3


def test_exact_and_neumann_turn_opposite_ways(family, kit, tmp_path):
  fam = family('vit')
  for i, neumann in enumerate((False, True)):
    model = kit.adapted(fam, peft.OFTConfig(
        oft_block_size=4, target_modules=['q_proj', 'fc1'],
        use_cayley_neumann=neumann), 1, 0.1)
    (tmp_path / str(i)).mkdir()
    near, (source, methods, theta, want) = far(
        kit, fam, model, tmp_path / str(i))
    assert near < 1e-5
    wrong = {'oft': {p: dict(q=-t['q']) for p, t in theta['oft'].items()}}
    assert np.abs(output(kit, source, methods, wrong) - want).max() > 1e-3


def test_coft_radius_is_shared_out_over_the_blocks(family, kit, tmp_path):
  fam = family('bert')
  model = kit.adapted(fam, peft.OFTConfig(
      oft_block_size=4, target_modules=['query'], coft=True, eps=0.05), 1, 0.3)
  kit.torch_output(model, 'bert')  # PEFT projects when it runs
  source, methods, theta = kit.imported(fam, model, tmp_path)
  assert methods[0].spec['eps'] == 0.05
  projected = methods[0].after_step(theta['coft'])
  for path, t in theta['coft'].items():  # on the sphere already: nothing moves
    np.testing.assert_allclose(projected[path]['q'], t['q'], rtol=1e-5)
    norms = np.sqrt(2 * (np.asarray(t['q']) ** 2).sum(-1))
    np.testing.assert_allclose(norms, 0.05 / np.sqrt(len(norms)), rtol=1e-4)


def test_boft_with_factors_is_not_what_peft_without_its_extension_has(
    family, kit, tmp_path):
  fam = family('bert')
  source = source_lib.open_base(fam.folder)
  methods = (peftjax.load('orthogonal.boft', block_size=4, factors=2,
                          sites=dict(path='query')),)
  theta = peftjax.init(methods, jax.random.key(0), source.sites,
                       source.base.params)
  save_adapter(tmp_path / 'a', methods, theta, source.sites, source.base.params,
               base=dict(weights=fam.folder, head='classify'))
  kit.export_adapter(tmp_path / 'a', tmp_path / 'b')
  config, tensors = files(tmp_path / 'b')
  assert config['boft_n_butterfly_factor'] == 2
  r = [v for n, v in tensors.items() if n.endswith('boft_R')]
  assert all(v.shape == (2, 4, 4, 4) for v in r)
  if not torch.cuda.is_available():  # it says so, and loads nothing
    with pytest.raises(RuntimeError, match='size mismatch'):
      kit.reopened(fam, tmp_path / 'b')


def test_dora_norms_run_over_the_inputs(family, kit, tmp_path):
  fam = family('bert')
  model = kit.adapted(fam, peft.LoraConfig(
      r=2, use_dora=True, target_modules=['query']), 1, 0.3)
  near, (source, methods, theta, want) = far(kit, fam, model, tmp_path)
  assert near < 1e-5
  p, t = next(iter(theta['dora'].items()))
  kernel = np.asarray(source.flat[f'{p}/kernel'])
  kernel = kernel + 8 / 2 * np.asarray(t['a']) @ np.asarray(t['b'])
  folded = peftjax.fold(methods, source.base.params, theta, source.sites)
  got = np.asarray(peftjax.trees.flatten(folded)[f'{p}/kernel'])
  np.testing.assert_allclose(np.linalg.norm(got, axis=0), np.abs(t['m']),
                             rtol=1e-5)
  wrong = kernel * np.asarray(t['m'])[:, None] / np.linalg.norm(
      kernel, axis=1, keepdims=True)
  assert np.abs(wrong - got).max() > 1e-2


def test_slices_of_a_fused_kernel_become_one_adapter(family, kit, tmp_path):
  fam = family('gpt2')
  source = source_lib.open_base(fam.folder)
  methods = (peftjax.load('lowrank.lora', rank=2, alpha=6., sites=dict(
      roles='qv')),)
  theta = peftjax.init(methods, jax.random.key(0), source.sites,
                       source.base.params)
  keys = iter(jax.random.split(jax.random.key(1), 99))
  theta = jax.tree.map(
      lambda v: v + 0.3 * jax.random.normal(next(keys), v.shape), theta)
  save_adapter(tmp_path / 'a', methods, theta, source.sites, source.base.params,
               base=dict(weights=fam.folder, head='lm'))
  kit.export_adapter(tmp_path / 'a', tmp_path / 'b')
  config, tensors = files(tmp_path / 'b')
  assert config['r'] == 4 and config['lora_alpha'] == 12
  b = tensors['base_model.model.transformer.h.0.attn.c_attn.lora_B.weight']
  assert b.shape == (48, 4) and not b[16:32].any()
  there = kit.torch_output(kit.reopened(fam, tmp_path / 'b'), 'gpt2')
  np.testing.assert_allclose(
      kit.real('gpt2', output(kit, source, methods, theta)),
      kit.real('gpt2', there.detach().numpy()), atol=1e-5)


def test_a_tied_table_is_adapted_where_it_decodes_too(family, kit, tmp_path):
  fam = family('gpt2')
  source = source_lib.open_base(fam.folder)
  methods = (peftjax.load('lowrank.lora', rank=2, sites=dict(path='tokens$')),)
  theta = peftjax.init(methods, jax.random.key(0), source.sites,
                       source.base.params)
  theta = jax.tree.map(
      lambda v: v + 0.02 * jax.random.normal(jax.random.key(1), v.shape), theta)
  save_adapter(tmp_path / 'a', methods, theta, source.sites, source.base.params,
               base=dict(weights=fam.folder, head='lm'))
  kit.export_adapter(tmp_path / 'a', tmp_path / 'b')
  there = kit.torch_output(kit.reopened(fam, tmp_path / 'b'), 'gpt2')
  np.testing.assert_allclose(
      kit.real('gpt2', output(kit, source, methods, theta)),
      kit.real('gpt2', there.detach().numpy()), atol=1e-5)
  # PEFT saves adapted tables, and their decoders, whole beside the adapter.
  with pytest.warns(UserWarning, match='save_embedding_layers'):
    kit.reopened(fam, tmp_path / 'b').save_pretrained(tmp_path / 'whole')
  assert any(n.endswith('lm_head.base_layer.weight')
             for n in files(tmp_path / 'whole')[1])
  reading.convert_adapter(tmp_path / 'whole', tmp_path / 'back', fam.folder)
  back = source_lib.open_adapter(tmp_path / 'back')[1].theta
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(theta), strict=True):
    np.testing.assert_array_equal(a, b)
  # Without the decoder's half PEFT would compute another function.
  config, tensors = files(tmp_path / 'b')
  half = {n: v for n, v in tensors.items() if 'lm_head' not in n}
  rewrite(tmp_path / 'b', dict(config, target_modules=['wte']), half)
  with pytest.raises(ValueError, match='lm_head'):
    reading.convert_adapter(tmp_path / 'b', tmp_path / 'c', fam.folder)
  assert not (tmp_path / 'c').exists()


def test_names_of_both_generations_of_transformers(family, kit, tmp_path):
  fam = family('vit')
  model = kit.adapted(fam, peft.LoraConfig(target_modules=['q_proj', 'fc1']))
  source, methods, theta = kit.imported(fam, model, tmp_path)
  kit.export_adapter(tmp_path / 'ours', tmp_path / 'old', transformers=4)
  _, tensors = files(tmp_path / 'old')
  assert ('base_model.model.vit.encoder.layer.1.attention.attention.query.'
          'lora_A.weight') in tensors
  reading.convert_adapter(tmp_path / 'old', tmp_path / 'back', fam.folder)
  back = source_lib.open_adapter(tmp_path / 'back')[1].theta
  for p, t in theta['lora'].items():
    np.testing.assert_array_equal(t['a'], back['lora'][p]['a'])


def test_patterns_have_the_names_of_the_tensors(family, kit, tmp_path):
  fam = family('vit')
  model = kit.adapted(fam, peft.LoraConfig(
      r=2, target_modules=['q_proj', 'v_proj', 'fc1'], rank_pattern=dict(fc1=3),
      alpha_pattern=dict(q_proj=12)))
  source, methods, theta = kit.imported(fam, model, tmp_path)
  kit.export_adapter(tmp_path / 'ours', tmp_path / 'old', transformers=4)
  config, tensors = files(tmp_path / 'old')
  assert sorted(config['alpha_pattern']) == [
      f'vit.encoder.layer.{i}.attention.attention.query' for i in (0, 1)]
  for name in (*config['alpha_pattern'], *config['rank_pattern']):
    assert f'base_model.model.{name}.lora_A.weight' in tensors
  reading.convert_adapter(tmp_path / 'old', tmp_path / 'back', fam.folder)
  _, back, _ = source_lib.open_adapter(tmp_path / 'back')
  np.testing.assert_array_equal(
      output(kit, source, methods, theta),
      output(kit, source, back.methods, back.theta))


def test_layers_of_unlike_alphas_are_not_stacked(family, kit, tmp_path):
  fam = family('llama')
  model = kit.adapted(fam, peft.LoraConfig(
      r=2, target_modules=['q_proj'],
      alpha_pattern={'layers.0.self_attn.q_proj': 16}))
  kit.imported(fam, model, tmp_path)
  with pytest.raises(ValueError, match='differ in alpha_pattern'):
    reading.convert_adapter(tmp_path / 'theirs', tmp_path / 'stacked',
                            fam.folder, scan=True)
  assert not (tmp_path / 'stacked').exists()


def test_equal_scales_may_differ_by_rounding(family, kit, tmp_path):
  """What EVA's alphas give at the ranks it shares out, in one fused kernel."""
  fam = family('gpt2')
  source = source_lib.open_base(fam.folder)
  parts = [p for p in source.sites if p.startswith('block_0/attn/qkv[')]
  ranks = dict(zip(parts, (2, 7, 6)))
  exactly = lambda values: tuple(
      (f'^{re.escape(p)}$', v) for p, v in values.items())
  alphas = {p: 8 / 6 ** 0.5 * r ** 0.5 for p, r in ranks.items()}
  assert len({alphas[p] / r ** 0.5 for p, r in ranks.items()}) > 1
  method = peftjax.load(
      'lowrank.lora', rank=6, scaling='rslora', rank_pattern=exactly(ranks),
      alpha_pattern=exactly(alphas), sites=dict(path=tuple(
          f'^{re.escape(p)}$' for p in parts)))
  theta = peftjax.init(method, jax.random.key(0), source.sites,
                       source.base.params)
  theta = jax.tree.map(lambda v: v + 0.1 * jax.random.normal(
      jax.random.key(1), v.shape), theta)
  save_adapter(tmp_path / 'a', (method,), theta, source.sites,
               source.base.params, base=dict(weights=fam.folder, head='lm'))
  kit.export_adapter(tmp_path / 'a', tmp_path / 'b')
  there = kit.torch_output(kit.reopened(fam, tmp_path / 'b'), 'gpt2')
  np.testing.assert_allclose(
      kit.real('gpt2', there.detach().numpy()),
      kit.real('gpt2', output(kit, source, (method,), theta)), atol=1e-5)


def test_a_mixture_keeps_its_router(family, kit, tmp_path):
  fam = family('mixtral')
  source = source_lib.open_base(fam.folder)
  assert all('router' not in m.path and 'experts' not in m.path
             for m in source.names.modules.values())
  with pytest.raises(ValueError, match='cannot carry a PEFT adapter'):
    source.names.module('block_0/mlp/experts/up')
  with pytest.raises(ValueError, match="no counterpart .* did you mean"):
    source.names.module('block_0/attn/querry')
