"""What the configs of large models share: methods, placement, arguments.

A config takes `method=NAME`, `backbone=FOLDER` and any key of the config, as in
`experiments.common.parse_arg`. Without a backbone it stands for the shape of a
model alone: a folder with config.json and no weights, enough to plan a run by
`python -m peftjax.compile`.
"""

import os

from experiments import common
from peftjax.method import nearest

_HERE = os.path.dirname(os.path.abspath(__file__))

# Those of the papers' experiments on models of this size, on every kernel but
# the head. norms and full are the ends of the scale that others lie between.
METHODS = dict(
    lora=dict(name='lowrank.lora', rank=16, alpha=32.),
    dora=dict(name='lowrank.dora', rank=16, alpha=32.),
    oft=dict(name='orthogonal.oft', block_size=32),
    boft=dict(name='orthogonal.boft', block_size=8, factors=2),
    norms=dict(name='selective.ln_tuning'),
    full=dict(name='selective.full'))


def shape(name):
  """The folder of a model's shape, below shapes/."""
  return os.path.join(_HERE, 'shapes', name)


def config(arg, backbone, rules, head=(), **more):
  """A config of a large model.

  Args:
    arg: The config's argument.
    backbone: Of `model.weights`, where the argument names none.
    rules: `shard_rules`.
    head: Methods beside the chosen one.
    **more: {key with '__' for '.': value} of the config.

  Raises:
    ValueError: an unknown method, key or word.
  """
  chosen, rest = common.choose(arg, method='lora', backbone=backbone)
  name = chosen['method']
  if name not in METHODS:
    raise ValueError(f'method={name!r}: unknown{nearest(name, METHODS)}')
  c = common.base()
  c.method = (METHODS[name], *(() if name == 'full' else head))
  c.shard_rules = rules
  c.model.weights = chosen['backbone']
  c.model.scan = c.model.remat = True
  c.dtype = c.model.param_dtype = 'bfloat16'
  c.data.train = 0  # all
  for key, value in more.items():
    common.put(c, key.replace('__', '.'), value)
  for key, value in common.parse_arg(rest).items():
    common.put(c, key, value)
  return c
