"""Checkpoint folders: what is read, what is refused, what is written."""

import json
import os
import shutil
import tracemalloc

import jax
from jax.sharding import NamedSharding, PartitionSpec
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from peftjax import trees
from peftjax.interop import families
from peftjax.interop import files
from peftjax.interop import huggingface
from peftjax.interop.tensors import stored_index, stored_shape, Tensor
from peftjax.interop.tensors import to_ours, to_stored
from peftjax.models.encoder import Encoder
from peftjax.models.vit import ViT

TINY = dict(vocab=11, width=8, depth=2, heads=2, mlp_dim=12, positions=16)


@pytest.fixture(scope='module')
def tiny():
  """A random encoder without a head, and its params."""
  model = Encoder(**TINY)
  init = lambda: model.init(jax.random.key(0), np.zeros((1, 4), np.int32))
  shapes = jax.eval_shape(init)['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
  return model, params


@pytest.fixture
def folder(tiny, tmp_path):
  path = tmp_path / 'model'
  huggingface.save(path, *tiny, model_type='bert')
  return path


def edit(folder, change, file='model.safetensors'):
  """Rewrites a file's tensors by `change(tensors)`."""
  tensors = safetensors.numpy.load_file(folder / file)
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / file)


def same(a, b):
  a, b = trees.flatten(a), trees.flatten(b)
  assert set(a) == set(b)
  for path, value in a.items():
    np.testing.assert_array_equal(value, b[path], err_msg=path)


def test_round_trip(tiny, folder):
  _, params = tiny
  model, loaded, config = huggingface.load(folder)
  same(loaded, params)
  assert model == tiny[0]
  assert config['hidden_size'] == 8 and config['model_type'] == 'bert'


def test_scanned_is_the_unrolled_one_stacked(tiny, folder):
  model, loaded, _ = huggingface.load(folder, scan=True)
  same(loaded, trees.stack(tiny[1]))
  again = folder.parent / 'again'
  huggingface.save(again, model, loaded, model_type='bert')
  same(huggingface.load(again).params, tiny[1])


def test_many_files_and_an_index(tiny, tmp_path):
  path = tmp_path / 'sharded'
  huggingface.save(path, *tiny, model_type='bert', shard_bytes=600)
  written = sorted(p.name for p in path.glob('*.safetensors'))
  assert len(written) > 2 and f'-of-{len(written):05}' in written[0]
  same(huggingface.load(path).params, tiny[1])
  os.remove(path / written[1])
  with pytest.raises(FileNotFoundError, match=written[1]):
    huggingface.load(path)


def test_index_that_names_what_is_not_there(tiny, tmp_path):
  path = tmp_path / 'sharded'
  huggingface.save(path, *tiny, model_type='bert', shard_bytes=600)
  index = path / files.INDEX
  said = json.loads(index.read_text())
  said['weight_map']['no.such.tensor'] = next(iter(
      said['weight_map'].values()))
  index.write_text(json.dumps(said))
  with pytest.raises(ValueError, match='no.such.tensor'):
    huggingface.load(path)


def test_each_device_reads_its_part(tiny, folder, monkeypatch):
  mesh = jax.make_mesh((2,), ('m',), devices=jax.devices()[:2])
  read = []
  whole = files.Files.read

  def spy(self, name, index=None):
    value = whole(self, name, index)
    read.append((name, value.shape))
    return value

  monkeypatch.setattr(files.Files, 'read', spy)

  def shardings(shapes):
    spec = lambda s: PartitionSpec(*[None] * (len(s.shape) - 1), 'm') if (
        len(s.shape) > 1 and s.shape[-1] % 2 == 0) else PartitionSpec()
    return jax.tree.map(lambda s: NamedSharding(mesh, spec(s)), shapes)

  for scan in (False, True):
    read.clear()
    loaded = huggingface.load(folder, scan=scan, shardings=shardings).params
    want = trees.stack(tiny[1]) if scan else tiny[1]
    same(loaded, want)
    kernels = [s for n, s in read if n.endswith('intermediate.dense.weight')]
    assert kernels and all(s == (6, 8) for s in kernels)  # stored [12, 8]
  kernel = trees.flatten(loaded)['blocks/mlp/up/kernel']
  assert {s.data.shape for s in kernel.addressable_shards} == {(2, 8, 6)}


