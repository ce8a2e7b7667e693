"""The low-rank family: its own kinds in PEFT, and what is a LoRA once trained.

What PEFT has itself is also in oracles_test.py, gradients and training too.
"""

import json
import warnings

import jax
import numpy as np
import peftjax
from peftjax import calibrate
from peftjax.artifact import save_adapter
from peftjax.interop.peft import as_lora
from peftjax.interop.peft import reading
from peftjax.interop.peft import source as source_lib
from peftjax.interop.peft import writing
from peftjax.interop.peft.types import vera
from peftjax.tasks import lm
import pytest
import safetensors.numpy

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')
QV = dict(roles='qv')


def moved(methods, source, scale=0.1, phase=False):
  """(methods, theta): nothing at its start; where told, in the last phase."""
  sites = source.sites
  methods, stats = calibrate.fitted(
      methods, calibrate.stand_in(methods, sites), sites)
  theta = peftjax.init(methods, jax.random.key(0), sites, source.base.params,
                       stats)
  theta = shifted(methods, theta, scale)
  if phase:
    name, method = methods[0].name, methods[0]
    last = method.phases[-1]
    theta = {name: last.start(theta[name], jax.random.key(2), sites)}
    methods = (peftjax.load(**{**method.spec, 'phase': len(method.phases)}),)
    theta = shifted(methods, theta, scale)
  return methods, theta


def shifted(methods, theta, scale):
  trained, frozen = peftjax.partition(methods, theta)
  keys = iter(jax.random.split(jax.random.key(1), 200))
  # Pairs that are held at zero stay there.
  trained = jax.tree.map(lambda v: v + scale * jax.random.normal(
      next(keys), v.shape), trained)
  return peftjax.combine(trained, frozen)


def saved(folder, weights, source, methods, theta, scan=False):
  save_adapter(folder, methods, theta, source.sites, source.base.params,
               base=dict(weights=weights, head=source.base.model.head,
                         scan=scan))


def there(kit, fam, folder):
  out = kit.torch_output(kit.reopened(fam, folder), fam.name)
  return kit.real(fam.name, out.detach().numpy())


def here(kit, fam, source, methods, theta):
  out = kit.our_output(source, methods, source.base.params, theta)
  return kit.real(fam.name, np.asarray(out))


def config_of(folder):
  return json.loads((folder / 'adapter_config.json').read_text())


def tensors_of(folder):
  return safetensors.numpy.load_file(folder / 'adapter_model.safetensors')


# ------------------------------------------------------- LoRA once trained
# method -> (settings, whether in its last phase, the LoRA's rank and alpha).
AS_LORA = {
    'lora_plus': (dict(rank=3, alpha=5.), False, 3, 5),
    'trans_peft': (dict(rank=3, alpha=5.), False, 3, 5),
    'lora_xs': (dict(rank=3, alpha=6.), False, 3, 6),
    'lora_sb': (dict(rank=3), False, 3, 3),
    'corda': (dict(rank=3, alpha=6.), False, 6, 12),
    'lora_ga': (dict(rank=3, alpha=6., scaling='lora'), False, 6, 12),
    'eva': (dict(rank=3, alpha=6.), False, None, None),
    'auto_lora': (dict(rank=4, alpha=8.), False, 4, 8),
    'selective_lora': (dict(rank=3, alpha=6., start=0.3), False, 3, 6),
    'dense_lora': (dict(rank=3, alpha=6., activation='identity'), False, 3, 6),
    'delora': (dict(rank=3, strength=2.), False, 6, 6),
}


