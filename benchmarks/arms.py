"""What the step benchmark compares: models, methods, and batches of both sides.

Nothing here imports jax or torch: the process of either reads it.
"""

import numpy as np

# config.json of the models; weights are random.
MODELS = dict(
    encoder=dict(  # MiniLM's size
        model_type='bert', architectures=['BertForSequenceClassification'],
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, vocab_size=30522, max_position_embeddings=512,
        type_vocab_size=2, hidden_act='gelu', hidden_dropout_prob=0.,
        attention_probs_dropout_prob=0.),
    decoder=dict(
        model_type='llama', architectures=['LlamaForCausalLM'],
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, intermediate_size=1376, vocab_size=8192,
        max_position_embeddings=2048, hidden_act='silu', rms_norm_eps=1e-5,
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False),
    decoder_1b5=dict(  # 1.5 billion parameters
        model_type='llama', architectures=['LlamaForCausalLM'],
        hidden_size=2048, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=16, intermediate_size=5504, vocab_size=32000,
        max_position_embeddings=4096, hidden_act='silu', rms_norm_eps=1e-5,
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False))

TOKENS = 20  # of prompts and prefixes
KERNELS = dict(leaf='kernel', path='block')  # all of the blocks

# Arm -> methods as configs have them. Classifiers train their last layer too,
# on both sides.
METHODS = dict(
    full=dict(name='selective.full'),
    lora=dict(name='lowrank.lora', rank=8, alpha=16., sites=KERNELS),
    dora=dict(name='lowrank.dora', rank=8, alpha=16., sites=KERNELS),
    oft=dict(name='orthogonal.oft', block_size=32, sites=KERNELS),
    boft=dict(name='orthogonal.boft', block_size=8, factors=2,
              sites=KERNELS),
    ia3=dict(name='scaling.ia3'),
    ssf=dict(name='scaling.ssf'),
    bitfit=dict(name='selective.bitfit'),
    ln_tuning=dict(name='selective.ln_tuning'),
    prompt=dict(name='prompts.prompt_tuning', length=TOKENS),
    prefix=dict(name='prompts.prefix_tuning', length=TOKENS))

RATE = 1e-4  # of AdamW, without decay, on both sides


def of(model):
  """Arms that a model of `MODELS` has: llama has no biases."""
  without = {'bitfit'} if MODELS[model]['model_type'] == 'llama' else set()
  return [name for name in METHODS if name not in without]


def batch(model, rows, tokens):
  """{ids [B, T], mask [B, T], label [B] or weights [B, T]}, numpy."""
  config, rng = MODELS[model], np.random.default_rng(0)
  ids = rng.integers(3, config['vocab_size'], (rows, tokens)).astype(np.int32)
  made = dict(ids=ids, mask=np.ones(ids.shape, bool))
  if config['model_type'] == 'llama':
    return made | dict(weights=np.ones(ids.shape, np.float32))
  return made | dict(label=rng.integers(0, 2, rows).astype(np.int32))
