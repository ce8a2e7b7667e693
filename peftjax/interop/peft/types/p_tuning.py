"""P_TUNING: a prompt that a network made.

PEFT saves what the network makes, prompt_embeddings [P, d], and throws the
network away; so it is written here, and read as a prompt.
"""

from peftjax.interop.peft.part import array, Part
from peftjax.interop.peft.types import prompt_tuning
from peftjax.method import Context, load

METHODS = ('prompts.p_tuning',)
SUFFIXES = ()
CONFIG = {
    **{k: v for k, v in prompt_tuning.CONFIG.items()
       if not k.startswith('prompt_tuning')},
    'encoder_reparameterization_type': 'MLP', 'encoder_hidden_size': None,
    'encoder_num_layers': 2, 'encoder_dropout': 0.0}


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  del sites
  t = part.theta['']
  made = load(**part.spec).prepare(t, Context(''))
  config, modules = prompt_tuning.sized(array(made['prompt']), names)
  return dict(config, encoder_reparameterization_type='MLP',
              encoder_hidden_size=t['w1'].shape[1]), modules


def read(config, modules, names, sites) -> Part:
  """See `peftjax.interop.peft`; the Part is a prompt's."""
  return prompt_tuning.read(config, modules, names, sites)
