"""Makes peftjax/weights/stories260k: the smallest model of llama2.c.

  python -m experiments.pretrain.convert_stories --data ../shared/data \
      --out peftjax/weights/stories260k

The data folder holds checkpoints/stories260k.npz (float32, llama2.c's names)
and checkpoints/stories260k_tokenizer.json; what comes out is a folder in the
hub's layout. Seconds on a CPU. llama2.c rotates neighbouring entries of a head,
this package its two halves: the rows of queries and keys are put in that order.
"""

import json
import os
import shutil
import tempfile

from absl import app
from absl import flags
import numpy as np

from peftjax import trees
from peftjax.data.tokenizer import load_tokenizer
from peftjax.interop import huggingface
from peftjax.models.decoder import Decoder

_DATA = flags.DEFINE_string('data', None, 'folder with checkpoints/')
_OUT = flags.DEFINE_string('out', None, 'folder to write to')

MODEL = Decoder(
    vocab=512, width=64, depth=5, heads=8, kv_heads=4, mlp_dim=172,
    max_positions=512, norm_eps=1e-5, rope_theta=10_000., tied=True, head='lm')
CONFIG = dict(model_type='llama', bos_token_id=1, eos_token_id=2)
TOKENIZER = dict(
    tokenizer_class='PreTrainedTokenizerFast', bos_token='<s>',
    eos_token='</s>', unk_token='<unk>', model_max_length=512)

# Ours -> llama2.c's; layers are stacked there.
_BLOCK = {
    'attn/query': 'wq', 'attn/key': 'wk', 'attn/value': 'wv', 'attn/out': 'wo',
    'mlp/gate': 'w1', 'mlp/down': 'w2', 'mlp/up': 'w3'}


def halves(rows, head_dim):
  """[n * h, d] with pairs (2i, 2i + 1) of a head -> pairs (i, i + h / 2)."""
  n, d = len(rows) // head_dim, rows.shape[1]
  return rows.reshape(n, head_dim // 2, 2, d).swapaxes(1, 2).reshape(rows.shape)


def convert(stored):
  """{llama2.c's name: array} -> params tree of a Decoder."""
  flat = {'tokens/embedding': stored['tok_embeddings'],
          'final_norm/scale': stored['norm']}
  for i in range(MODEL.depth):
    at = f'block_{i}'
    flat[f'{at}/norm1/scale'] = stored['att_norm'][i]
    flat[f'{at}/norm2/scale'] = stored['ffn_norm'][i]
    for ours, theirs in _BLOCK.items():
      w = stored[theirs][i]  # (out, in)
      if theirs in ('wq', 'wk'):
        w = halves(w, MODEL.width // MODEL.heads)
      flat[f'{at}/{ours}/kernel'] = w.T
  return trees.unflatten(flat)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  source = os.path.join(_DATA.value, 'checkpoints', 'stories260k')
  with np.load(f'{source}.npz') as stored:
    params = convert(stored)
  tokenizer = load_tokenizer(f'{source}_tokenizer.json')
  os.makedirs(_OUT.value, exist_ok=True)
  with tempfile.TemporaryDirectory() as work:
    folder = os.path.join(work, 'stories260k')
    huggingface.save(folder, MODEL, params, like=CONFIG)
    _write(folder, 'tokenizer.json', json.loads(tokenizer.core.to_str()), None)
    _write(folder, 'tokenizer_config.json', TOKENIZER, 1)
    for name in os.listdir(folder):  # A card that is there stays.
      shutil.copyfile(
          os.path.join(folder, name), os.path.join(_OUT.value, name))


def _write(folder, name, value, indent):
  with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
    json.dump(value, f, indent=indent, ensure_ascii=False)
    f.write('\n')


if __name__ == '__main__':
  flags.mark_flags_as_required(['data', 'out'])
  app.run(main)
