"""Tasks: how examples become batches, outputs losses, and results metrics.

  config.task.name  data of the kind   model              see
  image             image              images -> logits   classification.py
  classify          classification     head 'classify'    classification.py
  regress           regression         head 'classify'    classification.py
  tag               tagging            head 'tag'         tagging.py
  lm                lm                 head 'lm'          lm.py
  seq2seq           seq2seq            head 'lm'          seq2seq.py
  retrieve          retrieval          head 'pool'        retrieval.py

`base.Task` says what a task is; `peftjax.case` makes one from a config.
"""
