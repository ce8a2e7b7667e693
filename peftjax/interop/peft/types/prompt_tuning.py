"""PROMPT_TUNING: a prompt before the embedded text.

  ours                    PEFT
  prompt [P, d]           prompt_embeddings [P, d]

An encoder-decoder's adapter with num_transformer_submodules=2 has a second
prompt, before the decoder's tokens, which nothing here has.
"""

from peftjax.interop.peft.part import array, Part

METHODS = ('prompts.prompt_tuning',)
SUFFIXES = ()
CONFIG = dict(num_virtual_tokens=None, token_dim=None, num_layers=None,
              num_transformer_submodules=1, num_attention_heads=None,
              prompt_tuning_init=None, prompt_tuning_init_text=None)
TENSOR = 'prompt_embeddings'


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  del sites
  return sized(array(part.theta['']['prompt']), names)


def sized(prompt, names):
  """(config, modules) of a prompt [P, d]."""
  model = names.own
  heads = getattr(model, 'heads', 1)
  config = dict(
      num_virtual_tokens=len(prompt), token_dim=prompt.shape[1],
      num_transformer_submodules=1, num_attention_heads=heads,
      num_layers=model.depth)
  return config, {'': {TENSOR: prompt}}


def read(config, modules, names, sites):
  """See `peftjax.interop.peft`."""
  del names
  prompt = table(config, modules)
  width = sites[''].hooks['embed'].output.shape[-1]
  if prompt.shape[1] != width:
    raise ValueError(f'{TENSOR} {list(prompt.shape)}: the base embeds tokens in '
                     f'{width} numbers; the adapter is of another base')
  spec = dict(name='prompts.prompt_tuning', length=len(prompt))
  return Part(spec, {'': dict(prompt=array(prompt))})


def table(config, modules, submodules=1):
  """The one tensor that a prompt has, checked against its config."""
  found = modules['']
  if set(found) != {TENSOR}:
    raise ValueError(f'expected the tensor {TENSOR!r}, found {sorted(found)}')
  value, p = found[TENSOR], config['num_virtual_tokens']
  have = config['num_transformer_submodules'] or 1
  if have != submodules:
    raise ValueError(
        f'num_transformer_submodules={have}: only {submodules} has a counterpart '
        'here; train with that')
  if value.ndim != 2 or len(value) != p:
    raise ValueError(f'{TENSOR} {list(value.shape)}: the config says '
                     f'num_virtual_tokens={p}')
  return value
