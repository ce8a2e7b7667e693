"""Adapters against PEFT itself: outputs, gradients, training, files."""

import jax
import numpy as np
from peftjax import theta as theta_lib
from peftjax.artifact import save_adapter
from peftjax.interop.peft import reading
from peftjax.interop.peft import source as source_lib
from peftjax.method import as_methods
import pytest
import safetensors.numpy

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')

# family -> (modules with kernels, norms, (IA)^3 modules and the fed ones).
TARGETS = {
    'bert': (['query', 'value', 'intermediate.dense'], ['LayerNorm'],
             ['key', 'value', 'output.dense'], ['output.dense']),
    'roberta': (['query', 'value'], ['LayerNorm'], ['key', 'output.dense'],
                ['output.dense']),
    'distilbert': (['q_lin', 'lin2'], ['sa_layer_norm'], ['k_lin', 'lin2'],
                   ['lin2']),
    'electra': (['key', 'output.dense'], ['LayerNorm'], ['key', 'value'], []),
    'gpt2': (['c_attn', 'c_proj'], ['ln_1', 'ln_f'], ['c_attn', 'mlp.c_proj'],
             ['mlp.c_proj']),
    'llama': (['q_proj', 'down_proj'], ['norm', 'input_layernorm'],
              ['k_proj', 'v_proj', 'down_proj'], ['down_proj']),
    'mistral': (['v_proj', 'gate_proj'], ['norm'], ['k_proj'], []),
    'qwen2': (['k_proj', 'up_proj'], ['norm'], ['k_proj'], []),
    'qwen3': (['q_proj', 'o_proj'], ['q_norm'], ['k_proj'], []),
    'gemma2': (['q_proj', 'up_proj'], ['pre_feedforward_layernorm'],
               ['v_proj', 'down_proj'], ['down_proj']),
    'mixtral': (['q_proj', 'v_proj'], ['input_layernorm'], ['k_proj'], []),
    't5': (['q', 'v', 'wo'], ['layer_norm'], ['k', 'v', 'wo'], ['wo']),
    'vit': (['q_proj', 'fc2'], ['layernorm_before'], ['k_proj', 'fc2'], ['fc2']),
    'deit': (['v_proj', 'fc1'], ['layernorm_after'], ['k_proj', 'fc2'], ['fc2']),
    'dinov2': (['q_proj', 'gate_proj', 'down_proj'], ['norm1'],
               ['k_proj', 'down_proj'], ['down_proj']),
    'clip': (['q_proj', 'fc1', 'visual_projection'], ['layer_norm1'],
             ['k_proj', 'fc2'], ['fc2']),
    'resnet': (['convolution'], None, ['convolution'], []),
    'convnext': (['pwconv1', 'downsampling_layer.1'], ['layernorm'],
                 ['pwconv2'], ['pwconv2']),
}
KINDS = ('lora', 'dora', 'oft', 'boft', 'ia3', 'ln')
# What PEFT does not have, and functions that it computes otherwise.
ABSENT = {
    ('gpt2', 'oft'): "PEFT's OFT refuses GPT-2's Conv1D",
    ('gpt2', 'boft'): "PEFT's BOFT refuses GPT-2's Conv1D",
    ('resnet', 'oft'): "PEFT's OFT of a convolution adds overlaps up",
    ('convnext', 'oft'): "PEFT's OFT of a convolution adds overlaps up",
    ('resnet', 'ln'): "a batch norm's statistics are folded into our scale",
}
LOWRANK = ('adalora', 'delora', 'kasa', 'vera')
CASES = [(f, k) for f in TARGETS for k in KINDS if (f, k) not in ABSENT] + [
    (f, k) for f in ('bert', 'llama') for k in LOWRANK] + [
        ('gpt2', 'adalora'), ('gpt2', 'vera'), ('resnet', 'adalora')]
TRAINED = [(f, k) for f in ('bert', 'llama') for k in KINDS + LOWRANK] + [
    (f, 'lora') for f in ('gpt2', 't5', 'vit', 'resnet')]


def config(family, kind):
  kernels, norms, scaled, fed = TARGETS[family]
  if family == 'convnext' and kind == 'boft':
    kernels = kernels[:1]
  if family == 'resnet' and kind == 'boft':  # the stem's 147 inputs are odd
    kernels = ['layer.0.convolution', 'layer.1.convolution']
  if kind == 'lora':
    return peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=kernels,
        rank_pattern={kernels[0]: 2}, alpha_pattern={kernels[-1]: 7})
  if kind == 'dora':
    return peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, use_rslora=True,
                           target_modules=kernels)
  if kind == 'adalora':
    return peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, tinit=5, tfinal=10, total_step=50,
        deltaT=3, beta1=0.8, orth_reg_weight=0.25, target_modules=kernels)
  if kind == 'delora':
    return peft.DeloraConfig(r=3, delora_lambda=2, target_modules=kernels,
                             rank_pattern={kernels[0]: 2})
  if kind == 'kasa':
    return peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=kernels, use_rslora=True,
        rank_pattern={kernels[0]: 2}, kasa_config=peft.KasaConfig(beta=1e-3))
  if kind == 'vera':
    return peft.VeraConfig(r=20, d_initial=0.2, projection_prng_key=3,
                           target_modules=kernels)
  if kind == 'oft':
    exact = family in ('bert', 'vit')
    return peft.OFTConfig(oft_block_size=4, target_modules=kernels,
                          use_cayley_neumann=not exact,
                          block_share=family == 'llama')
  if kind == 'boft':
    return peft.BOFTConfig(boft_block_size=4, target_modules=kernels)
  if kind == 'ia3':
    return peft.IA3Config(target_modules=scaled, feedforward_modules=fed)
  return peft.LNTuningConfig(target_modules=norms)


