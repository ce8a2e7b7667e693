"""The two commands, as a user types them; what trains beside an adapter."""

import json
import subprocess
import sys

import jax
import numpy as np
import peftjax
import pytest
import safetensors.numpy

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')


def command(*args):
  return subprocess.run([sys.executable, '-m', *map(str, args)], text=True,
                        capture_output=True, check=False)


def test_export_and_convert(family, kit, tmp_path):
  fam = family('llama')
  model = kit.adapted(fam, peft.LoraConfig(
      r=2, target_modules=['q_proj'], task_type='CAUSAL_LM'))
  model.save_pretrained(tmp_path / 'theirs')
  done = command('peftjax.convert', '--from=peft',
                 f'--adapter={tmp_path / "theirs"}', f'--base={fam.folder}',
                 f'--out={tmp_path / "ours"}')
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)['methods'][0]['name'] == 'lowrank.lora'
  done = command('peftjax.export', f'--adapter={tmp_path / "ours"}',
                 f'--base={fam.folder}', '--format=peft',
                 f'--out={tmp_path / "again"}')
  assert done.returncode == 0, done.stderr
  a, b = (safetensors.numpy.load_file(
      tmp_path / d / 'adapter_model.safetensors') for d in ('theirs', 'again'))
  assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
  done = command('peftjax.convert', f'--adapter={tmp_path / "nowhere"}',
                 f'--out={tmp_path / "x"}')
  assert done.returncode == 1 and done.stderr.count('\n') == 1
  assert 'expected a folder' in done.stderr and not (tmp_path / 'x').exists()


def test_a_scanned_base(family, kit, tmp_path):
  fam = family('llama')
  model = kit.adapted(fam, peft.LoraConfig(r=2, target_modules=['v_proj']))
  source, methods, theta = kit.imported(fam, model, tmp_path, scan=True)
  assert list(theta['lora']) == ['blocks/attn/value']
  want = kit.torch_output(model, 'llama').detach().numpy()
  got = np.asarray(kit.our_output(source, methods, source.base.params, theta))
  np.testing.assert_allclose(kit.real('llama', got), kit.real('llama', want),
                             atol=1e-5)
  kit.export_adapter(tmp_path / 'ours', tmp_path / 'again')
  a, b = (safetensors.numpy.load_file(
      tmp_path / d / 'adapter_model.safetensors') for d in ('theirs', 'again'))
  assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


BESIDE = [
    ('bert', dict(target_modules=['query'], bias='all'), {'bitfit', 'lora'}),
    ('bert', dict(target_modules=['query'], bias='lora_only'),
     {'bitfit', 'lora'}),
    ('bert', dict(target_modules=['query'], task_type='SEQ_CLS', bias='all'),
     {'bitfit', 'lora', 'full'}),
    ('distilbert', dict(target_modules=['q_lin'], task_type='SEQ_CLS'),
     {'lora', 'full'}),
    ('roberta', dict(target_modules=['word_embeddings', 'key'],
                     task_type='TOKEN_CLS'), {'lora', 'full'}),
    ('llama', dict(target_modules=['q_proj'],
                   trainable_token_indices=[3, 1, 7]),
     {'trainable_tokens', 'lora'}),
    ('llama', dict(target_modules=['q_proj'], modules_to_save=[
        'lm_head', 'input_layernorm']), {'lora', 'full'}),
    ('gpt2', dict(target_modules=['c_attn'], trainable_token_indices={
        'wte': [2, 5]}), {'trainable_tokens', 'lora'}),
    ('t5', dict(target_modules=['q'], modules_to_save=['lm_head']),
     {'lora', 'full'}),
]


@pytest.mark.parametrize('name, given, methods', BESIDE)
def test_what_trains_beside_a_lora(family, kit, tmp_path, name, given, methods):
  fam = family(name)
  # T5's logits grow with its head; 1e-5 is of numbers around 1.
  model = kit.adapted(fam, peft.LoraConfig(r=2, **given),
                      scale=0.02 if name == 't5' else 0.2)
  source, made, theta = kit.imported(fam, model, tmp_path)
  assert set(theta) == methods
  want = kit.torch_output(model, name).detach().numpy()
  got = np.asarray(kit.our_output(source, made, source.base.params, theta))
  np.testing.assert_allclose(kit.real(name, got), kit.real(name, want),
                             atol=1e-5)
  kit.export_adapter(tmp_path / 'ours', tmp_path / 'again')
  there = kit.torch_output(kit.reopened(fam, tmp_path / 'again'), name)
  np.testing.assert_allclose(there.detach().numpy(), want, atol=1e-6)


def test_token_rows_alone(family, kit, tmp_path):
  for i, name in enumerate(('bert', 'gpt2')):
    fam = family(name)
    model = kit.adapted(fam, peft.TrainableTokensConfig(
        target_modules=['word_embeddings' if name == 'bert' else 'wte'],
        token_indices=[4, 9]), scale=0.2)
    (tmp_path / str(i)).mkdir()
    source, made, theta = kit.imported(fam, model, tmp_path / str(i))
    want = kit.torch_output(model, name).detach().numpy()
    got = np.asarray(kit.our_output(source, made, source.base.params, theta))
    np.testing.assert_allclose(kit.real(name, got), kit.real(name, want),
                               atol=1e-5)
    kit.export_adapter(tmp_path / str(i) / 'ours', tmp_path / str(i) / 'again')
    there = kit.torch_output(kit.reopened(fam, tmp_path / str(i) / 'again'),
                             name)
    np.testing.assert_allclose(there.detach().numpy(), want, atol=1e-6)


def test_training_starts_from_an_adapter(family, kit, tmp_path):
  # The config's `start`: the same methods on the same sites, or a clear error.
  from peftjax import artifact
  fam = family('llama')
  model = kit.adapted(fam, peft.LoraConfig(r=2, target_modules=['q_proj']))
  source, methods, theta = kit.imported(fam, model, tmp_path)
  fresh = peftjax.init(methods, jax.random.key(5), source.sites,
                       source.base.params)
  start = lambda m, t: artifact.start_from(
      tmp_path / 'ours', m, t, source.sites, source.base.params)
  for a, b in zip(jax.tree.leaves(start(methods, fresh)),
                  jax.tree.leaves(theta), strict=True):
    np.testing.assert_array_equal(a, b)
  for given, message in ((dict(rank=3, sites=dict(roles='q')), 'has shape'),
                         (dict(rank=2, sites=dict(roles='v')), 'is only in')):
    other = (peftjax.load('lowrank.lora', **given),)
    with pytest.raises(ValueError, match=message):
      start(other, peftjax.init(other, jax.random.key(0), source.sites,
                                source.base.params))
  oft = (peftjax.load('orthogonal.oft', block_size=4),)
  with pytest.raises(ValueError, match="holds .'lora'., the config trains"):
    start(oft, {'oft': {}})
