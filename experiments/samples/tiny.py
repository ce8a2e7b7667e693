"""Tiny random backbones with a tokenizer, for `:runlocal`.

Made once below $PEFTJAX_CACHE, or ~/.cache/peftjax, in Hugging Face's layout:
the same code loads them as real ones. Their tokenizer is that of stories260k.
"""

import os

import jax
import jax.numpy as jnp

from peftjax import bases
from peftjax.interop import huggingface
from peftjax.models.decoder import Decoder
from peftjax.models.encoder import Encoder
from peftjax.version import VERSION

_SIZES = dict(vocab=512, width=32, depth=2, heads=2, mlp_dim=64)
MODELS = {
    'bert': Encoder(**_SIZES, positions=128),
    'gpt2': Decoder(
        **_SIZES, activation='gelu_new', gated=False, mlp_bias=True,
        qkv_bias=True, out_bias=True, fused_qkv=True, position='learned',
        max_positions=128, norm='layer')}


def tiny(kind):
  """The folder of a tiny 'bert' or 'gpt2', made if it is not there."""
  cache = os.environ.get('PEFTJAX_CACHE') or os.path.join(
      os.path.expanduser('~'), '.cache', 'peftjax')
  folder = os.path.join(cache, f'tiny_{kind}_{VERSION}')
  if not os.path.isfile(os.path.join(folder, 'config.json')):
    model = MODELS[kind]
    ids = jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids)['params']
    os.makedirs(cache, exist_ok=True)
    huggingface.save(folder, model, params, kind, overwrite=True,
                     companions=bases.find('stories260k'))
  return folder
