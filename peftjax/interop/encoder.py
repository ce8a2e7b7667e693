"""Checkpoints of BERT, RoBERTa, DistilBERT and ELECTRA: names and settings.

MiniLM and the sentence encoders made from it are BERTs; XLM-RoBERTa and
CamemBERT are RoBERTas. What a file holds for another head than the wanted one
is left alone, as is BERT's pooler where no head reads it.
"""

from peftjax.interop.tensors import Tensor
from peftjax.method import nearest
from peftjax.models.encoder import Encoder
from peftjax.models.layers import ACTIVATIONS

# model_type -> (layout of the tensors, class name in `architectures`).
_FAMILY = {
    'bert': ('bert', 'Bert'),
    'camembert': ('roberta', 'Camembert'),
    'distilbert': ('distilbert', 'DistilBert'),
    'electra': ('electra', 'Electra'),
    'roberta': ('roberta', 'Roberta'),
    'xlm-roberta': ('roberta', 'XLMRoberta'),
}
MODEL_TYPES = tuple(_FAMILY)

_CLASS = {
    None: 'Model', 'pool': 'Model', 'classify': 'ForSequenceClassification',
    'tag': 'ForTokenClassification', 'mlm': 'ForMaskedLM'}  # not 'mean'

# Settings by our attribute: (key, default), with DistilBERT's own keys.
_KEYS = {
    'vocab': ('vocab_size', 30522),
    'width': ('hidden_size', 768),
    'depth': ('num_hidden_layers', 12),
    'heads': ('num_attention_heads', 12),
    'mlp_dim': ('intermediate_size', 3072),
    'positions': ('max_position_embeddings', 512),
    'types': ('type_vocab_size', 2),
    'act': ('hidden_act', 'gelu'),
    'eps': ('layer_norm_eps', 1e-12),
}
_DISTILBERT = {
    **{n: _KEYS[n] for n in ('vocab', 'positions')},
    'width': ('dim', 768),
    'depth': ('n_layers', 6),
    'heads': ('n_heads', 12),
    'mlp_dim': ('hidden_dim', 3072),
    'act': ('activation', 'gelu'),
}
_ELECTRA = {
    **_KEYS,
    'width': ('hidden_size', 256),
    'heads': ('num_attention_heads', 4),
    'mlp_dim': ('intermediate_size', 1024),
    'embed_dim': ('embedding_size', 128),
}
_KEYS_OF = {'bert': _KEYS, 'roberta': _KEYS, 'electra': _ELECTRA,
            'distilbert': _DISTILBERT}

# What the layout fixes: attributes that no key sets.
_FIXED = {
    'bert': dict(head_act='tanh'),
    'roberta': dict(head_act='tanh', mlm_act='gelu'),
    'electra': dict(head_act='gelu', mlm_act='gelu'),
    'distilbert': dict(head_act='relu', types=0, eps=1e-12),
}

# Settings that change the computation and are not supported otherwise.
_ONLY = {'position_embedding_type': 'absolute', 'is_decoder': False,
         'add_cross_attention': False}

_BLOCK = {
    'attn/query': 'attention.self.query',
    'attn/key': 'attention.self.key',
    'attn/value': 'attention.self.value',
    'attn/out': 'attention.output.dense',
    'norm1': 'attention.output.LayerNorm',
    'mlp/up': 'intermediate.dense',
    'mlp/down': 'output.dense',
    'norm2': 'output.LayerNorm',
}
_BLOCK_DISTILBERT = {
    'attn/query': 'attention.q_lin',
    'attn/key': 'attention.k_lin',
    'attn/value': 'attention.v_lin',
    'attn/out': 'attention.out_lin',
    'norm1': 'sa_layer_norm',
    'mlp/up': 'ffn.lin1',
    'mlp/down': 'ffn.lin2',
    'norm2': 'output_layer_norm',
}

# Layout -> head -> {layer of ours: stored name}; '/' as in Tensor.
_HEAD = {
    'bert': {
        'classify': {'dense': 'pooler.dense', 'out': '/classifier'},
        'tag': {'out': '/classifier'},
        'mlm': {'dense': '/cls.predictions.transform.dense',
                'norm': '/cls.predictions.transform.LayerNorm',
                'out': '/cls.predictions'},
    },
    'roberta': {
        'classify': {'dense': '/classifier.dense',
                     'out': '/classifier.out_proj'},
        'tag': {'out': '/classifier'},
        'mlm': {'dense': '/lm_head.dense', 'norm': '/lm_head.layer_norm',
                'out': '/lm_head'},
    },
    'electra': {
        'classify': {'dense': '/classifier.dense',
                     'out': '/classifier.out_proj'},
        'tag': {'out': '/classifier'},
        'mlm': {'dense': '/generator_predictions.dense',
                'norm': '/generator_predictions.LayerNorm',
                'out': '/generator_lm_head'},
    },
    'distilbert': {
        'classify': {'dense': '/pre_classifier', 'out': '/classifier'},
        'tag': {'out': '/classifier'},
        'mlm': {'dense': '/vocab_transform', 'norm': '/vocab_layer_norm',
                'out': '/vocab_projector'},
    },
}

