"""Tasks: how examples become batches, outputs losses, and results metrics.

  config.task.name  data of the kind   model              see
  image             image              images -> logits   classification.py
  classify          classification     head 'classify'    classification.py
  regress           regression         head 'classify'    classification.py
  tag               tagging            head 'tag'         tagging.py
  lm                lm                 head 'lm'          lm.py
  seq2seq           seq2seq            head 'lm'          seq2seq.py
  retrieve          retrieval          head 'pool'        retrieval.py

`encoder` of each module but retrieval's makes arrays of one shape from any
examples, as streams need them; `arrays` encodes a whole split, cut to its
longest text, or packed. `shapes`, where a module has it, tells what a batch
is made of without any data. `base.Task` says what a task is; `peftjax.case`
makes one from a config.
"""
