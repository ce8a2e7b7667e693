"""Checkpoints of T5, T5 v1.1 and Flan-T5: names and settings.

Whether logits are read with the table of token vectors, scaled, or with
`lm_head`, unscaled, stands in config.json as scale_decoder_outputs, in older
files as tie_word_embeddings; newer ones have the latter true in either case.
"""

import numpy as np

from peftjax.interop.tensors import Tensor
from peftjax.method import nearest
from peftjax.models.encdec import EncDec
from peftjax.models.layers import ACTIVATIONS

MODEL_TYPES = ('t5',)

_CLASS = {None: 'T5Model', 'lm': 'T5ForConditionalGeneration'}

# Settings by our attribute: (key, default).
_KEYS = {
    'vocab': ('vocab_size', 32128),
    'width': ('d_model', 512),
    'depth': ('num_layers', 6),
    'heads': ('num_heads', 8),
    'head_dim': ('d_kv', 64),
    'mlp_dim': ('d_ff', 2048),
    'buckets': ('relative_attention_num_buckets', 32),
    'furthest': ('relative_attention_max_distance', 128),
    'eps': ('layer_norm_epsilon', 1e-6),
}

_ATTENTION = dict(query='q', key='k', value='v', out='o')
# Tables that are copies of `shared`.
_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')


def _tied(config):
  return bool(config.get('scale_decoder_outputs',
                         config.get('tie_word_embeddings', True)))


def _perceptron(config):
  """(activation, gated) of config.json's feed_forward_proj."""
  value = config.get('feed_forward_proj', 'relu')
  gate, _, act = value.rpartition('-')
  if gate not in ('', 'gated') or act not in ACTIVATIONS:
    known = [p + a for a in ACTIVATIONS for p in ('', 'gated-')]
    raise ValueError(f'feed_forward_proj is {value!r}{nearest(value, known)}')
  # The name is older than the activation that the checkpoints use.
  return 'gelu_new' if value == 'gated-gelu' else act, bool(gate)


def build(config, *, head='lm', classes=None, **options):
  """Settings of a checkpoint (the dict of config.json) -> EncDec.

  Raises:
    ValueError: a setting that EncDec has no counterpart of.
  """
  if head not in _CLASS:
    raise ValueError(f'head {head!r}: an encoder-decoder has None (hidden '
                     f"states) or 'lm'{nearest(str(head), ('lm',))}")
  if classes is not None:
    raise ValueError(f"classes={classes}: heads of an encoder-decoder are None "
                     "and 'lm', which have none")
  args = {ours: config.get(key, default)
          for ours, (key, default) in _KEYS.items()}
  args['act'], args['gated'] = _perceptron(config)
  return EncDec(**args, decoder_depth=config.get('num_decoder_layers'),
                tied=_tied(config), head=head, **options)


def names(model, model_type):
  """{our unrolled path: Tensor} of every parameter of the model."""
  del model_type
  out = {'tokens/embedding': Tensor('shared.weight')}
  mlp = dict(up='wi', down='wo')
  if model.gated:
    mlp = dict(gate='wi_0', up='wi_1', down='wo')
  decoder_depth = (
      model.depth if model.decoder_depth is None else model.decoder_depth)
  for stack, depth in (('encoder', model.depth), ('decoder', decoder_depth)):
    out[f'{stack}/norm/scale'] = Tensor(f'{stack}.final_layer_norm.weight')
    out[f'{stack}/distance/table'] = Tensor(
        f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight')
    parts = [('norm1', 'attn', 'SelfAttention', _ATTENTION)]
    if stack == 'decoder':
      parts.append(('cross_norm', 'cross_attn', 'EncDecAttention', _ATTENTION))
    parts.append(('norm2', 'mlp', 'DenseReluDense', mlp))
    for i in range(depth):
      for j, (norm, layer, theirs, leaves) in enumerate(parts):
        ours, at = f'{stack}/block_{i}', f'{stack}.block.{i}.layer.{j}'
        out[f'{ours}/{norm}/scale'] = Tensor(f'{at}.layer_norm.weight')
        for name, other in leaves.items():
          out[f'{ours}/{layer}/{name}/kernel'] = Tensor(
              f'{at}.{theirs}.{other}.weight', 'linear')
  if model.head == 'lm' and not model.tied:
    out['lm_head/kernel'] = Tensor('lm_head.weight', 'linear')
  return out


def prefix(model_type):
  """Of the body's tensors in files that hold a head: none."""
  del model_type
  return ''


def ignored(model, model_type):
  """Regexes of stored names that the model does not read."""
  del model_type
  # The table in cross-attention is left over from an early conversion.
  out = (r'^(en|de)coder\.embed_tokens\.weight$',
         r'EncDecAttention\.relative_attention_bias\.weight$')
  return out if model.head == 'lm' else (*out, r'^lm_head\.weight$')


def before_load(read, stored, config):
  """Tensors that a file leaves out, or holds twice, because they are tied.

  Returns:
    ({name: array}, names that were read).

  Raises:
    ValueError: lm_head differs from the table although config.json ties them.
  """
  made, used, tied, head = {}, set(), _tied(config), 'lm_head.weight'
  # Which one of several tied names stays in a file is up to who wrote it.
  tables = [n for n in ('shared.weight', *_COPIES, head)
            if n in stored and (tied or n != head)]
  if not tables:
    return made, used
  if tables[0] != 'shared.weight':
    made['shared.weight'] = read(tables[0])
  if head in stored and tied:
    used.add(head)
    if not np.array_equal(read(head), read(tables[0])):
      raise ValueError(
          f'{head} and {tables[0]} differ, but config.json ties them; expected '
          'scale_decoder_outputs (or, where that is absent, '
          'tie_word_embeddings) to be false')
  elif not tied and head not in stored and (
      _CLASS['lm'] in config.get('architectures', ())):
    # Written while they were one tensor: each goes its own way from here.
    made[head] = read(tables[0])
  return made, used


def export(model, model_type):
  """The dict of config.json for a model, such that transformers opens it."""
  del model_type
  if model.gated and model.act == 'gelu':
    raise ValueError("act='gelu' of a gated perceptron has no name in "
                     "config.json, where 'gated-gelu' means 'gelu_new'")
  act = 'gelu' if model.gated and model.act == 'gelu_new' else model.act
  config = {key: getattr(model, ours) for ours, (key, _) in _KEYS.items()}
  return config | dict(
      architectures=[_CLASS[model.head]], is_encoder_decoder=True,
      num_decoder_layers=(model.depth if model.decoder_depth is None
                          else model.decoder_depth),
      feed_forward_proj='gated-' + act if model.gated else act,
      dense_act_fn=model.act, is_gated_act=model.gated,
      tie_word_embeddings=model.tied, scale_decoder_outputs=model.tied)


def after_save(tensors, model, config):
  """Tokens that generation needs, where the checkpoint's own are not known."""
  del model
  for key, value in dict(pad_token_id=0, eos_token_id=1,
                         decoder_start_token_id=0).items():
    config.setdefault(key, value)
  return tensors
