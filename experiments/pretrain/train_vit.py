r"""Pretrains a small ViT on labels of image sets and features of a teacher.

  python -m experiments.pretrain.train_vit \
      --config=experiments/pretrain/vit_s.py --config.data_dir=DATA --out=FILE

Loss of one batch, the same number of images from every set s:

  sum_s CE(head_s(h), label) / S + w (1 - cos(proj(h), z))

h [B, d] is the ViT's readout of the augmented image and z [B, 1280] the
pooled features of MobileNetV2 for the image without augmentation (or its
mirror image or quarter turn), centred within each set and divided by the
standard deviation of each feature; they are computed once and kept in files
beside FILE. The weight file that comes out holds the ViT alone; heads and
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
from peftjax.data.pipeline import scale_images
from peftjax.models.vit import ViT
from peftjax.models.weights import load_weights
from peftjax.models.weights import save_weights

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_OUT = flags.DEFINE_string('out', None, 'Weight file to write.', required=True)

_INIT = flags.DEFINE_string('init', None, 'Weight file to go on from.')


def load_set(path):
  """npz -> train images, train labels, source-test images, their labels.

  All of train and validation and every second test image are trained on; the
  other test images are the source test.
  """
  z = np.load(path)
  colour = lambda x: x if x.ndim == 4 else x[..., None]
  x = np.concatenate([z['x_train'], z['x_val'], z['x_test'][0::2]])
  y = np.concatenate([z['y_train'], z['y_val'], z['y_test'][0::2]])
  return colour(x), y, colour(z['x_test'][1::2]), z['y_test'][1::2]


def make_views(x, y, kind):
  """Images [N, H, W, C], labels [N] -> the same with a leading axis of views.

  kind: 'plain' (the images alone), 'mirror' (and their mirror images, with
  the same labels) or 'turns' (all four quarter turns, each with labels of its
  own: more kinds of shapes to tell apart).
  """
  if kind == 'plain':
    return x[None], y[None]
  if kind == 'mirror':
    return np.stack([x, x[:, :, ::-1]]), np.stack([y, y])
  if kind == 'turns':
    classes = int(y.max()) + 1
    return (np.stack([np.rot90(x, k, axes=(1, 2)) for k in range(4)]),
            np.stack([y + np.int32(classes * k) for k in range(4)]))
  raise ValueError(f'views {kind!r}: expected plain, mirror or turns')


def teacher_targets(views, teacher, size):
  """Features [V, N, 1280] of uint8 images [V, N, H, W, C], centred."""
  run = jax.jit(lambda x: teacher_features(teacher, x))
  def features(x):
    parts = [run(scale_images(x[i:i + 50], size)) for i in range(0, len(x), 50)]
    return np.concatenate(parts)
  z = np.stack([features(x) for x in views])
  return z - z.mean(axis=(0, 1))


def augment(key, images):
  """One random affine map and brightness an image [B, S, S, 3]."""
  b, s = images.shape[:2]
  keys = jax.random.split(key, 5)
  angle = jax.random.uniform(keys[0], (b,), minval=-0.15, maxval=0.15)
  zoom = jnp.exp(jax.random.uniform(keys[1], (b, 2), minval=-.15, maxval=.15))
  shear = jax.random.uniform(keys[2], (b,), minval=-0.15, maxval=0.15)
  shift = jax.random.uniform(keys[3], (b, 2), minval=-2., maxval=2.)
  gain = jax.random.uniform(keys[4], (b, 1, 1, 1), minval=0.7, maxval=1.2)

  def warp(image, angle, zoom, shear, shift):
    grid = jnp.mgrid[:s, :s].reshape(2, -1) - (s - 1) / 2
    c, d = jnp.cos(angle), jnp.sin(angle)
    m = jnp.array([[c, -d], [d, c]]) @ jnp.array([[1., 0.], [shear, 1.]])
    at = (m * zoom) @ grid + shift[:, None] + (s - 1) / 2
    sample = lambda plane: jax.scipy.ndimage.map_coordinates(
        plane, list(at), order=1, mode='nearest')
    return jax.vmap(sample, -1, -1)(image).reshape(image.shape)

  images = jax.vmap(warp)(images, angle, zoom, shear, shift)
  # Gain about black, so that the empty background of glyphs stays empty.
  return jnp.minimum((images + 1) * gain - 1, 1.)


def load_data(c, cache):
  """All sets, read and scaled, with the teacher's features.

  Returns:
    {set: (images [V, N, ...], labels [V, N], targets [V, N, 1280])} to train
    on, with V views of every image, and {set: (images, labels)} to test on.
  """
  teacher = load_teacher(os.path.join(c.data_dir, c.teacher))
  train, test = {}, {}
  for name, kind in c.sets.items():
    x, y, *held_out = load_set(os.path.join(c.data_dir, f'vision/{name}.npz'))
    views, labels = make_views(x, y, kind)
    file = f'{cache}.{name}_{kind}_{c.teacher_size}.npy'
    if not os.path.exists(file):
      np.save(file, teacher_targets(views, teacher, c.teacher_size))
    train[name] = (np.stack([scale_images(v, c.size) for v in views]), labels,
                   np.load(file))
    test[name] = scale_images(held_out[0], c.size), held_out[1]
    logging.info('%s: %d views of %d train, %d source test', name, len(views),
                 len(y), len(held_out[1]))
  deviation = np.sqrt(np.concatenate(
      [z.reshape(-1, z.shape[-1]) for *_, z in train.values()]).var(axis=0))
  return {name: (x, y, z / (deviation + 1e-3))
          for name, (x, y, z) in train.items()}, test


def batches(x, y, z, size, rng):
  """Endless (images, labels, targets) of one set, a random view of each."""
  while True:
    order = rng.permutation(y.shape[1])
    for i in range(0, len(order) - size + 1, size):
      take = rng.integers(0, len(y), size), order[i:i + size]
      yield x[take], y[take], z[take]


def dense(p, h):
  """h [..., d_in] -> [..., d_out]."""
  return h @ p['kernel'] + p['bias']


def loss_fn(params, model, c, images, labels, targets):
  """Loss of the module docstring and what is logged beside it."""
  h = model.apply({'params': params['vit']}, images, method='features')
  label_loss, right = 0., {}
  for name, part, y in zip(c.sets, jnp.split(h, len(c.sets)), labels):
    logits = dense(params['heads'][name], part)
    soft = optax.smooth_labels(
        jax.nn.one_hot(y, logits.shape[-1]), c.label_smoothing)
    label_loss += optax.softmax_cross_entropy(logits, soft).mean()
    right[name] = (logits.argmax(-1) == y).mean()
  cosine = optax.cosine_similarity(
      dense(params['proj'], h), targets, epsilon=1e-6).mean()
  loss = label_loss / len(right) + c.feature_weight * (1 - cosine)
  return loss, dict(loss=loss, cosine=cosine, **right)


def main(argv):
  del argv
  c = _CONFIG.value
  rng = np.random.default_rng(c.seed)
  train, test = load_data(c, _OUT.value)

  # ------------------------------------------------------ model, optimiser
  model = ViT(**c.model)
  keys = jax.random.split(jax.random.key(c.seed), len(c.sets) + 3)
  new = lambda key, n: dict(kernel=0.02 * jax.random.normal(
      key, (c.model.width, n)), bias=jnp.zeros(n))
  if _INIT.value:
    vit = load_weights(_INIT.value)[1]
    del vit['head']
  else:
    vit = model.init(keys[0], jnp.zeros((1, c.size, c.size, 3)),
                     method='features')['params']
  params = dict(
      vit=vit,
      heads={name: new(k, int(train[name][1].max()) + 1)
             for k, name in zip(keys[3:], train)},
      proj=new(keys[1], next(iter(train.values()))[2].shape[-1]))
  lr = optax.warmup_cosine_decay_schedule(0., c.lr, c.warmup, c.steps)
  tx = optax.chain(
      optax.clip_by_global_norm(c.clip),
      optax.adamw(lr, b2=c.b2, weight_decay=c.weight_decay,
                  mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p)))
  opt_state = tx.init(params)

  @jax.jit
  def update(params, opt_state, key, images, labels, targets):
    images = augment(key, images)
    grads, metrics = jax.grad(loss_fn, has_aux=True)(
        params, model, c, images, labels, targets)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, metrics

  @jax.jit
  def predict(params, head, images):
    h = model.apply({'params': params}, images, method='features')
    return dense(head, h)

  # --------------------------------------------------------------- train
  start = time.time()
  streams = [batches(*train[name], c.batch_per_set, rng) for name in c.sets]
  for step in range(1, c.steps + 1):
    x, y, z = zip(*map(next, streams))
    params, opt_state, metrics = update(
        params, opt_state, jax.random.fold_in(keys[2], step),
        np.concatenate(x), np.stack(y), np.concatenate(z))
    if step % c.log_every == 0:
      logging.info('step %d, %.0f s: %s', step, time.time() - start,
                   {k: round(float(v), 3) for k, v in metrics.items()})
    if step % c.save_every == 0 or step == c.steps:
      save_weights(_OUT.value, params['vit'], dict(
          module='vit.ViT', args=dict(c.model), input=[1, c.size, c.size, 3],
          scaling='pixel / 127.5 - 1', step=step))
      for name, (x, y) in test.items():
        logits = np.concatenate(
            [predict(params['vit'], params['heads'][name], x[i:i + 100])
             for i in range(0, len(x), 100)])
        # The images are upright, so turned classes are not in question.
        guess = logits[:, :int(y.max()) + 1].argmax(-1)
        logging.info('step %d: source test %s %.4f', step, name,
                     np.mean(guess == y))


if __name__ == '__main__':
  app.run(main)
