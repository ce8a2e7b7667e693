"""PREFIX_TUNING: keys and values before those of every attention.

  ours                               PEFT
  k, v [P, K heads, h] of layer l    prompt_embeddings [P, L 2 K h]: of each layer
                                     its keys, then its values

A prefix that a network makes (project) is written as what it makes, as PEFT
saves it. In encoder-decoders PEFT's prefix stands in the decoder's
self-attention alone, with num_transformer_submodules=2; with 1 its cross-attention
reads the decoder's own keys, which is refused. It puts the table twice and cuts
it into fours, so that layer i of L has the prefix 2 i mod L: layers i and i + L/2
share one where L is even, and every other one is not used. Models with sliding windows are refused: there PEFT's prefix
leaves the window with its position.
"""

import numpy as np

from peftjax.interop.peft.part import array, Part, sites_of
from peftjax.interop.peft.types import prompt_tuning
from peftjax.method import Context, load

METHODS = ('prompts.prefix_tuning',)
SUFFIXES = ()
CONFIG = {
    **{k: v for k, v in prompt_tuning.CONFIG.items()
       if not k.startswith('prompt_tuning')},
    'encoder_hidden_size': None, 'prefix_projection': False,
    'init_weights': None}


def _layers(names):
  """Paths of the attentions that PEFT's prefix stands in, in order."""
  model = names.own
  if any(getattr(model, 'windows', None) or ()):
    raise ValueError(
        f'layers that see a window of {max(model.windows)} tokens lose PEFT\'s '
        'prefix once the text is longer, and keep ours: not the same function; '
        'take a base without sliding_window')
  if type(model).__module__.endswith('.encdec'):
    depth = model.depth if model.decoder_depth is None else model.decoder_depth
    return [f'decoder/block_{i}/attn' for i in range(depth)]
  return [f'block_{i}/attn' for i in range(model.depth)]


def _submodules(names):
  return 2 if type(names.own).__module__.endswith('.encdec') else 1


def _places(names, depth):
  """Which prefix of the table each layer has."""
  return [i * _submodules(names) % depth for i in range(depth)]


def write(part, names, sites):
  """See `peftjax.interop.peft`."""
  del sites
  if not part.settings['shift']:
    raise ValueError(
        "shift=False: PEFT counts the text's positions from the length of the "
        'prefix; train with shift=True')
  want = _layers(names)
  have = {p: t for p, t in part.theta.items() if t.keys() & {'k', 'w2'}}
  if set(have) != set(want):
    odd = sorted(set(have) ^ set(want))
    raise ValueError(
        f'PEFT has a prefix in each of {want[0]!r} to {want[-1]!r} and nowhere '
        f'else; here they differ in {odd[:4]}: train with sites=dict(path='
        f'{want[0].replace("block_0", "block_.*")!r})')
  method = load(**part.spec)
  layers = {}
  for path, at in zip(want, _places(names, len(want))):
    t = method.prepare({**part.shared, **have[path]}, Context(path))
    new = np.stack([np.asarray(t['k']), np.asarray(t['v'])], 1)
    if not np.array_equal(layers.setdefault(at, new), new):
      raise ValueError(
          f'{path!r} has a prefix of its own; in PEFT it shares one with the '
          'layer half a decoder below: such a prefix cannot be written')
  unused = np.zeros_like(layers[0])
  table = np.concatenate(
      [layers.get(i, unused) for i in range(len(want))], 1)  # [P, 2 L, K, h]
  p, _, heads, width = table.shape
  config = dict(
      num_virtual_tokens=p, token_dim=heads * width, num_layers=len(want),
      num_transformer_submodules=_submodules(names), num_attention_heads=heads,
      encoder_hidden_size=heads * width, prefix_projection=False)
  return config, {'': {prompt_tuning.TENSOR: array(table.reshape(p, -1))}}


def read(config, modules, names, sites):
  """See `peftjax.interop.peft`."""
  table = prompt_tuning.table(config, modules, _submodules(names))
  paths = _layers(names)
  heads, width = sites[paths[0]].hooks['attend'].inputs[1].shape[-2:]
  want = (len(table), 2 * len(paths) * heads * width)
  if table.shape != want:
    raise ValueError(
        f'prompt_embeddings {list(table.shape)}: a prefix of this base has '
        f'{list(want)}, {len(paths)} layers of {heads} key-value heads of '
        f'{width}; the adapter is of another base')
  table = table.reshape(len(table), len(paths), 2, heads, width)
  theta = {path: dict(k=array(table[:, i, 0]), v=array(table[:, i, 1]))
           for i, path in zip(_places(names, len(paths)), paths)}
  spec = dict(name='prompts.prefix_tuning', length=len(table),
              sites=sites_of(theta))
  return Part(spec, theta)