@pytest.mark.parametrize('scan', [False, True], ids=['plain', 'scan'])
@pytest.mark.parametrize('name', AS_LORA)
def test_is_the_lora_that_is_written(family, kit, tmp_path, name, scan):
  fam = family('llama')
  source = source_lib.open_base(fam.folder, scan=scan)
  given, phase, rank, alpha = AS_LORA[name]
  method = peftjax.load(f'lowrank.{name}', **given, sites=QV)
  methods, theta = moved((method,), source, phase=phase)
  saved(tmp_path / 'a', fam.folder, source, methods, theta, scan)
  report = kit.export_adapter(tmp_path / 'a', tmp_path / 'b')
  assert report['peft_type'] == 'LORA'
  config = config_of(tmp_path / 'b')
  assert config['init_lora_weights'] is True
  if rank:
    assert (config['r'], config['lora_alpha']) == (rank, pytest.approx(alpha))
    assert not config['rank_pattern'] and not config['alpha_pattern']
  got, want = there(kit, fam, tmp_path / 'b'), here(
      kit, fam, source, methods, theta)
  plain = kit.real('llama', kit.torch_output(
      kit.base(fam), 'llama').detach().numpy())
  assert np.abs(want - plain).max() > 1e-3
  np.testing.assert_allclose(got, want, atol=1e-5)
  # It comes back as the LoRA that it is.
  reading.convert_adapter(tmp_path / 'b', tmp_path / 'c', fam.folder)
  back, adapter, _ = source_lib.open_adapter(tmp_path / 'c')
  assert adapter.methods[0].name == 'lora'
  np.testing.assert_allclose(
      here(kit, fam, back, adapter.methods, adapter.theta), want, atol=1e-5)


@pytest.mark.parametrize('name', ['auto_lora', 'selective_lora'])
def test_ranks_and_blocks_that_are_left(family, kit, tmp_path, name):
  """Of a stack one layer is left with less, or with nothing: zeros go."""
  fam = family('llama')
  source = source_lib.open_base(fam.folder, scan=True)
  method = peftjax.load(f'lowrank.{name}', rank=4, alpha=8., sites=QV)
  theta = peftjax.init(method, jax.random.key(0), source.sites,
                       source.base.params)
  t = {p.rpartition('/')[2]: dict(v) for p, v in theta[name].items()}
  if name == 'auto_lora':
    logits = np.ones((2, 2, 4), np.float32)
    logits[0, 0, 1:] = logits[1, 1, 2:] = -9  # of a layer of each stack
    t['query']['logits'], t['value']['logits'] = logits
  else:
    t['query']['u'], t['value']['u'] = np.array([0., 1.]), np.zeros(2)
  last = method.phases[-1].start(
      {f'blocks/attn/{n}': v for n, v in t.items()}, jax.random.key(3),
      source.sites)
  for t in last.values():  # all but the pairs that are held at zero
    left = (np.asarray(t['a']) != 0).any(-2)[..., None]
    t['b'] = 0.2 * left * jax.random.normal(jax.random.key(1), t['b'].shape)
  theta = {name: last}
  methods = (peftjax.load(**{**method.spec, 'phase': 1}),)
  saved(tmp_path / 'a', fam.folder, source, methods, theta, True)
  kit.export_adapter(tmp_path / 'a', tmp_path / 'b')
  np.testing.assert_allclose(there(kit, fam, tmp_path / 'b'),
                             here(kit, fam, source, methods, theta), atol=1e-5)
  ranks = {n.split('layers.')[1].removesuffix('.lora_A.weight'): len(v)
           for n, v in tensors_of(tmp_path / 'b').items()
           if n.endswith('lora_A.weight')}
  if name == 'auto_lora':
    assert ranks == {'0.self_attn.q_proj': 1, '1.self_attn.q_proj': 4,
                     '0.self_attn.v_proj': 4, '1.self_attn.v_proj': 2}
  else:  # closed: no module
    assert ranks == {'1.self_attn.q_proj': 4}


def test_patterns_of_a_scanned_model(family, kit, tmp_path):
  fam = family('llama')
  source = source_lib.open_base(fam.folder, scan=True)
  method = peftjax.load(
      'lowrank.lora', rank=2, alpha=4., sites=QV,
      rank_pattern=[('^blocks/attn/query$', 3)],
      alpha_pattern=[('^blocks/attn/query$', 12.)])
  methods, theta = moved((method,), source)
  saved(tmp_path / 'a', fam.folder, source, methods, theta, True)
  kit.export_adapter(tmp_path / 'a', tmp_path / 'b')
  np.testing.assert_allclose(there(kit, fam, tmp_path / 'b'),
                             here(kit, fam, source, methods, theta), atol=1e-5)


