"""vit_s: a small vision transformer for experiments that fit on a CPU."""

import ml_collections


def get_config():
  """Configuration of `experiments.pretrain.train_vit`."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.data_dir = '../shared/data'  # Holds vision/ and checkpoints/.
  c.teacher = 'checkpoints/mobilenet_v2_imagenet_int8.npz'
  c.teacher_size = 112
  # Set -> whether a mirrored image keeps its label.
  c.sets = ml_collections.ConfigDict(dict(
      eurosat=True, fashion_mnist=False, mnist=False, pets5=True))

  c.model = ml_collections.ConfigDict(dict(
      width=192, depth=6, heads=3, mlp_dim=768, patch=4))
  c.size = 32

  c.batch_per_set = 16
  c.steps = 2400
  c.lr = 1e-3
  c.warmup = 150
  c.weight_decay = 0.05
  c.clip = 1.0
  c.label_smoothing = 0.1
  c.feature_weight = 3.0

  c.log_every = 50
  c.save_every = 400
  return c
