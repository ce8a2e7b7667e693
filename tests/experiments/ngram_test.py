"""The 5-gram model against its definition, summed by hand."""

import collections

import numpy as np
import pytest

from experiments.pretrain import ngram


def brute(stream, order, context, w, vocabulary):
  """p(w | context) by the definition, recursively, with dictionaries."""
  grams = {n: collections.Counter(
      tuple(stream[i:i + n]) for i in range(len(stream) - n + 1))
           for n in range(1, order + 1)}
  counts = {order: grams[order]}
  # Continuation counts: an n-gram counts once for every longer one it ends.
  for n in range(order - 1, 0, -1):
    counts[n] = collections.Counter(g[1:] for g in counts[n + 1])

  def p(n, context):
    if n == 0:
      return 1 / vocabulary
    lower = p(n - 1, context[1:])
    c = counts[n]
    after = {g[-1]: k for g, k in c.items() if g[:-1] == tuple(context)}
    total = sum(after.values())
    if not total:
      return lower
    n1, n2 = (sum(k == i for k in c.values()) for i in (1, 2))
    d = n1 / max(n1 + 2 * n2, 1)
    return (max(after.get(w, 0) - d, 0) + d * len(after) * lower) / total

  return p(order, tuple(context))


@pytest.mark.parametrize('order', [1, 2, 3])
def test_definition(order):
  rng = np.random.RandomState(order)
  stream = rng.randint(0, 4, 60) * rng.randint(0, 2, 60)
  model = ngram.fit(stream, 5, order)
  text = rng.randint(0, 5, 30)  # 4 never occurs
  found = ngram.probabilities(model, text)
  assert len(found) == len(text) - order + 1
  for i, p in enumerate(found):
    want = brute(stream.tolist(), order, text[i:i + order - 1].tolist(),
                 text[i + order - 1], 5)
    np.testing.assert_allclose(p, want, rtol=1e-12)


def test_sums_to_one():
  stream = np.random.RandomState(0).randint(0, 6, 200)
  model = ngram.fit(stream, 6, 5)
  each = [ngram.probabilities(model, np.append(stream[:4], w))[0]
          for w in range(6)]
  np.testing.assert_allclose(sum(each), 1, rtol=1e-12)


def test_too_many_pieces():
  with pytest.raises(ValueError, match='do not fit into 63 bits'):
    ngram.fit([0, 1], 2**13, 5)
