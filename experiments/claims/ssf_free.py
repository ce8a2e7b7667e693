"""SSF is free at inference: folded, it costs what the base costs.

  python -m experiments.claims.ssf_free --adapter=DIR [--pairs=200]

Takes a trained SSF adapter and runs the base, the adapter and the folded
weights on the same images, interleaved. The rule, fixed before: outputs of
folded and adapted within 1e-4, compiled FLOPs of folded and base equal, median
latency of folded within 2 % of the base's.
"""

import statistics
import time

from absl import app
from absl import flags
import jax

import peftjax
from peftjax.data import pipeline
from peftjax.models.weights import load_weights

BATCH = 32


def main(argv):
  del argv
  meta = peftjax.load_adapter(_ADAPTER.value).meta['base']
  model, params = load_weights(meta['weights'], classes=meta['classes'])
  images = jax.numpy.asarray(
      pipeline.load_split(meta['data'], 'test')['image'][:BATCH])
  sites = peftjax.describe(model, images)
  adapter = peftjax.load_adapter(_ADAPTER.value, sites, params)
  plain = peftjax.fold(adapter.methods, params, adapter.theta, sites)

  run = lambda p, x: model.apply({'params': p}, x)
  adapted = lambda p, x: peftjax.apply(
      model, adapter.methods, p, adapter.theta, x)[0]
  arms = {}
  for name, fn, p in (('base', run, params), ('folded', run, plain),
                      ('adapted', adapted, params)):
    arms[name] = (jax.jit(fn).lower(p, images).compile(), p)
  times = {name: [] for name in arms}
  for i in range(_PAIRS.value + 5):
    for name, (fn, p) in arms.items():
      start = time.perf_counter()
      fn(p, images).block_until_ready()
      if i >= 5:  # warm
        times[name].append(time.perf_counter() - start)
  flops = {n: fn.cost_analysis()['flops'] for n, (fn, _) in arms.items()}
  difference = float(abs(arms['folded'][0](plain, images)
                         - arms['adapted'][0](params, images)).max())
  for name in arms:
    ratio = statistics.median(
        a / b for a, b in zip(times[name], times['base']))
    print(f'{name:8} {1000 * statistics.median(times[name]):7.2f} ms  '
          f'{ratio:.3f} of base  {flops[name] / 1e9:.4f} GFLOP')
  ratio = statistics.median(
      a / b for a, b in zip(times['folded'], times['base']))
  holds = (difference <= 1e-4 and flops['folded'] == flops['base']
           and abs(ratio - 1) <= 0.02)
  print(f'largest |folded - adapted| {difference:.1e}')
  print('shown' if holds else 'not shown')


if __name__ == '__main__':
  _ADAPTER = flags.DEFINE_string('adapter', None, 'Adapter folder.',
                                 required=True)
  _PAIRS = flags.DEFINE_integer('pairs', 200, 'Timed rounds.', lower_bound=1)
  app.run(main)
