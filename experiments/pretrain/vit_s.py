"""vit_s: a small vision transformer for experiments that fit on a CPU."""

import ml_collections


def get_config(stage='1'):
  """Configuration of `experiments.pretrain.train_vit`, stage '1' or '2'."""
  if stage not in ('1', '2'):
    raise ValueError(f"stage {stage!r}: expected '1' or '2'")
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.data_dir = '../shared/data'  # Holds vision/ and checkpoints/.
  c.teacher = 'checkpoints/mobilenet_v2_imagenet_int8.npz'
  c.teacher_size = 112
  c.sets = ml_collections.ConfigDict(dict(
      eurosat='mirror', fashion_mnist='plain', mnist='plain', pets5='mirror'))

  c.model = ml_collections.ConfigDict(dict(
      width=192, depth=6, heads=3, mlp_dim=768, patch=4))
  c.size = 32

  c.batch_per_set = 16
  c.steps = 1600
  c.lr = 1e-3
  c.b2 = 0.98
  c.warmup = 150
  c.weight_decay = 0.05
  c.clip = 1.0
  c.label_smoothing = 0.1
  c.feature_weight = 3.0

  c.log_every = 50
  c.save_every = 200
  if stage == '2':
    # Goes on from stage 1 with a new schedule. Upright digits are easy by
    # then; their quarter turns as classes of their own are not.
    c.sets.mnist = 'turns'
    c.seed = 1
    c.steps = 1200
    c.lr = 7e-4
    c.warmup = 50
  return c
