"""Tiny checkpoint folders with a tokenizer of words, and sets of few lines."""

import json

import jax
import numpy as np
import pytest
import tokenizers

from peftjax import config as config_lib
from peftjax.interop import huggingface
from peftjax.interop import vit
from peftjax.models.decoder import Decoder
from peftjax.models.encdec import EncDec
from peftjax.models.encoder import Encoder

WORDS = ('good bad film book red blue cat dog one two three four a b c d e '
         'lily rome ran to from and').split()
SPECIAL = dict(pad='[PAD]', unk='[UNK]', cls='[CLS]', sep='[SEP]', bos='<s>',
               eos='</s>')
VOCAB = len(WORDS) + len(SPECIAL)

MODELS = dict(
    bert=Encoder(vocab=VOCAB, width=16, depth=1, heads=2, mlp_dim=32,
                 positions=16, scan=True),
    llama=Decoder(vocab=VOCAB, width=16, depth=1, heads=2, mlp_dim=32,
                  scan=True),
    t5=EncDec(vocab=VOCAB, width=16, depth=1, heads=2, head_dim=8, mlp_dim=32,
              scan=True))


def write_tokenizer(folder, frame):
  """A tokenizer of words; frame: what stands around one text and two."""
  ids = {w: i for i, w in enumerate([*SPECIAL.values(), *WORDS])}
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, '[UNK]'))
  core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  core.add_special_tokens(list(SPECIAL.values()))
  if frame:
    used = {t.split(':')[0] for t in ' '.join(frame).split()} - {'$A', '$B'}
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=frame[0], pair=frame[1],
        special_tokens=[(t, ids[t]) for t in sorted(used)])
  core.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(
      {f'{k}_token': v for k, v in SPECIAL.items()}))


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
  """{'bert', 'llama', 't5': path of a checkpoint with random weights}."""
  out, ids = {}, np.ones((1, 4), np.int32)
  frames = dict(
      bert=('[CLS] $A [SEP]', '[CLS] $A [SEP] $B:1 [SEP]:1'),
      llama=('<s> $A', '<s> $A <s>:1 $B:1'), t5=('$A </s>', '$A </s> $B </s>'))
  for name, model in MODELS.items():
    path = tmp_path_factory.mktemp('checkpoints') / name
    args = (ids, ids) if name == 't5' else (ids,)
    params = jax.jit(model.init)(jax.random.key(0), *args)['params']
    huggingface.save(path, model, params, model_type=name)
    write_tokenizer(path, frames[name])
    out[name] = str(path)
  return out


@pytest.fixture(scope='session')
def vit_folder(tmp_path_factory):
  """Path of a tiny vision transformer that crops 12 of 14 pixels."""
  path = tmp_path_factory.mktemp('checkpoints') / 'vit'
  model = vit.build(dict(
      model_type='vit', hidden_size=16, num_hidden_layers=1, patch_size=4,
      num_attention_heads=2, image_size=12, intermediate_size=32), head=None)
  params = jax.jit(model.init)(
      jax.random.key(0), np.zeros((1, 12, 12, 3), np.float32))['params']
  huggingface.save(path, model, params, model_type='vit')
  (path / 'preprocessor_config.json').write_text(json.dumps(dict(
      image_processor_type='CLIPImageProcessor', size=dict(shortest_edge=14),
      crop_size=dict(height=12, width=12), image_mean=[.1, .2, .3],
      image_std=[.7, .6, .5])))
  return str(path)


@pytest.fixture
def write(tmp_path):
  """write(rows) -> name of a data set whose three splits are these rows."""

  def one(rows, name='set'):
    folder = tmp_path / name
    folder.mkdir()
    for split in ('train', 'validation', 'test'):
      (folder / f'{split}.jsonl').write_text(
          ''.join(json.dumps(r) + '\n' for r in rows))
    return f'file:{folder}'

  return one


@pytest.fixture
def make_config():
  """`make_config(weights, task, data, **more)`, a run of seconds."""
  return _make_config


def _make_config(weights, task, data, **more):
  """more: dotted keys with '__' for '.'."""
  c = config_lib.defaults()
  c.method = (dict(name='selective.full'),)
  c.steps, c.batch, c.eval_batch, c.log_every = 30, 8, 8, 10
  c.checkpoint_every, c.mesh = 0, dict(data=1, model=1)
  c.optim.lr = 1e-2
  c.data.train = 0
  c.model.weights, c.model.scan = weights, True
  c.data.name, c.task.name, c.task.length = data, task, 12
  for key, value in more.items():
    node = c
    *path, last = key.split('__')
    for part in path:
      node = node[part]
    node[last] = value
  return c
