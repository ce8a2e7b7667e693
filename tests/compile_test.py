"""Plans: the real step compiled for devices that are not there."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import common
from experiments.e2e import lora as e2e_lora
from experiments.glue import lora as glue_lora
from experiments.scale import llama3_8b, table, vit_l
from peftjax import case as case_lib
from peftjax import compile as compile_lib
from peftjax import topologies
from peftjax import train
from peftjax import trees
from peftjax.artifact import load_adapter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HAVE = topologies.installed()
NO_LIBTPU = "libtpu is not installed (pip install 'peftjax[tpu]')"
LLAMA = dict(
    architectures=['LlamaForCausalLM'], model_type='llama', hidden_size=32,
    intermediate_size=96, max_position_embeddings=64, num_attention_heads=4,
    num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=False,
    vocab_size=48)


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  """A folder that says what a model is like, without weights."""
  folder = tmp_path_factory.mktemp('llama')
  (folder / 'config.json').write_text(json.dumps(LLAMA))
  return str(folder)


def small(folder, method='lora'):
  """Llama's config with a tiny model, on a mesh of 4 x 2."""
  config = llama3_8b.get_config(f'method={method},backbone={folder},batch=8,'
                                'task.length=16,mesh.model=2')
  spec = dict(config.method[0])
  for key, value in dict(rank=2, block_size=4).items():
    if key in spec:
      spec[key] = value
  config.method = (spec,)
  return config


@pytest.fixture(scope='module')
def planned(llama):
  """{method: (Setup, what compiling it found)}."""
  out = {}

  def get(method):
    if method not in out:
      found = compile_lib.setup(small(llama, method), jax.devices())
      out[method] = found, compile_lib.compile_step(found)
    return out[method]

  return get


# ------------------------------------------------------------------ the engine
@pytest.mark.parametrize('method', ['lora', 'oft'])
def test_examples_stay_where_they_are(planned, method):
  """XLA would else give every device all examples and split their widths."""
  _, found = planned(method)
  for g in found['moved']:
    shape = [n for n in g['shape'] if n != 1]
    text = f'{g["kind"]} {g["shape"]} of {g["place"]}'
    # Token vectors alone are made by adding up the parts of the table.
    assert shape[:2] != [8, 16] or 'tokens' in g['place'], text
    # What a device computes for its 2 examples of 16 tokens it has whole.
    assert g['kind'] != 'all-gather' or shape[:2] != [2, 16], text


def test_theta_adds_no_traffic_of_the_base_s_size(planned):
  """Against a run that trains scales of norms, a few hundred numbers.

  Activations are so small here that what is more is theta's.
  """
  lora, norms = planned('lora'), planned('norms')
  total = lambda p, kind: p[1]['collectives'].get(kind, dict(bytes=0))['bytes']
  theta = trees.size(lora[0].state['trained'])
  base = trees.size(lora[0].run.params)
  assert theta < base / 4
  for kind in ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all'):
    more = total(lora, kind) - total(norms, kind)
    # Gathered on the way there, again where a block is recomputed, and back.
    assert more <= 4 * theta, (kind, more, theta)
  # No single collective has the shape of a kernel's gradient.
  kernels = {tuple(sorted(v.shape[-2:]))
             for p, v in trees.flatten(lora[0].run.params).items()
             if 'kernel' in p}
  for g in lora[1]['moved']:
    if g['kind'] in ('all-reduce', 'reduce-scatter'):
      assert tuple(sorted(g['shape'])) not in kernels, g


def test_a_step_lowers_for_tpus_from_shapes(llama):
  found = compile_lib.setup(small(llama), jax.devices())
  assert {type(v) for v in jax.tree.leaves((found.state, found.run.params))
          } == {jax.ShapeDtypeStruct}
  text = compile_lib.lower(found, platforms=('tpu',)).as_text()
  assert 'stablehlo' in text


# ---------------------------------------------------------------------- shapes
def like(tree):
  return jax.tree.map(lambda v: (v.shape, np.dtype(v.dtype)), tree)


def check_shapes(config, classes, longest=None):
  real = case_lib.load(config, ('train',))
  planned = case_lib.shapes(config)
  assert planned.classes == real.classes == classes
  assert like(planned.base.params) == like(real.base.params)
  want = dict(real.sample('train'))
  for name, v in want.items():  # texts may all be short
    if longest and v.ndim > 1:
      want[name] = np.zeros((1, longest), v.dtype)
  assert like(planned.arrays['train']) == like(want)


def test_shapes_of_images_are_those_of_real_batches():
  check_shapes(common.kmnist((common.HEAD,), 1e-3, 'runlocal'), 10)


