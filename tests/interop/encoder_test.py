"""Encoders against transformers, both ways, and one real checkpoint."""

import gzip
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from peftjax import trees
from peftjax.interop import encoder
from peftjax.interop import huggingface

SIZES = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2,
             num_attention_heads=4, intermediate_size=24,
             max_position_embeddings=14)
BERT = ('Bert', dict(SIZES, hidden_act='gelu'))
ROBERTA = ('Roberta', dict(SIZES, type_vocab_size=1, pad_token_id=1,
                           layer_norm_eps=0.1, hidden_act='relu'))
CAMEMBERT = ('Camembert', dict(SIZES, type_vocab_size=1, pad_token_id=2,
                               hidden_act='gelu_new'))
DISTILBERT = ('DistilBert', dict(
    vocab_size=31, dim=16, n_layers=2, n_heads=2, hidden_dim=24,
    max_position_embeddings=14, activation='relu'))
ELECTRA = ('Electra', dict(SIZES, embedding_size=8, hidden_act='relu',
                           layer_norm_eps=0.1))
WIDE = ('Electra', dict(SIZES, embedding_size=16, hidden_act='silu'))
CASES = [
    (BERT, None), (BERT, 'classify'), (BERT, 'mlm'),
    (ROBERTA, None), (ROBERTA, 'classify'), (ROBERTA, 'mlm'),
    (CAMEMBERT, 'tag'),
    (DISTILBERT, 'classify'), (DISTILBERT, 'mlm'),
    (ELECTRA, 'classify'), (ELECTRA, 'mlm'), (WIDE, None)]


@pytest.fixture(scope='module')
def torch():
  module = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  module.set_num_threads(1)
  return module


def theirs(torch, family, head, seed=0):
  """A random transformers model; nothing of it at zero or one."""
  import transformers  # an extra: only these tests need it
  name, sizes = family
  config = getattr(transformers, f'{name}Config')(
      **sizes, **(dict(num_labels=3) if head in ('classify', 'tag') else {}))
  cls = getattr(transformers, name + encoder._CLASS[head])
  # Without a head nothing here reads the pooler.
  pooler = head is None and name in ('Bert', 'Roberta')
  options = dict(add_pooling_layer=False) if pooler else {}
  torch.manual_seed(seed)
  model = cls(config, **options).eval()
  with torch.no_grad():
    for p in model.parameters():
      p += 0.3 * torch.randn_like(p)
  return model, lambda path: cls.from_pretrained(
      path, output_loading_info=True, **options)


def inputs(model):
  """ids, mask and types (None where there are none) with padded rows."""
  rng = np.random.default_rng(0)
  ids = rng.integers(3, 31, (3, 9)).astype(np.int32)
  mask = np.arange(9) < np.array([[9], [6], [1]])
  ids[~mask] = model.padding or 0
  types = None
  if model.types > 1:
    types = (np.arange(9) > 3).astype(np.int32)[None].repeat(3, 0)
  return ids, mask, types


def run(torch, model, ids, mask, types):
  arrays = dict(input_ids=ids, attention_mask=mask, token_type_ids=types)
  with torch.no_grad():
    out = model(**{k: torch.tensor(v.astype(np.int64))
                   for k, v in arrays.items() if v is not None})
  return out[0].numpy()


@pytest.mark.parametrize(
    'family, head', CASES, ids=[f'{f[0]}-{h}' for f, h in CASES])
def test_equals_transformers_both_ways(torch, tmp_path, family, head):
  source, reload = theirs(torch, family, head)
  source.save_pretrained(tmp_path / 'a')
  model, params, config = huggingface.load(tmp_path / 'a')
  assert model.head == head
  arrays = inputs(model)
  real = slice(None) if head == 'classify' else arrays[1]
  want = run(torch, source, *arrays)
  got = jax.jit(model.apply)({'params': params}, *arrays)
  assert got.dtype == jnp.float32 and np.abs(want).max() > 0.3
  np.testing.assert_allclose(got[real], want[real], atol=1e-4, rtol=0)

  # Through save with what this family's module says alone, not with `like`.
  huggingface.save(tmp_path / 'b', model, params,
                   model_type=config['model_type'])
  again, info = reload(tmp_path / 'b')
  assert not any(info.values()), info
  np.testing.assert_allclose(run(torch, again.eval(), *arrays)[real],
                             want[real], atol=1e-4, rtol=0)
  assert type(again).__name__ == json.loads(
      (tmp_path / 'b' / 'config.json').read_text())['architectures'][0]


def test_masked_and_scanned_as_transformers(torch, tmp_path):
  """A body under a new head, stacked; padding without a mask differs."""
  source, _ = theirs(torch, BERT, 'mlm')
  source.save_pretrained(tmp_path)
  model, params, _ = huggingface.load(
      tmp_path, head=None, scan=True, remat=True)
  ids, mask, types = inputs(model)
  want = run(torch, source.bert, ids, mask, types)
  got = jax.jit(model.apply)({'params': params}, ids, mask, types)
  np.testing.assert_allclose(got[mask], want[mask], atol=1e-4, rtol=0)
  blind = model.apply({'params': params}, ids, None, types)
  assert np.abs(blind[mask] - want[mask]).max() > 1e-2