# ------------------------------------------------------------------- AdaLoRA
def budgeted(kit, fam, tmp_path, target=2):
  """A PEFT AdaLoRA whose budget has fallen; one module has no rank left."""
  model = kit.adapted(fam, peft.AdaLoraConfig(
      init_r=6, target_r=target, lora_alpha=9, tinit=1, tfinal=1, total_step=6,
      deltaT=1, target_modules=['q_proj', 'down_proj']))
  with torch.no_grad():  # unimportant to the last: it scores 0
    for n, p in model.named_parameters():
      if 'layers.0.mlp.down_proj.lora_E' in n:
        p.zero_()
      if 'layers.0.mlp.down_proj.lora_A' in n:
        p.zero_()
  tx = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
  for step in range(1, 7):
    tx.zero_grad()
    (kit.torch_output(model, 'llama') ** 2).mean().backward()
    tx.step()
    model.base_model.update_and_allocate(step)
  return model


@pytest.mark.parametrize('scan', [False, True], ids=['plain', 'scan'])
def test_adalora_in_its_final_form(family, kit, tmp_path, scan):
  fam = family('llama')
  model = budgeted(kit, fam, tmp_path)
  want = kit.real('llama', kit.torch_output(model, 'llama').detach().numpy())
  source, methods, theta = kit.imported(fam, model, tmp_path, scan=scan)
  assert methods[0].spec['phase'] == 1 and methods[0].spec['rank'] == 6
  np.testing.assert_allclose(here(kit, fam, source, methods, theta), want,
                             atol=1e-5)
  # Not alpha over the ranks that are left.
  wrong = {'adalora': {p: {**t, 'scale': t['scale'] * 6 / t['e'].shape[-1]}
                       for p, t in theta['adalora'].items()}}
  assert np.abs(here(kit, fam, source, methods, wrong) - want).max() > 1e-4
  stored = tensors_of(tmp_path / 'theirs')
  sizes = {n: v.shape[0] for n, v in stored.items() if n.endswith('lora_E')}
  assert sum(sizes.values()) == 8 and 0 in sizes.values()
  kit.export_adapter(tmp_path / 'ours', tmp_path / 'again')
  np.testing.assert_allclose(there(kit, fam, tmp_path / 'again'), want,
                             atol=1e-6)
  again = tensors_of(tmp_path / 'again')
  for name, value in stored.items():  # those of rank 0 are left out
    if value.size:
      np.testing.assert_array_equal(again[name], value)
    else:
      assert name not in again


@pytest.mark.parametrize('scan', [False, True], ids=['plain', 'scan'])
@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_adalora_trained_here(family, kit, tmp_path, name, scan):
  fam = family(name)
  source = source_lib.open_base(fam.folder, scan=scan)
  method = peftjax.load('lowrank.adalora', rank=4, target=2, alpha=6.,
                        tinit=0.1, tfinal=0.25, sites=QV)
  methods, theta = moved((method,), source)
  rng = np.random.default_rng(0)
  theta = {'adalora': {p: dict(t) for p, t in theta['adalora'].items()}}
  for i, t in enumerate(theta['adalora'].values()):
    mask = rng.random(t['mask'].shape) < (0.5 if i % 3 else 0.8)
    mask[..., 0] = True
    t |= dict(mask=mask, e=np.where(mask, t['e'], 0))
  last = method.phases[-1]
  final = {'adalora': last.start(theta['adalora'], jax.random.key(0), None)}
  for i, (made, t) in enumerate((
      (methods, theta),
      ((peftjax.load(**{**method.spec, 'phase': 1}),), final))):
    saved(tmp_path / f'{i}', fam.folder, source, made, t, scan)
    kit.export_adapter(tmp_path / f'{i}', tmp_path / f'{i}b')
    want = here(kit, fam, source, made, t)
    np.testing.assert_allclose(there(kit, fam, tmp_path / f'{i}b'), want,
                               atol=1e-5)
    config = config_of(tmp_path / f'{i}b')
    assert (config['tinit'], config['tfinal'], config['total_step']) == (
        100, 250, 1000)
    if name == 'llama':
      assert (config['init_r'], config['lora_alpha']) == (4, 6)
      left = {n: sum(v) for n, v in config['rank_pattern'].items()}
      assert set(left.values()) != {4}
      assert {len(v) for v in config['rank_pattern'].values()} == {4}
      reading.convert_adapter(tmp_path / f'{i}b', tmp_path / f'{i}c')
      back, adapter, _ = source_lib.open_adapter(tmp_path / f'{i}c')
      np.testing.assert_allclose(
          here(kit, fam, back, adapter.methods, adapter.theta), want, atol=1e-5)


