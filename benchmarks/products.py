"""Matrix products alone, in XLA and in torch, at the encoder's shapes.

  python -m benchmarks.products

Prints GFLOP/s, medians of 15, on the threads that the process may use. What a
step takes beyond its products is not told by this.
"""

import os
import statistics
import time

from absl import app
import jax
import jax.numpy as jnp
import numpy as np
import torch

# [rows, d_in] x [d_in, d_out], both halves of a LoRA of rank 8 last.
SHAPES = ((2048, 384, 1536), (2048, 1536, 384), (384, 2048, 1536),
          (2048, 384, 384), (2048, 384, 8), (2048, 8, 384))


def rate(call, flops):
  """GFLOP/s, the median of 15 calls."""
  call()
  taken = []
  for _ in range(15):
    start = time.perf_counter()
    call()
    taken.append(time.perf_counter() - start)
  return flops / statistics.median(taken) / 1e9


def main(argv):
  del argv
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  product = jax.jit(jnp.matmul)
  rng = np.random.default_rng(0)
  for m, k, n in SHAPES:
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((m, k), (k, n)))
    x, y = jnp.asarray(a), jnp.asarray(b)
    v, w, out = torch.tensor(a), torch.tensor(b), torch.empty(m, n)
    ours = rate(lambda: product(x, y).block_until_ready(), 2 * m * k * n)
    other = rate(lambda: torch.mm(v, w, out=out), 2 * m * k * n)
    print(f'[{m}, {k}] x [{k}, {n}]: XLA {ours:.0f}, torch {other:.0f}')


if __name__ == '__main__':
  app.run(main)