def test_shapes_of_texts_are_those_of_real_batches(tmp_path):
  config = glue_lora.get_config('runlocal,task=rte')
  config.model.param_dtype = 'bfloat16'
  check_shapes(config, 2, longest=48)
  (tmp_path / 'train.jsonl').write_text(
      '{"text": "once upon a time there was a small ship"}\n' * 20)
  config = small('stories260k')
  config.data.name = f'file:{tmp_path}/{{split}}.jsonl'
  check_shapes(config, None)


def test_other_tasks_open_their_data():
  config = e2e_lora.get_config('runlocal')
  planned, real = case_lib.shapes(config), case_lib.load(config, ('train',))
  assert like(planned.arrays['train']) == like(real.sample('train'))
  assert isinstance(jax.tree.leaves(planned.base.params)[0],
                    jax.ShapeDtypeStruct)


def test_classes_without_data_are_those_of_the_base(caplog):
  case = case_lib.shapes(vit_l.get_config())
  assert 'cannot be opened' in caplog.text
  assert case.classes == 1000
  assert case.base.params['head']['kernel'].shape == (1024, 1000)
  assert case.arrays['train']['image'].shape == (1, 224, 224, 3)
  assert case_lib.shapes(vit_l.get_config(), 7).classes == 7


def test_the_shape_of_llama_is_llama_s():
  case = case_lib.shapes(llama3_8b.get_config('method=oft'))
  assert trees.count(case.base.params) == 8_030_261_248
  assert {str(v.dtype) for v in jax.tree.leaves(case.base.params)} == {
      'bfloat16'}


def test_a_base_kept_in_bfloat16_is_known_again(tmp_path, tiny_weights):
  config = common.kmnist((common.HEAD,), 1e-3, 'runlocal')
  config.model.weights, config.model.param_dtype = tiny_weights, 'bfloat16'
  config.eval_before = False
  summary = train.train(config, str(tmp_path / 'run'), progress=False)
  meta = load_adapter(summary['adapter']).meta
  assert meta['base']['param_dtype'] == 'bfloat16'
  again = case_lib.config_of(meta)
  assert again.model.param_dtype == 'bfloat16'
  case = case_lib.load(again, ('test',), meta['base']['classes'])
  assert case.base.fingerprint == meta['base']['fingerprint']


