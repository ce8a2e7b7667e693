"""Checkpoints of decoders: GPT-2, Llama, Mistral, Qwen, Gemma 2, Mixtral.

Llama 2 and 3 and what shares their layout (TinyLlama, SmolLM) are 'llama',
Qwen 2 and 2.5 'qwen2'. GPT-2's kernels are stored (in, out), all others
(out, in). Experts are stored one by one and stand stacked here.
"""

import math

from peftjax.interop.tensors import Tensor
from peftjax.method import nearest
from peftjax.models.decoder import Decoder
from peftjax.models.layers import ACTIVATIONS

# model_type -> class name in `architectures`.
_FAMILY = {
    'gpt2': 'GPT2', 'llama': 'Llama', 'mistral': 'Mistral',
    'mixtral': 'Mixtral', 'qwen2': 'Qwen2', 'qwen2_moe': 'Qwen2Moe',
    'qwen3': 'Qwen3', 'qwen3_moe': 'Qwen3Moe', 'gemma2': 'Gemma2'}
MODEL_TYPES = tuple(_FAMILY)

_CLASS = {None: 'Model', 'pool': 'Model', 'lm': 'ForCausalLM',
          'classify': 'ForSequenceClassification',
          'tag': 'ForTokenClassification'}

# Our attribute -> key; must be there.
_KEYS = {
    'vocab': 'vocab_size', 'width': 'hidden_size', 'depth': 'num_hidden_layers',
    'heads': 'num_attention_heads', 'mlp_dim': 'intermediate_size',
    'max_positions': 'max_position_embeddings'}
_GPT2 = {
    'vocab': 'vocab_size', 'width': 'n_embd', 'depth': 'n_layer',
    'heads': 'n_head', 'max_positions': 'n_positions'}

# Further keys, with the values that stand for a missing one.
_MORE = {
    'kv_heads': ('num_key_value_heads', None),
    'head_dim': ('head_dim', None),
    'activation': ('hidden_act', 'silu'),
    'norm_eps': ('rms_norm_eps', 1e-6),
    'tied': ('tie_word_embeddings', False)}
_MORE_OF = {
    'gpt2': {
        'mlp_dim': ('n_inner', None),
        'activation': ('activation_function', 'gelu_new'),
        'norm_eps': ('layer_norm_epsilon', 1e-5),
        'tied': ('tie_word_embeddings', True)},
    'gemma2': {
        'head_dim': ('head_dim', 256),
        'activation': ('hidden_activation', 'gelu_pytorch_tanh'),
        'tied': ('tie_word_embeddings', True),
        'softcap': ('attn_logit_softcapping', 50.),
        'logit_softcap': ('final_logit_softcapping', 30.)},
    'llama': {
        'out_bias': ('attention_bias', False),
        'mlp_bias': ('mlp_bias', False)},
    'mixtral': {
        'norm_eps': ('rms_norm_eps', 1e-5),
        'experts': ('num_local_experts', 8),
        'experts_per_token': ('num_experts_per_tok', 2)},
    'qwen2_moe': {
        'qkv_bias': ('qkv_bias', True),
        'mlp_dim': ('moe_intermediate_size', 1408),
        'shared_dim': ('shared_expert_intermediate_size', 5632),
        'experts': ('num_experts', 60),
        'experts_per_token': ('num_experts_per_tok', 4),
        'normalise_gates': ('norm_topk_prob', False)},
    'qwen3': {
        'head_dim': ('head_dim', 128),
        'out_bias': ('attention_bias', False)},
    'qwen3_moe': {
        'out_bias': ('attention_bias', False),
        'mlp_dim': ('moe_intermediate_size', 768),
        'experts': ('num_experts', 128),
        'experts_per_token': ('num_experts_per_tok', 8),
        'normalise_gates': ('norm_topk_prob', False)}}

# What the layout fixes: attributes that no key sets.
_FIXED = {
    'gpt2': dict(norm='layer', position='learned', fused_qkv=True, gated=False,
                 qkv_bias=True, out_bias=True, mlp_bias=True),
    'gemma2': dict(norm_offset=1., post_norms=True),
    'qwen2': dict(qkv_bias=True),
    'qwen3': dict(qk_norm=True),
    'qwen3_moe': dict(qk_norm=True)}

# Settings that change the computation and are not supported otherwise.
_ONLY = {
    'gpt2': {'scale_attn_weights': True, 'add_cross_attention': False,
             'scale_attn_by_inverse_layer_idx': False},
    'gemma2': {'use_bidirectional_attention': None, 'attention_bias': False},
    'qwen2_moe': {'decoder_sparse_step': 1, 'mlp_only_layers': []},
    'qwen3_moe': {'decoder_sparse_step': 1, 'mlp_only_layers': []}}