def test_adalora_goes_by_the_scale_that_it_has(family, kit, tmp_path):
  """It is data of theta: an adapter that is trained on keeps it."""
  fam = family('llama')
  source = source_lib.open_base(fam.folder)
  method = peftjax.load('lowrank.adalora', rank=4, target=2, alpha=6., sites=QV)
  methods, theta = moved((method,), source)
  theta = {'adalora': {p: {**t, 'scale': 3 * t['scale']}
                       for p, t in theta['adalora'].items()}}
  saved(tmp_path / 'a', fam.folder, source, methods, theta)
  kit.export_adapter(tmp_path / 'a', tmp_path / 'b')
  assert config_of(tmp_path / 'b')['lora_alpha'] == pytest.approx(18, rel=1e-5)
  np.testing.assert_allclose(there(kit, fam, tmp_path / 'b'),
                             here(kit, fam, source, methods, theta), atol=1e-5)


# ---------------------------------------------------------------------- VeRA
def test_vera_without_its_projections(family, kit, tmp_path):
  fam = family('llama')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    model = kit.adapted(fam, peft.VeraConfig(
        r=20, projection_prng_key=11, save_projection=False,
        target_modules=['q_proj', 'down_proj']))
  source, methods, theta = kit.imported(fam, model, tmp_path)
  assert not any('vera_A' in n for n in tensors_of(tmp_path / 'theirs'))
  for name in 'AB':
    there_too = getattr(model.base_model, f'vera_{name}')['default'].numpy()
    np.testing.assert_allclose(theta['vera']['*'][name], there_too.T, rtol=2e-7)
  want = kit.real('llama', kit.torch_output(model, 'llama').detach().numpy())
  np.testing.assert_allclose(here(kit, fam, source, methods, theta), want,
                             atol=1e-5)
  kit.export_adapter(tmp_path / 'ours', tmp_path / 'again')
  assert config_of(tmp_path / 'again')['save_projection'] is True
  np.testing.assert_allclose(there(kit, fam, tmp_path / 'again'), want,
                             atol=1e-6)


