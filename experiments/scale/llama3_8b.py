r"""Llama 3 8B on running text, its base split over a TPU pod slice.

  python -m peftjax.compile --topology=v5e:4x4 \
      --config=experiments/scale/llama3_8b.py:method=lora
  python -m peftjax.train --workdir=runs/llama3_8b --config=\
experiments/scale/llama3_8b.py:method=lora,backbone=meta-llama/Meta-Llama-3-8B \
      --config.data.name='file:DATA/{split}.jsonl'

The first plans the run and needs no TPU and no weights; the second starts it on
every host of the slice. Every kernel of the base lies in pieces, one on each
device: its inputs are split over 'data' and its outputs over 'model', and the
other way round where a kernel reads what is split over 'model'. A layer's
kernels are put together over 'data' when the layer runs. Hardware: 16 chips of
v5e or more; planned, not run: docs/pods.md.
"""

from experiments.scale import suite

# The first that matches; the first axis is that of the layers.
RULES = (
    (r'(query|key|value|gate|up)/kernel', (None, 'data', 'model')),
    (r'(out|down)/kernel', (None, 'model', 'data')),
    (r'^tokens/embedding', ('model', 'data')),
    (r'^head/kernel', ('data', 'model')))


def get_config(arg=None):
  """The config; `arg` as in `experiments.scale.suite`."""
  return suite.config(
      arg, suite.shape('llama3_8b'), RULES, mesh__model=4, batch=16, steps=1000,
      task__name='lm', task__length=2048, data__name='file:text/{split}.jsonl',
      optim__lr=2e-4, eval_batch=16, eval_split='validation')
