"""Linear probes on the frozen features of a weight file.

  python -m experiments.pretrain.probe --weights=vit_s

Logistic regression on the standardised readout of 800 training images, its
regularisation chosen on the 200 validation images, accuracy on the test part.
Beside it the same probe on raw pixels and on the untrained model.
"""

from absl import app
from absl import flags
import jax
import numpy as np
import sklearn.linear_model
import sklearn.preprocessing

from peftjax.data.pipeline import load_split
from peftjax.models.weights import load_weights

_WEIGHTS = flags.DEFINE_string('weights', 'vit_s', 'Name or path.')
_SETS = flags.DEFINE_list('sets', ['kmnist', 'omniglot100'], 'Target sets.')
_C = (0.0001, 0.001, 0.01, 0.1)  # Inverse regularisation strengths tried.


def probe(features, splits):
  """Test accuracy of a linear probe on features(images [N, ...])."""
  scaler = sklearn.preprocessing.StandardScaler()
  x = {'train': scaler.fit_transform(features(splits['train']['image']))}
  for part in ('validation', 'test'):
    x[part] = scaler.transform(features(splits[part]['image']))
  fits = []
  for c in _C:
    model = sklearn.linear_model.LogisticRegression(C=c, max_iter=300)
    model.fit(x['train'], splits['train']['label'])
    fits.append((model.score(x['validation'], splits['validation']['label']),
                 model.score(x['test'], splits['test']['label']), c))
  return max(fits, key=lambda fit: fit[0])


def main(argv):
  del argv
  model, params = load_weights(_WEIGHTS.value)
  images = np.zeros((1, 32, 32, 3), np.float32)
  untrained = model.init(jax.random.key(0), images)['params']
  run = jax.jit(lambda p, x: model.apply({'params': p}, x, method='features'))
  def readout(p):
    return lambda x: np.concatenate(
        [run(p, x[i:i + 100]) for i in range(0, len(x), 100)])
  for name in _SETS.value:
    splits = {s: load_split(name, s) for s in ('train', 'validation', 'test')}
    for what, features in (('pixels', lambda x: x[..., 0].reshape(len(x), -1)),
                           ('untrained', readout(untrained)),
                           (_WEIGHTS.value, readout(params))):
      validation, test, c = probe(features, splits)
      print(f'{name} {what}: test {100 * test:.1f} %, validation '
            f'{100 * validation:.1f} %, C {c}', flush=True)


if __name__ == '__main__':
  app.run(main)