def test_vera_draws_what_torch_draws():
  from peft.tuners.vera.model import _kaiming_init
  for key in (0, 5, 2 ** 32 + 3):
    generator = torch.Generator(device='cpu').manual_seed(key)
    got = vera.drawn(key, 3, 50, 40)
    for value, shape in zip(got, ((3, 50), (40, 3)), strict=True):
      want = _kaiming_init(shape, generator=generator).numpy()
      np.testing.assert_allclose(value, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize('scan', [False, True], ids=['plain', 'scan'])
@pytest.mark.parametrize('method', [
    peftjax.load('lowrank.vera', rank=20, sites=QV),
    peftjax.load('lowrank.delora', rank=3, strength=2., form='peft', sites=QV),
    peftjax.load('lowrank.kasa', rank=3, alpha=6., sites=QV)],
                         ids=lambda m: m.name)
def test_kinds_of_their_own(family, kit, tmp_path, method, scan):
  fam = family('llama')
  source = source_lib.open_base(fam.folder, scan=scan)
  methods, theta = moved((method,), source)
  saved(tmp_path / 'a', fam.folder, source, methods, theta, scan)
  report = kit.export_adapter(tmp_path / 'a', tmp_path / 'b')
  assert report['peft_type'] == dict(
      vera='VERA', delora='DELORA', kasa='LORA')[method.name]
  want = here(kit, fam, source, methods, theta)
  np.testing.assert_allclose(there(kit, fam, tmp_path / 'b'), want, atol=1e-5)
  if method.name == 'kasa':  # of kernels that are cut
    whole = {'kasa': {p: {**t, 'd': 0 * t['d']}
                      for p, t in theta['kasa'].items()}}
    assert np.abs(here(kit, fam, source, methods, whole) - want).max() > 1e-2
  reading.convert_adapter(tmp_path / 'b', tmp_path / 'c', scan=scan)
  back, adapter, _ = source_lib.open_adapter(tmp_path / 'c')
  assert adapter.methods[0].name == method.name
  trained = [peftjax.partition(methods, t)[0] for t in (theta, adapter.theta)]
  for a, b in zip(*map(jax.tree.leaves, trained), strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(
      here(kit, fam, back, adapter.methods, adapter.theta), want, atol=1e-5)


@pytest.mark.parametrize('name, rank', [('kasa', 6), ('taps', 16), ('vera', 9)])
def test_nearest_lora_against_the_original_base(family, kit, tmp_path, name,
                                                rank):
  """KaSA's cut kernel and its change are a LoRA of twice the rank."""
  fam = family('llama')
  source = source_lib.open_base(fam.folder)
  given = dict(kasa=dict(rank=3), taps=dict(start=0.5), vera=dict(rank=9))[name]
  methods, theta = moved(
      (peftjax.load(f'lowrank.{name}', **given, sites=QV),), source)
  saved(tmp_path / 'a', fam.folder, source, methods, theta)
  report = as_lora.export_lora(tmp_path / 'a', tmp_path / 'b', rank)
  assert report['residual'] < 1e-6
  np.testing.assert_allclose(there(kit, fam, tmp_path / 'b'),
                             here(kit, fam, source, methods, theta), atol=1e-5)


@pytest.mark.parametrize('config', [
    peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, bias='all',
                       target_modules=['query']),
    peft.DeloraConfig(r=3, delora_lambda=2, bias='all',
                      target_modules=['query']),
    peft.VeraConfig(r=5, bias='all', target_modules=['query'])],
                         ids=lambda c: c.peft_type.value)
def test_biases_beside(family, kit, tmp_path, config):
  fam = family('bert')
  model = kit.adapted(fam, config)
  source, methods, theta = kit.imported(fam, model, tmp_path)
  assert 'bitfit' in theta
  want = kit.torch_output(model, 'bert').detach().numpy()
  np.testing.assert_allclose(here(kit, fam, source, methods, theta), want,
                             atol=1e-5)
  kit.export_adapter(tmp_path / 'ours', tmp_path / 'again')
  np.testing.assert_allclose(there(kit, fam, tmp_path / 'again'), want,
                             atol=1e-6)


# -------------------------------------------------------- starts of PEFT's
def steps(kit, model):
  tx = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
  for _ in range(3):
    tx.zero_grad()
    (kit.torch_output(model, 'llama') ** 2).mean().backward()
    tx.step()
  return kit.real('llama', kit.torch_output(model, 'llama').detach().numpy())


@pytest.mark.parametrize('start', ['corda', 'lora_ga'])
def test_a_start_from_data_after_its_conversion(family, kit, tmp_path, start):
  """What PEFT writes with path_initial_model_for_weight_conversion."""
  fam, base = family('llama'), kit.base(family('llama'))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=['q_proj', 'down_proj'],
        init_lora_weights=start)
    if start == 'corda':
      from peft.tuners.lora.config import CordaConfig
      from peft.tuners.lora.corda import preprocess_corda
      config.corda_config = CordaConfig(corda_method='ipm', verbose=False)
      batch = kit.inputs('llama')  # of which it takes one row at a time
      preprocess_corda(base, config, run_model=lambda: [
          base(**{n: v[i:i + 1] for n, v in batch.items()}) for i in range(3)])
    else:
      from peft.tuners.lora.loraga import preprocess_loraga
      config.lora_ga_config = peft.LoraGAConfig()
      preprocess_loraga(base, config, lambda: (
          kit.torch_output(base, 'llama') ** 2).mean().backward())
    model = peft.get_peft_model(base, config)
    model.peft_config['default'].init_lora_weights = True
    model.save_pretrained(tmp_path / 'start')
    model.peft_config['default'].init_lora_weights = start
    want = steps(kit, model.eval())
    model.save_pretrained(
        tmp_path / 'theirs',
        path_initial_model_for_weight_conversion=str(tmp_path / 'start'))
  reading.convert_adapter(tmp_path / 'theirs', tmp_path / 'ours', fam.folder)
  source, adapter, _ = source_lib.open_adapter(tmp_path / 'ours')
  assert adapter.methods[0].spec['rank'] == 6
  np.testing.assert_allclose(
      here(kit, fam, source, adapter.methods, adapter.theta), want, atol=1e-5)


