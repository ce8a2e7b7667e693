"""Reference Linen models whose hook methods an interceptor can see.

  model, params, config = load('org/name')   # or a folder, or 'stories260k'
  save('folder', model, params, like=config)
"""

from peftjax.interop.families import example
from peftjax.interop.huggingface import load
from peftjax.interop.huggingface import save
