"""peftjax: parameter-efficient fine-tuning for JAX.

  sites = describe(model, x)                      # where methods can attach
  method = load('lowrank.lora', rank=8)           # a record of pure functions
  theta = init(method, key, sites, params)        # what is trained
  y, aux = apply(model, method, params, theta, x) # the adapted model
  plain = fold(method, params, theta, sites)      # the same as plain params
"""

from peftjax.apply import apply
from peftjax.artifact import load_adapter
from peftjax.artifact import save_adapter
from peftjax.fold import fold
from peftjax.method import Context
from peftjax.method import load
from peftjax.method import Method
from peftjax.method import Site
from peftjax.sites import describe
from peftjax.sites import select
from peftjax.theta import after_step
from peftjax.theta import combine
from peftjax.theta import init
from peftjax.theta import partition
from peftjax.theta import penalty
from peftjax.trees import count
from peftjax.version import VERSION as __version__