def test_eva_of_peft(family, kit, tmp_path):
  """Its ranks differ from layer to layer, and so do its alphas."""
  fam = family('llama')
  model = kit.adapted(fam, peft.LoraConfig(
      r=3, lora_alpha=6, target_modules=['q_proj', 'down_proj'],
      init_lora_weights='eva', eva_config=peft.EvaConfig(rho=2.)))
  batch = {n: v.numpy() for n, v in kit.inputs('llama').items()}
  rows = [dict(input_ids=torch.tensor(batch['input_ids']),
               attention_mask=torch.tensor(batch['attention_mask']))]
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    peft.initialize_lora_eva_weights(model, rows, show_progress_bar=False)
  with torch.no_grad():
    for n, p in model.named_parameters():
      if 'lora_B' in n:
        p += 0.1 * torch.randn_like(p)
  want = kit.real('llama', kit.torch_output(model, 'llama').detach().numpy())
  source, methods, theta = kit.imported(fam, model, tmp_path)
  assert len({t['a'].shape[1] for t in theta['lora'].values()}) > 1
  np.testing.assert_allclose(here(kit, fam, source, methods, theta), want,
                             atol=1e-5)


@pytest.mark.parametrize('label_mask', [True, False])
def test_eva_sees_the_tokens_that_peft_sees(
    family, kit, tmp_path, monkeypatch, label_mask):
  """Answers alone where prompts have no label, padding never."""
  from peft.tuners.lora import eva as theirs

  fam = family('llama')
  model = kit.adapted(fam, peft.LoraConfig(
      r=3, target_modules=['q_proj', 'down_proj'], init_lora_weights='eva',
      eva_config=peft.EvaConfig(rho=1., use_label_mask=label_mask)))
  model.peft_config['default'].eva_config.tau = -1.  # settled after two batches
  pca = theirs.IncrementalPCA  # exact instead of randomised
  monkeypatch.setattr(theirs, 'IncrementalPCA', lambda lowrank, **kwargs: pca(
      lowrank=False, n_components=kwargs['n_components']))
  first = {n: v.numpy() for n, v in kit.inputs('llama').items()}
  other = first['input_ids'][::-1, ::-1] % 17 + 3
  batches = []
  for ids, prompt in ((first['input_ids'], [[3], [1], [2]]),
                      (other, [[0], [4], [1]])):
    answer = np.arange(ids.shape[1]) >= prompt
    batches.append(dict(ids=np.int32(ids), mask=first['attention_mask'] > 0,
                        weights=np.float32(answer)))
  rows = [dict(
      input_ids=torch.tensor(b['ids']).long(),
      attention_mask=torch.tensor(b['mask']).long(),
      labels=torch.tensor(np.where(b['weights'] > 0, b['ids'], -100)).long())
          for b in batches]
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    peft.initialize_lora_eva_weights(model, rows, show_progress_bar=False)
  source, _, theta = kit.imported(fam, model, tmp_path)
  method = peftjax.load(
      'lowrank.eva', rank=3, rho=1., tau=1., label_mask=label_mask,
      sites=peftjax.select(path=tuple(f'^{p}$' for p in theta['lora'])))
  task = peftjax.tasks.base.Task('lm', 'loss', lm.inputs, lm.loss, None, None)
  found = calibrate.collect(
      source.base.model, source.base.params, source.sites, task,
      lambda: iter(batches), method.calibration, method)
  start = peftjax.init(method, jax.random.key(0), source.sites,
                       source.base.params, dict(eva=found))['eva']
  assert len(start) == 4 == len(theta['lora'])
  for path, t in theta['lora'].items():
    np.testing.assert_allclose(start[path]['a'], t['a'], atol=5e-5)


# ------------------------------------------------------------------- refused
WONT = [
    ('llama', dict(name='lowrank.taps'), r"\['lowrank.taps'\]: PEFT has none"),
    ('llama', dict(name='lowrank.dense_lora', rank=2),
     "activation='gelu' adds to outputs what is not linear"),
    ('llama', dict(name='lowrank.selective_lora', start=0.1), None),
    ('gpt2', dict(name='lowrank.kasa', rank=2), 'KaSA is of whole linear'),
    ('gpt2', dict(name='lowrank.delora', rank=2, form='peft'),
     'DeLoRA is of whole linear'),
    ('gpt2', dict(name='lowrank.vera', rank=2),
     'takes the first columns of B here'),
    ('resnet', dict(name='lowrank.vera', rank=2), "kind is 'conv', and VeRA"),
    ('convnext', dict(name='lowrank.lora', rank=2, sites=dict(
        path='depthwise')), 'a convolution in groups, whose factors in PEFT'),
    ('convnext', dict(name='lowrank.adalora', rank=2, target=1, sites=dict(
        path='depthwise')), 'a convolution in groups, of which AdaLoRA'),
    ('bert', dict(name='lowrank.adalora', rank=2, target=1,
                  sites=dict(path='word_embed')),
     "kind is 'embedding', and AdaLoRA in PEFT is of linear"),
]


