"""Adapters that cannot be read or written: clear errors, and nothing made."""

import json
import pickle

import jax
import numpy as np
import peftjax
from peftjax import bases
from peftjax.artifact import save_adapter
from peftjax.interop.peft import reading
from peftjax.interop.peft import source as source_lib
from peftjax.interop.peft import writing
import pytest
import safetensors.numpy

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')


@pytest.fixture(scope='module')
def good(family, kit, tmp_path_factory):
  """Folder of a LoRA on a BERT."""
  folder = tmp_path_factory.mktemp('good')
  model = kit.adapted(family('bert'), peft.LoraConfig(
      r=2, target_modules=['query'], task_type='SEQ_CLS'))
  model.save_pretrained(folder)
  config = json.loads((folder / 'adapter_config.json').read_text())
  return dict(config), safetensors.numpy.load_file(
      folder / 'adapter_model.safetensors')


def put(tmp_path, config, tensors):
  folder = tmp_path / 'theirs'
  folder.mkdir(exist_ok=True)
  (folder / 'adapter_config.json').write_text(json.dumps(config))
  if tensors is not None:
    safetensors.numpy.save_file(tensors, folder / 'adapter_model.safetensors')
  return folder


def refuses(folder, tmp_path, weights, message, error=ValueError):
  with pytest.raises(error, match=message):
    reading.convert_adapter(folder, tmp_path / 'out', weights)
  assert not (tmp_path / 'out').exists()


QUERY = 'base_model.model.bert.encoder.layer.0.attention.self.query'
CHANGES = [
    (dict(peft_type='LORAA'), "peft_type 'LORAA' is not supported; did you mean"
     " 'LORA'"),
    (dict(peft_type='XLORA'), "peft_type 'XLORA' is not supported"),
    (dict(use_next_year=True), 'use_next_year=True is a setting of LORA that is '
     'not supported'),
    (dict(use_qalora=True), 'use_qalora=True'),
    (dict(layer_replication=[[0, 1]]), 'layer_replication'),
    (dict(init_lora_weights='corda'), "init_lora_weights is 'corda'.*save it "
     'from PEFT with path_initial'),
    (dict(r=3), 'not of the rank 3'),
    (dict(target_modules=['key']), "is not among target_modules \\['key'\\]"),
    (dict(modules_to_save=None), 'classifier.bias: neither a tensor of LORA'),
    (dict(lora_alpha=-1), 'alpha=-1'),
]


@pytest.mark.parametrize('change, message', CHANGES)
def test_settings(good, family, tmp_path, change, message):
  config, tensors = good
  folder = put(tmp_path, {**config, **change}, tensors)
  refuses(folder, tmp_path, family('bert').folder, message)


def test_settings_that_are_switched_off_are_fine(good, family, tmp_path):
  config, tensors = good
  folder = put(tmp_path, dict(config, something_newer=None, more=False), tensors)
  reading.convert_adapter(folder, tmp_path / 'out', family('bert').folder)


TENSORS = [
    (lambda t: {n: v for n, v in t.items()
                if n != f'{QUERY}.lora_B.weight'},
     r"expected the tensors \['lora_A.weight', 'lora_B.weight'\]"),
    (lambda t: {n.replace('query', 'qerry'): v for n, v in t.items()},
     r"has no module 'bert.*qerry'; did you mean .*query'|not among"),
    (lambda t: {**t, f'{QUERY}.lora_A.weight': np.full((2, 16), np.nan, 'f4')},
     'holds NaN or infinity'),
    (lambda t: {**t, f'{QUERY}.lora_A.weight': np.ones((2, 12), 'f4')},
     'another base'),
    (lambda t: {**t, 'base_model.model.classifier.weight': np.ones(
        (3, 5), 'f4')}, 'another base'),
    (lambda t: {n: v for n, v in t.items() if 'classifier.bias' not in n},
     r"classifier of modules_to_save: \['bias'\] is missing"),
    (lambda t: {**t, 'base_model.model.bert.pooler.dense.weight': np.ones(
        (16, 16), 'f4')}, 'neither a tensor of LORA nor below modules_to_save'),
    (lambda t: {n: v for n, v in t.items() if 'lora' not in n},
     'no tensor of a LORA adapter'),
]


@pytest.mark.parametrize('change, message', TENSORS)
def test_tensors(good, family, tmp_path, change, message):
  config, tensors = good
  folder = put(tmp_path, config, change(tensors))
  refuses(folder, tmp_path, family('bert').folder, message)


def test_files(good, family, tmp_path):
  config, tensors = good
  weights = family('bert').folder
  folder = put(tmp_path, config, None)
  refuses(folder, tmp_path, weights, 'has no adapter_model.safetensors',
          FileNotFoundError)
  with open(folder / 'adapter_model.bin', 'wb') as f:
    pickle.dump({}, f)
  refuses(folder, tmp_path, weights, 'pickles can run code and are never read')
  (folder / 'adapter_model.safetensors').write_bytes(b'abc')
  refuses(folder, tmp_path, weights, 'no complete safetensors file')
  put(tmp_path, config, tensors)
  (folder / 'adapter_config.json').write_text('{')
  refuses(folder, tmp_path, weights, 'is not JSON')
  refuses(tmp_path / 'nowhere', tmp_path, weights, 'expected a folder',
          FileNotFoundError)
  put(tmp_path, {**config, 'base_model_name_or_path': None}, tensors)
  refuses(folder, tmp_path, None, 'does not name its base')
  refuses(folder, tmp_path, 'vit_s', 'weight file of this library')
  refuses(folder, tmp_path, family('llama').folder,
          'has no module|another|no class|head')