# ----------------------------------------------------------------------- sweep
@pytest.mark.parametrize('unit', [1, 4, 6])
@pytest.mark.parametrize('limit', [0, 1, 4, 23, 24, 100])
def test_sweep_finds_the_largest_multiple_that_fits(unit, limit):
  tried = []
  fits = lambda n: tried.append(n) or n <= limit
  best = compile_lib.largest(fits, unit)
  assert best == limit // unit * unit
  assert len(tried) == len(set(tried))
  assert all(n % unit == 0 for n in tried)
  assert len(tried) <= 2 * max(limit // unit, 1).bit_length() + 1


def test_sweep_ends_where_everything_fits():
  assert compile_lib.largest(lambda n: True, 4, most=100) == 64


@pytest.mark.parametrize('text, gib', [
    ('E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory '
     'required for HLO temporaries (480.00G) exceeds available HBM (15.75G).',
     480), ('Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.', 20.5),
    ('Used 512.00M of 15.75G hbm.', 0.5), ('out of memory', None)])
def test_what_xla_says_it_needs(text, gib):
  assert compile_lib.needed(text) == (gib and int(gib * 2**30))


# ----------------------------------------------------------------------- table
def test_the_table_tells_activations_from_theta(monkeypatch):
  moved = lambda kind, *shape: dict(kind=kind, shape=shape, bytes=2**20)
  base = dict(
      batch=16, mesh=dict(data=4), trained=7, flops=1e12, theta_bytes=2**20,
      theta_bytes_here=2**18, moved=[
          moved('all-reduce', 4, 2048, 4096), moved('all-gather', 1, 4096, 256),
          moved('all-reduce', 4096)],
      memory=dict(arguments=2**30, temp=2**31, peak=3 * 2**30))
  more = base | dict(moved=base['moved'] + [
      moved('all-reduce', 8192, 16), moved('collective-permute', 1024, 16)])
  none = {k: v for k, v in base.items() if k not in ('memory', 'moved')}
  records = dict(norms=base, lora=more, oft=none | dict(
      refusal='RESOURCE_EXHAUSTED', needed=20 * 2**30))
  monkeypatch.setattr(
      table, 'read', lambda model, method, topology: records.get(method))
  memory, sent = table.rows('v5e:4x4', 'llama3_8b')
  assert [m['peak'] for m in memory] == [
      '3.00', '3.00', 'more than fits (20.00)']
  assert [(s['pieces'], s['gradients'], s['activations']) for s in sent] == [
      ('1.0', '1.0', '1.0'), ('2.0', '1.0', '2.0')]
  assert [s['pieces, more'] for s in sent] == ['', '+1']
  assert sent[1]['gradients, more'] == '+0'


# ------------------------------------------------------------------- bad input
@pytest.mark.parametrize('name, words', [
    ('v5:4x4', "unknown kind of TPU 'v5'.*v5e:4x4.*did you mean"),
    ('v5e:3x5', 'no such slice of v5e.*v5e:4x4'),
    ('v5e', 'no such slice of v5e.*v5e:1x1'),
    ('v5p:4x4', 'no such slice of v5p.*v5p:2x2x4'),
    ('v5e-16', 'unknown kind')])
def test_unknown_topologies_are_refused(name, words):
  with pytest.raises(ValueError, match=words):
    topologies.parse(name)


@pytest.mark.parametrize('args, words', [
    (dict(topology='v5e:2x4', count=8), 'expected one of the two'),
    (dict(topology='', count=None), 'expected one of the two'),
    (dict(topology='', count=8, sweep='batch'), 'needs --topology')])
def test_flags_that_do_not_go_together(llama, args, words):
  args = dict(dict(sweep='', classes=None, out=None), **args)
  with pytest.raises(ValueError, match=words):
    compile_lib.plan(small(llama), **args)


def test_a_mesh_or_batch_that_does_not_divide_is_refused(llama):
  config = small(llama)
  config.mesh.model = 3
  with pytest.raises(ValueError, match='model=3.*are 8 devices'):
    compile_lib.setup(config, jax.devices())
  found = compile_lib.setup(small(llama), jax.devices())
  with pytest.raises(ValueError, match='batch=6 does not divide over the 4'):
    compile_lib.lower(found, batch=6)


# ----------------------------------------------------------------- the command
def run(*args, path=None):
  env = dict(os.environ, XLA_FLAGS='')
  if path:
    env['PYTHONPATH'] = path
  return subprocess.run(
      [sys.executable, '-m', 'peftjax.compile', *args], cwd=ROOT, env=env,
      capture_output=True, text=True, check=False)


CONFIG = '--config=experiments/scale/llama3_8b.py:method=lora,mesh.model=2,'


def test_devices_that_are_not_there(llama, tmp_path):
  out = tmp_path / 'plan.json'
  done = run(f'{CONFIG}backbone={llama},task.length=16,batch=8',
             '--devices=4', '--config.mesh.model=4', f'--out={out}')
  assert not done.returncode, done.stderr[-2000:]
  record = json.loads(out.read_text())
  assert record['mesh'] == dict(data=1, model=4) and record['compiled']
  assert record['fits'] is None
  memory = record['memory']
  assert memory['peak'] >= memory['arguments'] > record['base_bytes_here']
  assert record['flops'] > record['base'] * 8 * 16
  assert record['collectives']['all-reduce']['count']
  assert 'HBM GiB' in done.stdout and 'all-reduce' in done.stdout


@pytest.mark.skipif(HAVE, reason='libtpu is installed')
def test_without_libtpu_it_lowers_and_says_so(llama, tmp_path):
  out = tmp_path / 'plan.json'
  done = run(f'{CONFIG}backbone={llama},task.length=16,batch=8',
             '--topology=v5e:2x4', f'--out={out}')
  assert done.returncode == compile_lib.LOWERED, done.stderr[-2000:]
  assert "pip install 'peftjax[tpu]'" in done.stdout
  assert 'was not compiled' in done.stdout
  record = json.loads(out.read_text())
  assert not record['compiled'] and 'memory' not in record


@pytest.mark.skipif(not HAVE, reason=NO_LIBTPU)
def test_chips_that_are_not_there(llama, tmp_path):
  out = tmp_path / 'plan.json'
  done = run(f'{CONFIG}backbone={llama},task.length=16,batch=8',
             '--topology=v5e:2x4', f'--out={out}')
  assert not done.returncode, done.stderr[-2000:]
  record = json.loads(out.read_text())
  assert record['fits'] and not record['endless']
  assert record['device'] == 'TPU v5 lite' and record['devices'] == 8


def test_the_command_names_what_is_wrong():
  done = run(f'{CONFIG}batch=8', '--topology=v5x:4x4')
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1].startswith(
      "compile: topology='v5x:4x4': unknown kind of TPU 'v5x'")