# What files hold beyond the model's parameters: indices, copies of the word
# table and of the bias that it decodes with, heads that no model here has.
_IGNORED = (
    r'^embeddings\.position_ids$', r'^cls\.predictions\.decoder\.',
    r'^lm_head\.decoder\.', r'^generator_lm_head\.weight$',
    r'^vocab_projector\.weight$', r'^cls\.seq_relationship\.',
    r'^discriminator_predictions\.', r'^qa_outputs\.')


def build(config, *, head=None, classes=None, **options):
  """Settings of a checkpoint (the dict of config.json) -> Encoder.

  classes: None: as many as the checkpoint has labels, 2 if it does not say.

  Raises:
    ValueError: a setting that Encoder has no counterpart of.
  """
  layout, _ = _FAMILY[config['model_type']]
  for key, only in _ONLY.items():
    if config.get(key, only) != only:
      raise ValueError(f'{key} is {config[key]!r}: only {only!r} is supported')
  if head == 'mlm' and not config.get('tie_word_embeddings', True):
    raise ValueError("tie_word_embeddings is False: head 'mlm' decodes with "
                     'the word table, so only True is supported')
  args = {ours: config.get(key, default)
          for ours, (key, default) in _KEYS_OF[layout].items()}
  if args['act'] not in ACTIVATIONS:
    key = _KEYS_OF[layout]['act'][0]
    raise ValueError(f'{key} is {args["act"]!r}, which is not supported'
                     f'{nearest(str(args["act"]), ACTIVATIONS)}')
  if layout == 'roberta':
    args['padding'] = config.get('pad_token_id', 1)
    if args['padding'] is None:
      raise ValueError('pad_token_id is None: positions are counted from it, '
                       'so a number is needed')
  if args.get('embed_dim') == args['width']:
    args['embed_dim'] = None
  labels = config.get('id2label') or range(config.get('num_labels', 2))
  return Encoder(**args, **_FIXED[layout], head=head, **options,
                 classes=len(labels) if classes is None else classes)


def names(model, model_type):
  """{our unrolled path: Tensor} of every parameter of the model."""
  layout, _ = _FAMILY[model_type]
  out = {f'{ours}/embedding': Tensor(f'embeddings.{theirs}_embeddings.weight')
         for ours, theirs in (('word_embed', 'word'),
                              ('position_embed', 'position'),
                              ('type_embed', 'token_type'))
         if ours != 'type_embed' or model.types}
  out |= _layer('embed_norm', 'embeddings.LayerNorm')
  if model.embed_dim not in (None, model.width):
    out |= _layer('embed_project', 'embeddings_project')
  body, block = 'encoder', _BLOCK
  if layout == 'distilbert':
    body, block = 'transformer', _BLOCK_DISTILBERT
  for i in range(model.depth):
    for ours, theirs in block.items():
      out |= _layer(f'block_{i}/{ours}', f'{body}.layer.{i}.{theirs}')
  if model.head == 'mean':
    out |= _layer('head/out', '/mean_classifier')
  for ours, theirs in _HEAD[layout].get(model.head, {}).items():
    out |= _layer(f'head/{ours}', theirs)
  if model.head == 'mlm':
    del out['head/out/kernel']  # The word table is the decoder.
  return out


def _layer(ours, theirs):
  """Leaves of one dense layer or norm."""
  weight = Tensor(f'{theirs}.weight', 'linear')
  if 'norm' in ours:
    weight = Tensor(f'{theirs}.weight')
  return {f'{ours}/{"scale" if "norm" in ours else "kernel"}': weight,
          f'{ours}/bias': Tensor(f'{theirs}.bias')}


def prefix(model_type):
  """Of the body's tensors in files that hold a head."""
  layout, _ = _FAMILY[model_type]
  return f'{layout}.'


def ignored(model, model_type):
  """Regexes of stored names that the model does not read."""
  layout, _ = _FAMILY[model_type]
  out = list(_IGNORED)
  if (layout, model.head) != ('bert', 'classify'):
    out.append(r'^pooler\.')
  if model.head != 'mlm':  # beside a head for pre-training
    out.append(r'^cls\.predictions\.')
  return tuple(out)


def before_load(read, stored, config):
  """Norms of files converted from TensorFlow: gamma and beta, not weight, bias.

  Returns:
    ({name: array}, names that were read).
  """
  del config
  out, used = {}, set()
  for theirs, ours in (('gamma', 'weight'), ('beta', 'bias')):
    for name in stored:
      if name.endswith(f'LayerNorm.{theirs}'):
        out[name[:-len(theirs)] + ours] = read(name)
        used.add(name)
  return out, used


def export(model, model_type):
  """The dict of config.json for a model, such that transformers opens it."""
  layout, cls = _FAMILY[model_type]
  if model.head not in _CLASS:
    raise ValueError(
        f'transformers has no {cls} with the head {model.head!r}'
        f'{nearest(model.head, filter(None, _CLASS))}; save the body with '
        'model.clone(head=None)')
  config = {key: getattr(model, ours)
            for ours, (key, _) in _KEYS_OF[layout].items()}
  config |= dict(
      model_type=model_type, architectures=[cls + _CLASS[model.head]])
  if layout == 'roberta':
    config['pad_token_id'] = model.padding
  if layout == 'electra':
    config['embedding_size'] = model.embed_dim or model.width
  if model.head in ('classify', 'tag'):
    labels = {f'LABEL_{i}': i for i in range(model.classes)}
    config |= dict(label2id=labels, id2label={
        str(i): name for name, i in labels.items()})
  return config
