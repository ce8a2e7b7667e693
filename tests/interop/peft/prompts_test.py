"""Prompts and prefixes, there and back."""

import jax
import numpy as np
import peftjax
from peftjax.artifact import save_adapter
from peftjax.interop.peft import reading
from peftjax.interop.peft import source as source_lib
from peftjax.interop.peft import writing
import pytest

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')

TASKS = dict(bert='SEQ_CLS', roberta='TOKEN_CLS', distilbert='SEQ_CLS',
             gpt2='CAUSAL_LM', llama='CAUSAL_LM', qwen3='CAUSAL_LM',
             gemma2='CAUSAL_LM', t5='SEQ_2_SEQ_LM')
CASES = [(f, k) for f in TASKS for k in ('prompt', 'p', 'prefix')
         # PEFT has no prefix for DistilBERT; ours stays in a sliding window.
         if (f, k) not in {('distilbert', 'prefix'), ('gemma2', 'prefix')}]


def config(name, kind):
  given = dict(task_type=TASKS[name], num_virtual_tokens=3,
               num_transformer_submodules=1)
  if name == 'distilbert':  # PEFT does not know the names of its settings
    given |= dict(token_dim=16, num_attention_heads=2, num_layers=2)
  if (name, kind) == ('t5', 'prefix'):
    given['num_transformer_submodules'] = 2
  if kind == 'prompt':
    return peft.PromptTuningConfig(**given)
  if kind == 'p':
    return peft.PromptEncoderConfig(encoder_hidden_size=8, **given)
  return peft.PrefixTuningConfig(**given)


@pytest.mark.parametrize('name, kind', CASES, ids=map('-'.join, CASES))
def test_output_and_files(family, kit, tmp_path, name, kind):
  fam = family(name)
  model = kit.adapted(fam, config(name, kind), scale=0.3)
  source, methods, theta = kit.imported(fam, model, tmp_path)
  want = kit.torch_output(model, name).detach().numpy()
  want = want[:, -8:] if want.ndim == 3 else want
  got = np.asarray(jax.jit(
      lambda p, t: kit.our_output(source, methods, p, t))(
          source.base.params, theta))
  plain = np.asarray(jax.jit(lambda p: kit.our_output(source, (), p, {}))(
      source.base.params))
  assert np.abs(kit.real(name, got) - kit.real(name, plain)).max() > 1e-3
  np.testing.assert_allclose(kit.real(name, got), kit.real(name, want),
                             rtol=0, atol=1e-5)

  kit.export_adapter(tmp_path / 'ours', tmp_path / 'again')
  again = kit.torch_output(kit.reopened(fam, tmp_path / 'again', False), name)
  again = again.detach().numpy()
  np.testing.assert_allclose(again[:, -8:] if again.ndim == 3 else again, want,
                             rtol=0, atol=1e-5)
  reading.convert_adapter(tmp_path / 'again', tmp_path / 'back')
  back = source_lib.open_adapter(tmp_path / 'back')[1].theta
  main = methods[0].name
  assert main.endswith('tuning')
  for a, b in zip(jax.tree.leaves(theta[main]), jax.tree.leaves(back[main]),
                  strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('name, kind', [
    ('gpt2', 'prompt'), ('gpt2', 'prefix'), ('llama', 'prefix'),
    ('llama', 'tokens')])
def test_training_goes_the_same_way(family, kit, tmp_path, name, kind):
  fam = family(name)
  given = config(name, kind) if kind != 'tokens' else (
      peft.TrainableTokensConfig(target_modules=['embed_tokens'],
                                 token_indices=[4, 9, 12]))
  model = kit.adapted(fam, given, scale=0.1)
  source, methods, theta = kit.imported(fam, model, tmp_path)
  start = kit.real(name, kit.torch_output(model, name).detach().numpy())
  target = start + 0.3 * np.random.default_rng(2).normal(
      size=start.shape).astype(np.float32)
  here, _ = kit.train_ours(fam, source, methods, theta, target, 20)
  there = kit.real(name, kit.train_torch(fam, model, target, 20))
  assert np.abs(there - start).max() > 0.005
  np.testing.assert_allclose(kit.real(name, here), there, rtol=0, atol=1e-3)


@pytest.mark.parametrize('method', [
    dict(name='prompts.p_tuning', length=3, hidden=5),
    dict(name='prompts.prefix_tuning', length=3, project=5, std=0.5)])
def test_what_a_network_makes_is_written(family, kit, tmp_path, method):
  fam = family('gpt2')
  source = source_lib.open_base(fam.folder)
  methods = (peftjax.load(**method),)
  theta = peftjax.init(methods, jax.random.key(0), source.sites,
                       source.base.params)
  save_adapter(tmp_path / 'a', methods, theta, source.sites, source.base.params,
               base=dict(weights=fam.folder, head='lm'))
  kit.export_adapter(tmp_path / 'a', tmp_path / 'b')
  ours = kit.real('gpt2', np.asarray(kit.our_output(
      source, methods, source.base.params, theta)))
  there = kit.torch_output(kit.reopened(fam, tmp_path / 'b', False), 'gpt2')
  np.testing.assert_allclose(
      ours, kit.real('gpt2', there.detach().numpy()[:, -8:]), atol=1e-5)


def test_prefixes_that_peft_cannot_have(family, tmp_path):
  fam = family('llama')
  source = source_lib.open_base(fam.folder)
  for i, (given, message) in enumerate((
      (dict(shift=False), 'shift=False: PEFT counts'),
      (dict(sites=dict(path='block_1/attn$')), "they differ in .'block_0/attn"))):
    methods = (peftjax.load('prompts.prefix_tuning', length=2, **given),)
    theta = peftjax.init(methods, jax.random.key(0), source.sites,
                         source.base.params)
    save_adapter(tmp_path / str(i), methods, theta, source.sites,
                 source.base.params, base=dict(weights=fam.folder, head='lm'))
    with pytest.raises(ValueError, match=message):
      writing.export_adapter(tmp_path / str(i), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_a_prefix_that_leaves_the_window(family, kit, tmp_path):
  fam = family('gemma2')
  model = kit.adapted(fam, config('gemma2', 'prefix'))
  model.save_pretrained(tmp_path / 'x')
  with pytest.raises(ValueError, match='a window of 4 tokens'):
    reading.convert_adapter(tmp_path / 'x', tmp_path / 'y', fam.folder)
  assert not (tmp_path / 'y').exists()


def test_a_second_prompt_for_the_decoder(family, kit, tmp_path):
  fam = family('t5')
  model = kit.adapted(fam, peft.PromptTuningConfig(
      task_type='SEQ_2_SEQ_LM', num_virtual_tokens=3))
  model.save_pretrained(tmp_path / 'x')
  with pytest.raises(ValueError, match='num_transformer_submodules=2'):
    reading.convert_adapter(tmp_path / 'x', tmp_path / 'y', fam.folder)
  assert not (tmp_path / 'y').exists()
