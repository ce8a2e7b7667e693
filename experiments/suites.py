"""What the suites share: backbones by short names, tasks, config arguments.

A suite's config takes, after a colon, `task=NAME`, `backbone=NAME`, `runlocal`
and any key as in `common.parse_arg`:

  --config=experiments/glue/lora.py:task=cola,backbone=roberta_large,seed=1

`runlocal` needs nothing that does not come with the package: two steps on a
sample set with a tiny backbone.
"""

import os

from experiments import common
from peftjax import bases
from peftjax.method import nearest

SAMPLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'samples')

# Short name -> hub id, or a weight file that comes with the package. Any other
# value with a '/' is taken as a hub id or a folder itself.
BACKBONES = dict(
    bert_base='google-bert/bert-base-uncased',
    roberta_base='FacebookAI/roberta-base',
    roberta_large='FacebookAI/roberta-large',
    electra_base='google/electra-base-discriminator',
    minilm='sentence-transformers/all-MiniLM-L6-v2',
    gpt2_medium='openai-community/gpt2-medium',
    gpt2_large='openai-community/gpt2-large',
    llama3_8b='meta-llama/Meta-Llama-3-8B',
    qwen25_1b='Qwen/Qwen2.5-1.5B',
    t5_base='google-t5/t5-base',
    flan_t5_base='google/flan-t5-base',
    vit_base='google/vit-base-patch16-224-in21k',
    vit_large='google/vit-large-patch16-224-in21k',
    dinov2_base='facebook/dinov2-base',
    stories260k='stories260k',
    vit_s='vit_s')


def backbone(name):
  """What `config.model.weights` is for a short name, a folder or a hub id.

  A folder of that name below $PEFTJAX_DATA/checkpoints is taken where there is
  one, so that machines without a connection have some backbones too.
  """
  weights = BACKBONES.get(name, name)
  local = os.path.join(os.environ.get('PEFTJAX_DATA', ''), 'checkpoints',
                       os.path.basename(weights))
  if os.path.isfile(os.path.join(local, 'config.json')):
    return local
  if name not in BACKBONES and not bases.is_folder(name) and (
      not name.endswith('.safetensors')):
    raise ValueError(f'backbone={name!r}: expected a folder, a hub id or a '
                     f'short name{nearest(name, BACKBONES)}')
  return weights


def config(method, tasks, default, arg, backbone_default, local, **more):
  """A suite's training config.

  Args:
    method: Tuple of mappings for `peftjax.load`, innermost first.
    tasks: {name: {dotted key of the config: value}}.
    default: The task where the argument names none.
    arg: The config's argument.
    backbone_default: The backbone where it names none.
    local: {name of task: {dotted key: value}} for `runlocal`, or one for all
      under ''; a value that is a function is called.
    **more: {dotted key with '__' for '.': value} of the suite, before tasks'.

  Raises:
    ValueError: an unknown task, backbone, key or word.
  """
  chosen, rest = common.choose(arg, task=default, backbone=backbone_default)
  name = chosen['task']
  if name not in tasks:
    raise ValueError(f'task={name!r}: the suite has no such task'
                     f'{nearest(name, tasks)}')
  c = common.base()
  c.method = tuple(method)
  c.data.train = 0  # all
  for key, value in more.items():
    common.put(c, key.replace('__', '.'), value)
  for key, value in tasks[name].items():
    common.put(c, key, value)
  given = common.parse_arg(rest)
  small = given.pop('runlocal', False)
  if small:
    for key, value in local.get(name, local.get('', {})).items():
      common.put(c, key, value() if callable(value) else value)
  if not small or chosen['backbone'] != backbone_default:
    c.model.weights = backbone(chosen['backbone'])
  for key, value in given.items():
    common.put(c, key, value)
  return c
