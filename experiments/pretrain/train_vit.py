"""Pretrains a small ViT: labels of several image sets plus a teacher's features.

  python -m experiments.pretrain.train_vit \
      --config=experiments/pretrain/vit_s.py --config.data_dir=DATA --out=FILE

Loss of one batch, the same number of images from every set s:

  sum_s CE(head_s(h), label) / S + w (1 - cos(proj(h), z))

h [B, d] is the ViT's readout of the augmented image and z [B, 1280] the
pooled features of MobileNetV2 for the image without augmentation (or its
mirror image), centred within each set and divided by the standard deviation
of each feature. The weight file that comes out holds the ViT alone; heads and
projection are left behind.

Sources: "Distilling the Knowledge in a Neural Network" (Hinton et al., arXiv
1503.02531); "FitNets: Hints for Thin Deep Nets" (Romero et al., arXiv
1412.6550), which matches features through a learned projection.
"""

import os
import time

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import optax

from experiments.pretrain.mobilenet_teacher import load_teacher
from experiments.pretrain.mobilenet_teacher import teacher_features
from peftjax.models.vit import ViT
from peftjax.models.weights import save_weights

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_OUT = flags.DEFINE_string('out', None, 'Weight file to write.', required=True)


def to_float(images, size):
  """uint8 [N, H, W] or [N, H, W, 3] -> float32 [N, size, size, 3], -1 to 1."""
  x = images[..., None] if images.ndim == 3 else images
  x = jnp.asarray(x, jnp.float32)
  x = jax.image.resize(x, (len(x), size, size, x.shape[-1]), 'bilinear')
  return np.asarray(jnp.broadcast_to(x, (*x.shape[:3], 3)) / 127.5 - 1)


def load_set(path):
  """npz -> (train images, train labels, source-test images, their labels).

  All of train and validation and every second test image are trained on; the
  other test images are the source test.
  """
  z = np.load(path)
  x = np.concatenate([z['x_train'], z['x_val'], z['x_test'][0::2]])
  y = np.concatenate([z['y_train'], z['y_val'], z['y_test'][0::2]])
  return x, y.astype(np.int32), z['x_test'][1::2], z['y_test'][1::2]


def teacher_targets(images, teacher, size, mirror):
  """Standardised features of images and their mirror images [2, N, 1280]."""
  run = jax.jit(lambda x: teacher_features(teacher, x))
  def features(x):
    parts = [run(to_float(x[i:i + 50], size)) for i in range(0, len(x), 50)]
    return np.concatenate(parts)
  z = features(images)
  z = np.stack([z, features(images[:, :, ::-1]) if mirror else z])
  return z - z.mean(axis=(0, 1))


def augment(key, images, mirror):
  """One random affine map and brightness an image [B, S, S, 3]."""
  b, s = images.shape[:2]
  keys = jax.random.split(key, 5)
  angle = jax.random.uniform(keys[0], (b,), minval=-0.25, maxval=0.25)
  zoom = jnp.exp(jax.random.uniform(keys[1], (b, 2), minval=-.2, maxval=.2))
  shear = jax.random.uniform(keys[2], (b,), minval=-0.2, maxval=0.2)
  shift = jax.random.uniform(keys[3], (b, 2), minval=-3., maxval=3.)
  gain = jax.random.uniform(keys[4], (b, 1, 1, 1), minval=0.7, maxval=1.2)

  def warp(image, angle, zoom, shear, shift, mirror):
    grid = jnp.mgrid[:s, :s].reshape(2, -1) - (s - 1) / 2
    c, d = jnp.cos(angle), jnp.sin(angle)
    m = jnp.array([[c, -d], [d, c]]) @ jnp.array([[1., 0.], [shear, 1.]])
    y, x = (m * zoom) @ grid
    x = jnp.where(mirror, -x, x)
    at = jnp.stack([y, x]) + shift[:, None] + (s - 1) / 2
    sample = lambda plane: jax.scipy.ndimage.map_coordinates(
        plane, list(at), order=1, mode='nearest')
    return jax.vmap(sample, -1, -1)(image).reshape(image.shape)

  images = jax.vmap(warp)(images, angle, zoom, shear, shift, mirror)
  # Gain about black, so that the empty background of glyphs stays empty.
  return jnp.minimum((images + 1) * gain - 1, 1.)