def near(a, b, tolerance):
  a, b = np.asarray(a), np.asarray(b)
  assert a.shape == b.shape
  np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize('name, kind', CASES, ids=map('-'.join, CASES))
def test_output_gradient_and_files(family, kit, tmp_path, name, kind):
  fam = family(name)
  model = kit.adapted(fam, config(name, kind), 1,
                      0.4 if kind in ('adalora', 'ia3') else 0.1)
  source, methods, theta = kit.imported(fam, model, tmp_path)
  weight = np.random.default_rng(1).normal(
      size=tuple(kit.torch_output(model, name).shape)).astype(np.float32)
  if name in ('bert', 'distilbert', 'electra', 'clip', 'vit', 'deit', 'dinov2',
              'resnet', 'convnext', 't5'):
    mask = 1.
  else:
    mask = (np.arange(8) < np.array([[8], [6], [3]]))[..., None]
  weight = weight * np.float32(mask)
  trained, frozen = theta_lib.partition(methods, theta)

  @jax.jit
  def run(trained, params):
    def loss(trained):
      out = kit.our_output(source, methods, params,
                           theta_lib.combine(trained, frozen))
      return (out * weight).sum(), out
    return jax.grad(loss, has_aux=True)(trained)

  grads, out = run(trained, source.base.params)
  want = kit.torch_output(model, name)
  plain = kit.torch_output(kit.base(fam), name).detach()
  assert (want - plain).abs().max() > 1e-3  # the adapter does something
  near(kit.real(name, np.asarray(out)), kit.real(name, want.detach().numpy()),
       1e-5)

  parts = kit.gradients(fam, model, source,
                        lambda y: (y * torch.tensor(weight)).sum())
  for part, (method, _) in zip(parts, as_methods(methods).items()):
    for path, t in source.names.restack(part.theta).items():
      for leaf, g in t.items():
        # Of A alone; Q = -(A - A^T) / 2 meets each pair of entries twice.
        g = 2 * g if kind == 'boft' and leaf == 'q' else g
        ours = np.asarray(grads[method][path][leaf])
        near(ours, g, 1e-4 * max(np.abs(g).max(), 1e-2))

  report = kit.export_adapter(tmp_path / 'ours', tmp_path / 'again')
  files = [safetensors.numpy.load_file(
      tmp_path / d / 'adapter_model.safetensors') for d in ('theirs', 'again')]
  assert set(files[0]) <= set(files[1])
  for key, value in files[0].items():
    if not key.endswith('boft_R'):  # only its skew part matters
      np.testing.assert_array_equal(files[1][key], value, err_msg=key)
  again = kit.reopened(fam, tmp_path / 'again')
  near(kit.torch_output(again, name).detach(), want.detach(), 1e-6)
  reading.convert_adapter(tmp_path / 'again', tmp_path / 'back')
  back = source_lib.open_adapter(tmp_path / 'back')[1].theta
  main = [n for n in theta if n not in ('full', 'bitfit')]
  for method in main:
    for path, t in theta[method].items():
      for leaf, v in t.items():
        np.testing.assert_array_equal(back[method][path][leaf], v)
  assert report['peft_type'] == model.peft_config['default'].peft_type.value


@pytest.mark.parametrize('name, kind', TRAINED, ids=map('-'.join, TRAINED))
def test_training_goes_the_same_way_and_on(family, kit, tmp_path, name, kind):
  fam = family(name)
  # A product of three small numbers would be next to nothing.
  model = kit.adapted(fam, config(name, kind),
                      scale=0.3 if kind == 'adalora' else 0.02)
  source, methods, theta = kit.imported(fam, model, tmp_path)
  start = kit.real(name, kit.torch_output(model, name).detach().numpy())
  target = start + 0.3 * np.random.default_rng(2).normal(
      size=start.shape).astype(np.float32)
  # BOFT's gradient is shared out over two entries of PEFT's matrix: Adam takes
  # the same step, but for its epsilon.
  eps = 1e-7 if kind == 'boft' else 1e-4
  out, half = kit.train_ours(fam, source, methods, theta, target, 20, eps=eps)
  want = kit.train_torch(fam, model, target, 20, eps=eps)
  assert np.abs(kit.real(name, want) - start).max() > 0.005
  near(kit.real(name, out), kit.real(name, want), 1e-3)

  # What was trained here goes on there, and the other way round.
  said = kit.load_adapter(tmp_path / 'ours').meta['base']
  save_adapter(tmp_path / 'trained', methods, half, source.sites,
               source.base.params, base={
                   k: v for k, v in said.items() if k != 'fingerprint'})
  kit.export_adapter(tmp_path / 'trained', tmp_path / 'handed')
  there = kit.train_torch(fam, kit.reopened(fam, tmp_path / 'handed'), target,
                          5, eps=eps)
  here, _ = kit.train_ours(fam, source, methods, half, target, 5, eps=eps)
  near(kit.real(name, here), kit.real(name, there), 1e-3)