# Numbers that each kind of rotary scaling needs.
_ROPE = {
    'default': (), 'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor',
               'original_max_position_embeddings')}

# Whose layers may differ: config.json lists them in layer_types.
_MIXED = ('gemma2', 'qwen2', 'qwen2_moe', 'qwen3')

_BLOCK = {
    'norm1': 'input_layernorm', 'norm2': 'post_attention_layernorm',
    'attn/query': 'self_attn.q_proj', 'attn/key': 'self_attn.k_proj',
    'attn/value': 'self_attn.v_proj', 'attn/out': 'self_attn.o_proj',
    'attn/query_norm': 'self_attn.q_norm', 'attn/key_norm': 'self_attn.k_norm',
    'mlp/up': 'mlp.up_proj', 'mlp/gate': 'mlp.gate_proj',
    'mlp/down': 'mlp.down_proj'}
_GEMMA2_BLOCK = {
    **_BLOCK, 'post_norm1': 'post_attention_layernorm',
    'norm2': 'pre_feedforward_layernorm',
    'post_norm2': 'post_feedforward_layernorm'}
_GPT2_BLOCK = {
    'norm1': 'ln_1', 'norm2': 'ln_2', 'attn/qkv': 'attn.c_attn',
    'attn/out': 'attn.c_proj', 'mlp/up': 'mlp.c_fc', 'mlp/down': 'mlp.c_proj'}

# Of mixtures, {e} being the number of an expert.
_MIXTURE = {
    'mixtral': {
        'mlp/router': 'block_sparse_moe.gate',
        'mlp/experts/gate': 'block_sparse_moe.experts.{e}.w1',
        'mlp/experts/down': 'block_sparse_moe.experts.{e}.w2',
        'mlp/experts/up': 'block_sparse_moe.experts.{e}.w3'}}
_MIXTURE['qwen3_moe'] = {
    'mlp/router': 'mlp.gate',
    **{f'mlp/experts/{n}': f'mlp.experts.{{e}}.{n}_proj'
       for n in ('gate', 'up', 'down')}}
_MIXTURE['qwen2_moe'] = {
    **_MIXTURE['qwen3_moe'],
    **{f'mlp/shared/{n}': f'mlp.shared_expert.{n}_proj'
       for n in ('gate', 'up', 'down')}}


def _keys(model_type):
  """Keys that must be there, and {attribute: (key, default)}."""
  if model_type == 'gpt2':
    return _GPT2, _MORE_OF['gpt2']
  return _KEYS, {**_MORE, **_MORE_OF.get(model_type, {})}


def build(config, *, head=None, classes=None, **options):
  """Settings of a checkpoint (the dict of config.json) -> Decoder.

  classes: None: as many as the checkpoint has labels, 2 if it does not say.

  Raises:
    ValueError: a setting that is missing or that Decoder has no counterpart of.
  """
  model_type = config['model_type']
  for key, only in _ONLY.get(model_type, {}).items():
    if config.get(key, only) not in (only, only or None):
      raise ValueError(f'{key} is {config[key]!r}: only {only!r} is supported')
  needed, more = _keys(model_type)
  lacking = [k for k in needed.values() if config.get(k) is None]
  if lacking:
    raise ValueError(f'config.json of a {model_type} has no {lacking}')
  args = {ours: config[key] for ours, key in needed.items()}
  if 'num_local_experts' in config:  # Another name of the same setting.
    config = {'num_experts': config['num_local_experts'], **config}
  args |= {ours: config.get(key, default)
           for ours, (key, default) in more.items()}
  if model_type == 'gpt2':
    args['mlp_dim'] = args['mlp_dim'] or 4 * args['width']
  else:
    args['kv_heads'] = args['kv_heads'] or args['heads']
    args['head_dim'] = args['head_dim'] or args['width'] // args['heads']
    args |= _rope(config)
    args['windows'] = _windows(config, model_type)
  if model_type == 'gemma2':
    args['activation'] = args['activation'] or 'gelu_pytorch_tanh'
    args['scale'] = config.get('query_pre_attn_scalar', 256) ** -0.5
    args['embed_scale'] = args['width'] ** 0.5
  elif 'out_bias' in args:
    args['qkv_bias'] = args['out_bias']
  if args['activation'] not in ACTIVATIONS:
    key = more['activation'][0]
    raise ValueError(f'{key} is {args["activation"]!r}, which is not supported'
                     f'{nearest(str(args["activation"]), ACTIVATIONS)}')
  labels = config.get('id2label') or range(config.get('num_labels', 2))
  return Decoder(**args, **_FIXED.get(model_type, {}), head=head, **options,
                 classes=len(labels) if classes is None else classes)


