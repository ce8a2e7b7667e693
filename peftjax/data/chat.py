"""Prompts and chat templates: what text a model is asked with."""

from peftjax.method import nearest

# '{source}' stands for the example's source.
PROMPTS = {
    'plain': '{source}\n',
    # "Alpaca: A Strong, Replicable Instruction-Following Model", the variant
    # without input.
    'alpaca': ('Below is an instruction that describes a task. Write a '
               'response that appropriately completes the request.\n\n'
               '### Instruction:\n{source}\n\n### Response:\n'),
}


def prompt_format(prompt):
  """Source -> prompt, by a name of PROMPTS or a text with '{source}' in it."""
  text = PROMPTS.get(prompt, prompt)
  if '{source}' not in text:
    raise ValueError(f"prompt {prompt!r}{nearest(prompt, PROMPTS)}, or a text "
                     "with '{source}' in it")
  before, after = text.split('{source}', 1)
  return lambda source: before + source + after