def main(argv):
  del argv
  c = _CONFIG.value
  rng = np.random.default_rng(c.seed)
  start = time.time()

  # ---------------------------------------------------------------- data
  teacher = load_teacher(os.path.join(c.data_dir, c.teacher))
  train, test = {}, {}
  for name, mirror in c.sets.items():
    x, y, *held_out = load_set(os.path.join(c.data_dir, f'vision/{name}.npz'))
    z = teacher_targets(x, teacher, c.teacher_size, mirror)
    train[name] = to_float(x, c.size), y, z
    test[name] = to_float(held_out[0], c.size), held_out[1]
    logging.info('%s: %d train, %d source test, %.0f s', name, len(y),
                 len(held_out[1]), time.time() - start)
  scale = np.sqrt(np.concatenate(
      [z.reshape(-1, z.shape[-1]) for *_, z in train.values()]).var(axis=0))

  # --------------------------------------------------------------- model
  model = ViT(**c.model)
  keys = jax.random.split(jax.random.key(c.seed), len(c.sets) + 3)
  dense = lambda key, n: dict(kernel=0.02 * jax.random.normal(
      key, (c.model.width, n)), bias=jnp.zeros(n))
  params = dict(
      vit=model.init(keys[0], jnp.zeros((1, c.size, c.size, 3)),
                     method='features')['params'],
      heads={name: dense(k, int(train[name][1].max()) + 1)
             for k, name in zip(keys[3:], train)},
      proj=dense(keys[1], scale.size))
  apply_dense = lambda p, h: h @ p['kernel'] + p['bias']
  lr = optax.warmup_cosine_decay_schedule(0., c.lr, c.warmup, c.steps)
  tx = optax.chain(
      optax.clip_by_global_norm(c.clip),
      optax.adamw(lr, weight_decay=c.weight_decay, mask=lambda p: jax.tree.map(
          lambda a: a.ndim > 1, p)))
  opt_state = tx.init(params)
  logging.info('%d parameters in the ViT',
               sum(a.size for a in jax.tree.leaves(params['vit'])))

  def loss_fn(params, images, labels, targets):
    h = model.apply({'params': params['vit']}, images, method='features')
    label_loss, right = 0., {}
    for name, part, y in zip(train, jnp.split(h, len(train)), labels):
      logits = apply_dense(params['heads'][name], part)
      soft = optax.smooth_labels(
          jax.nn.one_hot(y, logits.shape[-1]), c.label_smoothing)
      label_loss += optax.softmax_cross_entropy(logits, soft).mean()
      right[name] = (logits.argmax(-1) == y).mean()
    cosine = optax.cosine_similarity(
        apply_dense(params['proj'], h), targets, epsilon=1e-6).mean()
    loss = label_loss / len(train) + c.feature_weight * (1 - cosine)
    return loss, dict(loss=loss, cosine=cosine, **right)

  @jax.jit
  def update(params, opt_state, key, images, labels, targets, mirror):
    images = augment(key, images, mirror)
    grads, metrics = jax.grad(loss_fn, has_aux=True)(
        params, images, labels, targets)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, metrics

  @jax.jit
  def predict(params, head, images):
    h = model.apply({'params': params}, images, method='features')
    return apply_dense(head, h).argmax(-1)

  # --------------------------------------------------------------- train
  def batches(name, mirror):
    x, y, z = train[name]
    while True:
      order = rng.permutation(len(y))
      for i in range(0, len(y) - c.batch_per_set + 1, c.batch_per_set):
        take = order[i:i + c.batch_per_set]
        flip = rng.integers(0, 1 + mirror, c.batch_per_set)
        yield x[take], y[take], z[flip, take] / (scale + 1e-3), flip > 0

  streams = [batches(name, mirror) for name, mirror in c.sets.items()]
  for step in range(1, c.steps + 1):
    x, y, z, flip = zip(*map(next, streams))
    params, opt_state, metrics = update(
        params, opt_state, jax.random.fold_in(keys[2], step),
        np.concatenate(x), np.stack(y), np.concatenate(z),
        np.concatenate(flip))
    if step % c.log_every == 0:
      logging.info('step %d, %.0f s: %s', step, time.time() - start,
                   {k: round(float(v), 3) for k, v in metrics.items()})
    if step % c.save_every == 0 or step == c.steps:
      save_weights(_OUT.value, params['vit'], dict(
          module='vit.ViT', args=dict(c.model), input=[1, c.size, c.size, 3],
          scaling='pixel / 127.5 - 1', step=step))
      for name, (x, y) in test.items():
        guess = [predict(params['vit'], params['heads'][name], x[i:i + 100])
                 for i in range(0, len(x), 100)]
        logging.info('step %d: source test %s %.4f', step, name,
                     np.mean(np.concatenate(guess) == y))


if __name__ == '__main__':
  app.run(main)
