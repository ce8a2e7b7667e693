r"""ViT-L/16 on 1000 classes of images, its base split over a TPU pod slice.

  python -m peftjax.compile --topology=v5e:4x4 \
      --config=experiments/scale/vit_l.py:method=lora
  python -m peftjax.train --workdir=runs/vit_l --config=experiments/scale/\
vit_l.py:method=lora,backbone=google/vit-large-patch16-224-in21k \
      --config.data.name=file:IMAGES --config.data.stream

The first plans the run and needs no TPU, no weights and no images. Placement as
in llama3_8b.py; the head is new and trained with every method. Hardware: 16
chips of v5e; planned, not run: docs/pods.md.
"""

from experiments import common
from experiments.scale import suite

# The first that matches; the first axis is that of the layers.
RULES = (
    (r'(query|key|value|up)/kernel', (None, 'data', 'model')),
    (r'(out|down)/kernel', (None, 'model', 'data')),
    (r'(query|key|value|up)/bias', (None, 'model')))


def get_config(arg=None):
  """The config; `arg` as in `experiments.scale.suite`."""
  return suite.config(
      arg, suite.shape('vit_l'), RULES, head=(common.HEAD,), mesh__model=2,
      batch=512, steps=10_000, task__name='image', data__name='file:images',
      optim__lr=1e-3, eval_split='validation')