def test_another_base_of_the_same_shape(family, kit, tmp_path):
  fam = family('llama')
  model = kit.adapted(fam, peft.LoraConfig(target_modules=['q_proj']))
  kit.imported(fam, model, tmp_path)
  kit.export_adapter(tmp_path / 'ours', tmp_path / 'b')
  other = kit.base(fam)
  with torch.no_grad():
    other.model.norm.weight += 1
  other.save_pretrained(tmp_path / 'other')
  refuses(tmp_path / 'b', tmp_path, str(tmp_path / 'other'),
          'was written for another base')


# --------------------------------------------------------------------- writing
def saved(tmp_path, folder, methods, **base):
  source = source_lib.open_base(folder, **base)
  theta = peftjax.init(methods, jax.random.key(0), source.sites,
                       source.base.params)
  said = dict(weights=folder, head=source.base.model.head, **base)
  save_adapter(tmp_path / 'a', methods, theta, source.sites, source.base.params,
               base=said)
  return tmp_path / 'a'


def wont(tmp_path, folder, methods, message, **base):
  adapter = saved(tmp_path, folder, methods, **base)
  with pytest.raises(ValueError, match=message):
    writing.export_adapter(adapter, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_methods_that_peft_has_not(family, tmp_path):
  folder = family('bert').folder
  wont(tmp_path, folder, peftjax.load('scaling.ssf'),
       r"\['scaling.ssf'\]: PEFT has none of them")
  wont(tmp_path, folder, (
      peftjax.load('lowrank.lora', rank=2),
      peftjax.load('orthogonal.oft', block_size=4)), 'an adapter of PEFT is of '
       'one kind')
  wont(tmp_path, folder, (
      peftjax.load('scaling.ia3'), peftjax.load('selective.bitfit', sites=dict(
          path='norm'))), 'IA3 in PEFT has no room')


def test_sites_that_peft_cannot_follow(family, tmp_path):
  wont(tmp_path, family('gpt2').folder, peftjax.load(
      'orthogonal.oft', block_size=4, sites=dict(path='qkv')),
       'no OFT of a conv1d')
  wont(tmp_path, family('mixtral').folder, peftjax.load(
      'lowrank.lora', rank=2, sites=dict(path='router')),
       'experts and single parameters')
  wont(tmp_path, family('bert').folder, (
      peftjax.load('orthogonal.oft', sites=dict(path='mlp/'))),
       'the block size is 16 at .* and 24 at')
  wont(tmp_path, family('resnet').folder, peftjax.load(
      'orthogonal.oft', block_size=4, sites=dict(path='layer_0/conv1$')),
       r'over \(3, 3\) pixels is not the same function in PEFT')


def test_a_series_of_an_older_peft(family, kit, tmp_path):
  fam = family('llama')
  model = kit.adapted(fam, peft.OFTConfig(
      oft_block_size=4, target_modules=['q_proj']))
  model.save_pretrained(tmp_path / 'x')
  file = tmp_path / 'x' / 'adapter_config.json'
  said = dict(json.loads(file.read_text()), peft_version='0.17.1')
  file.write_text(json.dumps(said))
  refuses(tmp_path / 'x', tmp_path, fam.folder, 'an OFT of PEFT 0.17.1')


def test_coft_outside_of_its_radius(family, tmp_path):
  source = source_lib.open_base(family('llama').folder)
  methods = (peftjax.load('orthogonal.coft', block_size=4, eps=0.01),)
  theta = peftjax.init(methods, jax.random.key(0), source.sites,
                       source.base.params)
  theta = jax.tree.map(lambda v: v + 0.1, theta)
  save_adapter(tmp_path / 'a', methods, theta, source.sites, source.base.params,
               base=dict(weights=family('llama').folder, head='lm'))
  with pytest.raises(ValueError, match='outside the radius'):
    writing.export_adapter(tmp_path / 'a', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_out_that_holds_something_else(family, tmp_path):
  adapter = saved(tmp_path, family('bert').folder,
                  peftjax.load('lowrank.lora', rank=2))
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'thesis.tex').write_text('x')
  with pytest.raises(ValueError, match='thesis.tex'):
    writing.export_adapter(adapter, tmp_path / 'out')
  assert [p.name for p in (tmp_path / 'out').iterdir()] == ['thesis.tex']


def test_a_head_of_our_own(family, tmp_path):
  folder = family('bert').folder
  methods = (peftjax.load('lowrank.lora', rank=2, sites=dict(roles='q')),
             peftjax.load('selective.full', sites=dict(roles='head')))
  base = bases.load(folder, 'mean', 4)
  sites = peftjax.describe(base.model, *source_lib.families.example(
      base.model, base.config))
  theta = peftjax.init(methods, jax.random.key(0), sites, base.params)
  save_adapter(tmp_path / 'a', methods, theta, sites, base.params, base=dict(
      weights=folder, head='mean', classes=4))
  with pytest.raises(ValueError, match="head='drop'|head='mean'|head 'mean'"):
    writing.export_adapter(tmp_path / 'a', tmp_path / 'out')
  report = writing.export_adapter(tmp_path / 'a', tmp_path / 'out', head='drop')
  assert report['left_out'] == ['head/out']
  names = safetensors.numpy.load_file(
      tmp_path / 'out' / 'adapter_model.safetensors')
  assert all('.encoder.layer.' in n and 'bert' not in n for n in names)