def _rope(config):
  """rope_theta and rope_scaling, from the newer or the older keys."""
  found = config.get('rope_parameters') or config.get('rope_scaling') or {}
  default = 1e6 if config['model_type'] == 'mixtral' else 10_000.
  theta = found.get('rope_theta', config.get('rope_theta', default))
  kind = found.get('rope_type', found.get('type', 'default'))
  if kind not in _ROPE:
    raise ValueError(f'rope_scaling: rope_type {kind!r} is not supported'
                     f'{nearest(str(kind), _ROPE)}')
  part = found.get('partial_rotary_factor',
                   config.get('partial_rotary_factor', 1.))
  if part != 1.:
    raise ValueError(f'partial_rotary_factor is {part}: only 1.0 is supported')
  lacking = [k for k in _ROPE[kind] if k not in found]
  if lacking:
    raise ValueError(f'rope_scaling: a {kind!r} one has no {lacking}')
  scaling = {k: found[k] for k in _ROPE[kind]}
  return dict(rope_theta=float(theta), rope_scaling=None if kind == 'default'
              else dict(rope_type=kind, **scaling))


def _windows(config, model_type):
  """Window of every layer, 0 where there is none; None where none has one."""
  n, depth = config.get('sliding_window'), config['num_hidden_layers']
  if 'use_sliding_window' in config or model_type.startswith('qwen'):
    n = n if config.get('use_sliding_window') else None
  if not n or model_type == 'llama':
    return None
  kinds, first = config.get('layer_types'), config.get('max_window_layers', 28)
  if kinds is None:
    slides = {
        'gemma2': lambda i: i % 2 == 0,
        'qwen2': lambda i: i >= first, 'qwen3': lambda i: i >= first,
        'qwen2_moe': lambda i: i % 2 == 0 and i < first,
    }.get(model_type, lambda i: True)
    kinds = ['sliding_attention' if slides(i) else 'full_attention'
             for i in range(depth)]
  unknown = set(kinds) - {'sliding_attention', 'full_attention'}
  if unknown or len(kinds) != depth or (
      model_type not in _MIXED and len(set(kinds)) > 1):
    raise ValueError(f'layer_types is {kinds}, which is not supported in a '
                     f'{model_type} of {depth} layers')
  windows = tuple(n if k == 'sliding_attention' else 0 for k in kinds)
  return windows if any(windows) else None


def names(model, model_type):
  """{our unrolled path: Tensor} of every parameter of the model."""
  old = model_type == 'gpt2'
  kind = 'same' if old else 'linear'
  out = {'tokens/embedding': Tensor('wte.weight' if old
                                    else 'embed_tokens.weight')}
  if model.position == 'learned':
    out['places/embedding'] = Tensor('wpe.weight')
  out |= _norm(model, 'final_norm', 'ln_f' if old else 'norm')
  block = {'gpt2': _GPT2_BLOCK, 'gemma2': _GEMMA2_BLOCK}.get(model_type, _BLOCK)
  if model.experts:
    block = {n: v for n, v in block.items() if not n.startswith('mlp/')}
    block |= _MIXTURE[model_type]
  biased = {'attn/query': model.qkv_bias, 'attn/key': model.qkv_bias,
            'attn/value': model.qkv_bias, 'attn/qkv': model.qkv_bias,
            'attn/out': model.out_bias, 'mlp/up': model.mlp_bias,
            'mlp/gate': model.mlp_bias, 'mlp/down': model.mlp_bias}
  for i in range(model.depth):
    for ours, theirs in block.items():
      if ours in ('attn/query_norm', 'attn/key_norm') and not model.qk_norm:
        continue
      theirs = f'{"h" if old else "layers"}.{i}.{theirs}'
      ours_i = f'block_{i}/{ours}'
      if 'norm' in ours:
        out |= _norm(model, ours_i, theirs)
        continue
      if '{e}' in theirs:
        out[f'{ours_i}/kernel'] = Tensor(tuple(
            f'{theirs}.weight'.format(e=e) for e in range(model.experts)), kind)
      else:
        out[f'{ours_i}/kernel'] = Tensor(f'{theirs}.weight', kind)
      if biased.get(ours):
        out[f'{ours_i}/bias'] = Tensor(f'{theirs}.bias')
    if model.experts and model.shared_dim:
      out[f'block_{i}/mlp/shared_gate'] = Tensor(
          f'layers.{i}.mlp.shared_expert_gate.weight', 'reshape',
          (1, model.width))
  if model.head == 'lm' and not model.tied:
    out['head/kernel'] = Tensor('/lm_head.weight', 'linear')
  elif model.head == 'classify':
    out['head/kernel'] = Tensor('/score.weight', 'linear')
  elif model.head == 'tag':
    theirs = '/classifier' if old else '/score'
    out['head/kernel'] = Tensor(f'{theirs}.weight', 'linear')
    out['head/bias'] = Tensor(f'{theirs}.bias')
  return out