@pytest.mark.parametrize('name, spec, message', WONT)
def test_what_peft_cannot_hold(family, tmp_path, name, spec, message):
  fam = family(name)
  source = source_lib.open_base(fam.folder)
  method = peftjax.load(**spec)
  theta = peftjax.init(method, jax.random.key(0), source.sites,
                       source.base.params)
  if message is None:  # all blocks closed
    message = 'every gate closed'
    theta = jax.tree.map(lambda v: v * 0, theta)
  saved(tmp_path / 'a', fam.folder, source, (method,), theta)
  with pytest.raises(ValueError, match=message):
    writing.export_adapter(tmp_path / 'a', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def good(family, kit, tmp_path_factory):
  """{kind: (config, tensors)} on a Llama."""
  made = {
      'adalora': peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9,
                                    target_modules=['q_proj']),
      'delora': peft.DeloraConfig(r=3, target_modules=['q_proj']),
      'kasa': peft.LoraConfig(r=3, target_modules=['q_proj'],
                              kasa_config=peft.KasaConfig()),
      'vera': peft.VeraConfig(r=5, target_modules=['q_proj'])}
  out = {}
  for name, config in made.items():
    folder = tmp_path_factory.mktemp(name)
    kit.adapted(family('llama'), config).save_pretrained(folder)
    out[name] = config_of(folder), tensors_of(folder)
  return out


Q = 'base_model.model.model.layers.0.self_attn.q_proj'
BAD = [
    ('adalora', dict(init_r=5), {}, r'expected \[\(5, 16\), \(16, 5\), \(5, 1'),
    ('adalora', dict(rank_pattern={
        'model.layers.0.self_attn.q_proj.lora_E': [True, False, True, False]}),
     {}, r'expected \[\(2, 16\)'),
    ('adalora', dict(rank_pattern={'model.layers.0.mlp.lora_E': [True]}), {},
     'of which there are no tensors'),
    ('adalora', {}, {f'{Q}.ranknum': np.full(1, 9., 'f4')}, 'its ranknum is'),
    ('adalora', {}, {f'{Q}.lora_E': None}, 'expected the tensors'),
    ('adalora', dict(alpha_pattern={'q_proj': 3}), {}, 'alpha_pattern=.*not '
     'supported'),
    ('delora', dict(r=2), {}, 'delora_A of .3, 16., expected .2, 16.'),
    ('delora', {}, {f'{Q}.delora_B': None}, 'expected the tensors'),
    ('delora', dict(delora_lambda=0), {}, 'strength=0'),
    ('kasa', {}, {f'{Q}.lora_diag': None}, 'expected the tensors'),
    ('kasa', dict(kasa_config=None), {}, 'expected the tensors'),
    ('kasa', dict(use_dora=True), {}, 'one change of the base at most'),
    ('kasa', dict(init_lora_weights='pissa'), {}, 'one change of the base'),
    ('vera', {}, {'base_model.vera_A': None}, 'save_projection is True'),
    ('vera', dict(save_projection=False), {}, 'save_projection is False'),
    ('vera', {}, {'base_model.vera_A': np.ones((5, 12), 'f4')},
     r'vera_A \[5, 12\]'),
    ('vera', dict(r=6), {}, r'expected \[6\] by the config'),
    ('vera', {}, {f'{Q}.vera_lambda_d': None}, 'expected the tensors'),
]


@pytest.mark.parametrize('kind, change, tensors, message', BAD)
def test_bad_input(good, family, tmp_path, kind, change, tensors, message):
  config, values = good[kind]
  values = {**values, **tensors}
  folder = tmp_path / 'theirs'
  folder.mkdir()
  (folder / 'adapter_config.json').write_text(json.dumps({**config, **change}))
  safetensors.numpy.save_file(
      {n: v for n, v in values.items() if v is not None},
      folder / 'adapter_model.safetensors')
  with pytest.raises(ValueError, match=message):
    reading.convert_adapter(folder, tmp_path / 'out', family('llama').folder)
  assert not (tmp_path / 'out').exists()
