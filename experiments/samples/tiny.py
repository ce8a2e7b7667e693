"""Tiny random backbones for `:runlocal`.

Made once below $PEFTJAX_CACHE, or ~/.cache/peftjax, in Hugging Face's layout:
the same code loads them as real ones. The tokenizer is that of stories260k.
"""

import json
import os
import tempfile

import jax
import jax.numpy as jnp

from peftjax import bases
from peftjax.data import builders
from peftjax.interop import families
from peftjax.interop import huggingface
from peftjax.interop import vit
from peftjax.models.decoder import Decoder
from peftjax.models.encoder import Encoder
from peftjax.version import VERSION

_IMAGES = dict(
    image_processor_type='ViTImageProcessor', do_resize=True,
    size=dict(height=32, width=32), do_rescale=True, rescale_factor=1 / 255,
    do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)
_SIZES = dict(vocab=512, width=32, depth=2, heads=2, mlp_dim=64)
MODELS = {
    'bert': Encoder(**_SIZES, positions=128),
    'gpt2': Decoder(
        **_SIZES, activation='gelu_new', gated=False, mlp_bias=True,
        qkv_bias=True, out_bias=True, fused_qkv=True, position='learned',
        max_positions=128, norm='layer'),
    'vit': vit.build(dict(
        model_type='vit', hidden_size=32, num_hidden_layers=2, image_size=32,
        num_attention_heads=2, intermediate_size=64, patch_size=8))}


def tiny(kind):
  """The folder of a tiny 'bert', 'gpt2' or 'vit', made if it is not there."""
  cache = builders.cache_folder()
  folder = os.path.join(cache, f'tiny_{kind}_{VERSION}')
  if not os.path.isfile(os.path.join(folder, 'config.json')):
    model = MODELS[kind]
    inputs = families.example(model, dict(image_size=32))
    params = jax.jit(model.init)(jax.random.key(0), *(
        jnp.zeros(x.shape, x.dtype) for x in inputs))['params']
    os.makedirs(cache, exist_ok=True)
    with tempfile.TemporaryDirectory() as beside:
      with open(os.path.join(beside, 'preprocessor_config.json'), 'w',
                encoding='utf-8') as f:
        json.dump(_IMAGES, f)
      huggingface.save(
          folder, model, params, kind, overwrite=True, companions=beside
          if kind == 'vit' else bases.find('stories260k'))
  return folder