@pytest.mark.parametrize('scan', [False, True])
def test_one_tensor_at_a_time(scan, tmp_path):
  model = Encoder(vocab=64, width=128, depth=6, heads=2, mlp_dim=512,
                  positions=16)
  shapes = jax.eval_shape(
      model.init, jax.random.key(0), np.zeros((1, 4), np.int32))['params']
  params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
  huggingface.save(tmp_path / 'm', model, params, model_type='bert')
  leaf = 128 * 512 * 4 * (6 if scan else 1)  # bytes of the largest
  huggingface.load(tmp_path / 'm', scan=scan)  # what is imported and cached
  tracemalloc.start()
  loaded = huggingface.load(tmp_path / 'm', scan=scan).params
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  total = trees.size(loaded)
  assert total > 4e6
  # Arrays may or may not share the host's memory on CPU, so at most all of them
  # are counted; and one tensor, before and after its dtype.
  assert peak < total + 2 * leaf + 2e5, (peak, total, leaf)


def test_bfloat16_files_give_float32_params(tiny, tmp_path):
  path = tmp_path / 'bf16'
  huggingface.save(path, *tiny, model_type='bert', dtype=jnp.bfloat16)
  assert json.loads((path / 'config.json').read_text())['dtype'] == 'bfloat16'
  stored = safetensors.numpy.load_file(path / 'model.safetensors')
  assert {v.dtype for v in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
  loaded = huggingface.load(path).params
  want = jax.tree.map(
      lambda v: v.astype(ml_dtypes.bfloat16).astype(np.float32), tiny[1])
  same(loaded, want)
  half = huggingface.load(path, param_dtype=jnp.bfloat16).params
  assert {v.dtype for v in jax.tree.leaves(half)} == {jnp.dtype('bfloat16')}


def test_new_head_where_the_file_has_none(tiny, folder):
  model, loaded, _ = huggingface.load(folder, head='classify', classes=3)
  flat = trees.flatten(loaded)
  assert model.classes == 3 and flat['head/out/kernel'].shape == (8, 3)
  assert not np.any(flat['head/out/kernel'])
  assert np.any(flat['head/dense/kernel'])
  body = {p: v for p, v in flat.items() if not p.startswith('head/')}
  same(body, trees.flatten(tiny[1]))
  # What was made is kept by a round trip, prefix and all.
  again = folder.parent / 'headed'
  huggingface.save(again, model, loaded, model_type='bert')
  reread = huggingface.load(again)
  assert reread.model.head == 'classify' and reread.model.classes == 3
  same(reread.params, loaded)
  # The same file without its head; and with an output layer of another size.
  same(huggingface.load(again, head=None).params, tiny[1])
  wider = trees.flatten(huggingface.load(again, classes=5).params)
  assert wider['head/out/kernel'].shape == (8, 5)
  np.testing.assert_array_equal(wider['head/dense/kernel'],
                                flat['head/dense/kernel'])


def test_names_of_labels_are_kept(tiny, folder):
  model, loaded, config = huggingface.load(folder, head='classify', classes=2)
  named = {**config, 'id2label': {'0': 'bad', '1': 'good'},
           'label2id': {'bad': 0, 'good': 1}}
  again = folder.parent / 'named'
  huggingface.save(again, model, loaded, like=named)
  said = families.read_config(again)
  assert said['id2label'] == named['id2label']
  other = huggingface.load(folder, head='classify', classes=3)
  huggingface.save(again, other.model, other.params, like=named,
                   overwrite=True)
  assert len(families.read_config(again)['id2label']) == 3


def test_missing_left_over_and_wrong_shapes_in_one_message(folder):
  def change(t):
    del t['embeddings.LayerNorm.bias']
    t['embeddings.LayerNorm.weight'] = np.ones(9, np.float32)
    t['encoder.layer.2.output.dense.bias'] = np.ones(8, np.float32)

  edit(folder, change)
  with pytest.raises(ValueError) as e:
    huggingface.load(folder)
  text = str(e.value)
  assert 'missing embeddings.LayerNorm.bias (8,)' in text
  assert 'embeddings.LayerNorm.weight (9,), expected (8,)' in text
  assert 'left over encoder.layer.2.output.dense.bias (8,)' in text


def test_not_a_number(folder):
  def change(t):
    t['embeddings.LayerNorm.bias'][3] = np.nan

  edit(folder, change)
  with pytest.raises(ValueError, match='embeddings.LayerNorm.bias.*finite'):
    huggingface.load(folder)


def test_damaged_file(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match='no complete safetensors'):
    huggingface.load(folder)


def test_pickles_are_refused(folder):
  os.rename(folder / 'model.safetensors', folder / 'pytorch_model.bin')
  with pytest.raises(ValueError, match='pickled.*pytorch_model.bin'):
    huggingface.load(folder)


def test_no_weights_no_config_no_folder(folder):
  os.remove(folder / 'model.safetensors')
  with pytest.raises(FileNotFoundError, match='neither model.safetensors'):
    huggingface.load(folder)
  os.remove(folder / 'config.json')
  with pytest.raises(FileNotFoundError, match='no config.json'):
    huggingface.load(folder)
  shutil.rmtree(folder)
  (folder.parent / 'modell').mkdir()
  with pytest.raises(FileNotFoundError, match="nearest: 'modell'|modell"):
    huggingface.load(folder)


@pytest.mark.parametrize('text, match', [
    ('{"a": 1}', "no 'model_type'"), ('{', 'is not JSON'),
    ('{"model_type": "bertt"}', "'bertt' is not supported.*bert"),
    ('{"model_type": "bert", "hidden_act": "gelluu"}', 'gelluu')])
def test_bad_config(folder, text, match):
  (folder / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=match):
    huggingface.load(folder)


def test_save_refuses_before_it_writes(tiny, tmp_path):
  model, params = tiny
  path = tmp_path / 'out'
  path.mkdir()
  (path / 'notes.txt').write_text('mine')
  with pytest.raises(FileExistsError, match='notes.txt'):
    huggingface.save(path, model, params, model_type='bert')
  flat = trees.flatten(params)
  flat['block_0/attn/query/kernel'] = np.full((8, 8), np.inf, np.float32)
  bad = trees.unflatten(flat)
  with pytest.raises(ValueError, match='block_0/attn/query/kernel'):
    huggingface.save(path, model, bad, model_type='bert', overwrite=True)
  assert [p.name for p in tmp_path.iterdir()] == ['out']
  assert (path / 'notes.txt').read_text() == 'mine'
  lacking = {k: v for k, v in params.items() if k != 'embed_norm'}
  with pytest.raises(ValueError, match='embed_norm/bias'):
    huggingface.save(path, model, lacking, model_type='bert', overwrite=True)
  with pytest.raises(ValueError, match='model_type'):
    huggingface.save(path, model, params, overwrite=True)


def test_companions_travel(tiny, folder, tmp_path):
  (folder / 'tokenizer.json').write_text('{}')
  huggingface.save(tmp_path / 'b', *tiny, model_type='bert', companions=folder)
  assert (tmp_path / 'b' / 'tokenizer.json').read_text() == '{}'


def test_packaged_by_name(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  model, params, config = huggingface.load('stories260k')
  assert model.head == 'lm' and config['model_type'] == 'llama'
  assert trees.count(params) == 260032
  with pytest.raises(FileNotFoundError, match='stories260k'):
    huggingface.load('stories260')


def test_example_inputs():
  (ids,) = families.example(Encoder(**TINY))
  assert ids.dtype == jnp.int32 and ids.shape[0] == 1
  (images,) = families.example(ViT(), dict(image_size=[32, 48]))
  assert images.shape == (1, 32, 48, 3)


@pytest.mark.parametrize('kind, shape', [
    ('same', (3, 4)), ('linear', (3, 4)), ('conv', (2, 3, 4, 5)),
    ('reshape', (6, 2))])
def test_kinds_are_undone_and_slices_agree(kind, shape):
  tensor = Tensor('x', kind, shape=(3, 4) if kind == 'reshape' else ())
  leaf = np.arange(np.prod(shape)).reshape(shape)
  stored = to_stored(kind, leaf, tensor.shape or None)
  assert stored.shape == stored_shape(tensor, shape)
  np.testing.assert_array_equal(to_ours(kind, stored, shape), leaf)
  index = tuple(slice(1, n) for n in shape)
  at = stored_index(kind, index)
  if at is not None:
    np.testing.assert_array_equal(to_ours(kind, stored[at], None), leaf[index])


def test_torchs_own_layouts():
  torch = pytest.importorskip('torch')
  x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
  conv = torch.nn.Conv2d(3, 4, 3, padding='same')
  kernel = to_ours('conv', conv.weight.detach().numpy(), None)
  y = jax.lax.conv_general_dilated(
      x, jnp.asarray(kernel), (1, 1), 'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC')) + conv.bias.detach().numpy()
  want = conv(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
  np.testing.assert_allclose(y, want.detach().numpy(), atol=1e-5)
  linear = torch.nn.Linear(3, 4, bias=False)
  kernel = to_ours('linear', linear.weight.detach().numpy(), None)
  np.testing.assert_allclose(
      x @ kernel, linear(torch.tensor(x)).detach().numpy(), atol=1e-6)