def _norm(model, ours, theirs):
  out = {f'{ours}/scale': Tensor(f'{theirs}.weight')}
  if model.norm == 'layer':
    out[f'{ours}/bias'] = Tensor(f'{theirs}.bias')
  return out


def prefix(model_type):
  """Of the body's tensors in files that hold a head."""
  return 'transformer.' if model_type == 'gpt2' else 'model.'


def ignored(model, model_type):
  """Regexes of stored names that the model does not read."""
  # Buffers: causal masks and frequencies.
  out = [r'\.attn\.(masked_)?bias$', r'rotary_emb\.inv_freq$']
  if model.head != 'lm' or model.tied:
    out.append(r'^lm_head\.weight$')
  if model.head not in ('classify', 'tag'):
    out.append(r'^(score|classifier)\.(weight|bias)$')
  return tuple(out)


def export(model, model_type):
  """The dict of config.json for a model, such that transformers opens it.

  Raises:
    ValueError: the model has something that the model_type cannot express.
  """
  cls = _FAMILY[model_type] + _CLASS[model.head]
  if cls == 'GPT2ForCausalLM':
    cls = 'GPT2LMHeadModel'
  needed, more = _keys(model_type)
  more = {ours: key for ours, (key, _) in more.items()}
  config = {key: getattr(model, ours) for ours, key in (needed | more).items()}
  config |= dict(model_type=model_type, architectures=[cls])
  if model_type != 'gpt2':
    _, head_dim, config['num_key_value_heads'] = _sizes(model)
    if 'head_dim' in config and model_type not in ('qwen2', 'qwen2_moe'):
      config['head_dim'] = head_dim
    else:
      config.pop('head_dim', None)
    scaling = dict(model.rope_scaling) if model.rope_scaling else None
    config |= dict(
        rope_theta=model.rope_theta, rope_scaling=scaling,
        rope_parameters=dict(scaling or dict(rope_type='default'),
                             rope_theta=model.rope_theta))
    windows = model.windows or (0,) * model.depth
    if model_type != 'llama':
      config['sliding_window'] = max(windows) or None
    if model_type.startswith('qwen'):
      config['use_sliding_window'] = any(windows)
    if model_type in _MIXED:
      config['layer_types'] = ['sliding_attention' if w else 'full_attention'
                               for w in windows]
  if model_type == 'gemma2':
    scale = model.scale or head_dim ** -0.5
    config['query_pre_attn_scalar'] = round(scale ** -2)
    # Only read where a layer slides.
    config['sliding_window'] = config['sliding_window'] or 4096
  if model.experts and model_type in ('qwen2_moe', 'qwen3_moe'):
    # Of layers without experts, of which there are none.
    config['intermediate_size'] = model.mlp_dim
    config |= dict(decoder_sparse_step=1, mlp_only_layers=[])
  if model.head in ('classify', 'tag'):
    labels = {f'LABEL_{i}': i for i in range(model.classes)}
    config |= dict(label2id=labels, id2label={
        str(i): name for name, i in labels.items()})
  _check(model, build(config, head=model.head), model_type)
  return config


def _sizes(model):
  """H, h and K."""
  return (model.heads, model.head_dim or model.width // model.heads,
          model.kv_heads or model.heads)


def _check(model, back, model_type):
  """Raises where `back`, read from the exported config, differs from model."""
  free = {'dtype', 'scan', 'remat', 'parent', 'name', 'kv_heads', 'head_dim',
          'scale', 'rope_scaling', 'windows'}
  if not model.experts and not back.experts:
    free |= {'experts_per_token', 'normalise_gates', 'shared_dim'}
  if model.position == back.position == 'learned':
    free.add('rope_theta')
  if model.head not in ('classify', 'tag'):
    free.add('classes')
  differ = {n for n in type(model).__dataclass_fields__
            if n not in free and getattr(model, n) != getattr(back, n)}
  settled = lambda m: dict(
      sizes=_sizes(m), rope_scaling=dict(m.rope_scaling or {}),
      windows=m.windows or (0,) * m.depth)
  a, b = settled(model), settled(back)
  differ |= {n for n in a if a[n] != b[n]}
  scales = [m.scale or _sizes(m)[1] ** -0.5 for m in (model, back)]
  if not math.isclose(*scales):
    differ.add('scale')
  if differ:
    raise ValueError(
        f'a config.json of model_type {model_type!r} cannot express ' +
        ', '.join(f'{n}={getattr(model, n, a.get(n))!r}'
                  for n in sorted(differ)))