def test_new_head_on_a_body(torch, tmp_path):
  """BERT's pooler is the file's; the classifier is new and zero."""
  source, _ = theirs(torch, BERT, 'classify')
  source.bert.save_pretrained(tmp_path)
  model, params, _ = huggingface.load(tmp_path, head='classify', classes=5)
  assert not np.any(params['head']['out']['kernel'])
  assert params['head']['out']['kernel'].shape == (16, 5)
  np.testing.assert_array_equal(
      params['head']['dense']['kernel'],
      source.bert.pooler.dense.weight.detach().numpy().T)
  tagger, params, _ = huggingface.load(tmp_path, head='tag')
  assert tagger.classes == 3 and set(params['head']) == {'out'}


def test_names_of_converted_files(torch, tmp_path):
  """gamma and beta; copies of the word table; the head for sentence order."""
  source, _ = theirs(torch, BERT, 'mlm')
  source.save_pretrained(tmp_path)
  path = tmp_path / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  table = tensors['bert.embeddings.word_embeddings.weight']
  old = {n.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
      'LayerNorm.bias', 'LayerNorm.beta'): v for n, v in tensors.items()}
  old |= {'cls.predictions.decoder.weight': table.copy(),
          'cls.seq_relationship.weight': np.ones((2, 16), np.float32),
          'bert.pooler.dense.weight': np.ones((16, 16), np.float32)}
  want = trees.flatten(huggingface.load(tmp_path).params)
  safetensors.numpy.save_file(old, path)
  got = trees.flatten(huggingface.load(tmp_path).params)
  assert set(got) == set(want)
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
  safetensors.numpy.save_file({**old, 'bert.pooled': table.copy()}, path)
  with pytest.raises(ValueError, match='left over bert.pooled'):
    huggingface.load(tmp_path)


@pytest.mark.parametrize('changes, head, match', [
    (dict(hidden_act='gelu_fast'), None, "hidden_act is 'gelu_fast'.*gelu"),
    (dict(position_embedding_type='relative_key'), None,
     "position_embedding_type is 'relative_key'.*'absolute'"),
    (dict(is_decoder=True), None, 'is_decoder is True.*False'),
    (dict(tie_word_embeddings=False), 'mlm', 'tie_word_embeddings is False'),
    (dict(model_type='roberta', pad_token_id=None), None, 'pad_token_id'),
])
def test_settings_that_are_refused(changes, head, match):
  config = dict(SIZES, model_type='bert', **{
      k: v for k, v in changes.items() if k != 'model_type'})
  config |= changes
  with pytest.raises(ValueError, match=match):
    encoder.build(config, head=head)


# ------------------------------------------------------- a real checkpoint


def data():
  folder = pathlib.Path(
      os.environ.get('PEFTJAX_DATA') or
      pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data')
  if not (folder / 'checkpoints' / 'all-MiniLM-L6-v2').is_dir():
    pytest.skip('no data folder with all-MiniLM-L6-v2: set PEFTJAX_DATA')
  return folder


def test_sentence_similarity_of_minilm():
  """Mean-pooled cosines on STS-B's open part: Spearman's rho above 0.80."""
  tokenizers = pytest.importorskip('tokenizers')
  stats = pytest.importorskip('scipy.stats')
  folder = data()
  path = folder / 'text' / 'stsb_open' / 'test.jsonl.gz'
  if not path.is_file():
    pytest.skip(f'no {path.name} of stsb_open in the data folder')
  with gzip.open(path, 'rt', encoding='utf-8') as f:
    rows = [json.loads(line) for line in f]
  checkpoint = folder / 'checkpoints' / 'all-MiniLM-L6-v2'
  tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / 'tokenizer.json'))
  tokenizer.enable_truncation(64)
  tokenizer.no_padding()
  model, params, _ = huggingface.load(checkpoint, head='pool', scan=True)
  texts = [r[key] for key in ('text_a', 'text_b') for r in rows]
  coded = [e.ids for e in tokenizer.encode_batch(texts)]
  pool = jax.jit(model.apply)
  out = np.zeros((len(texts), model.width), np.float32)
  # Most texts are short, and attention masks the rest: two shapes, not one.
  for low, width in ((0, 16), (16, 64)):
    rows_of = [i for i, c in enumerate(coded) if low < len(c) <= width]
    for start in range(0, len(rows_of), 64):
      part = rows_of[start:start + 64]
      ids = np.zeros((64, width), np.int32)
      for row, i in zip(ids, part):
        row[:len(coded[i])] = coded[i]
      out[part] = pool({'params': params}, ids, ids != 0)[:len(part)]
  out /= np.linalg.norm(out, axis=1, keepdims=True)
  a, b = np.split(out, 2)
  rho = stats.spearmanr((a * b).sum(1), [r['label'] for r in rows]).statistic
  assert rho > 0.80
