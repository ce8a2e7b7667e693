"""5-gram model with interpolated Kneser-Ney smoothing, by sorted integer keys.

p_n(w | c) = (N(c w) - D)+ / N(c) + D U(c) / N(c) p_(n-1)(w | c'), with c' the
context without its oldest piece, U(c) the number of different pieces after c,
D = n1 / (n1 + 2 n2) for each order, and below the highest order N counting the
different pieces that stand before (c w) instead of occurrences. p_0 is uniform.

Source: "An Empirical Study of Smoothing Techniques for Language Modeling" (Chen
and Goodman 1999), one discount an order.
"""

import numpy as np


def _keys(stream, order, vocabulary):
  """Every n-gram of the stream as one integer, the oldest piece first."""
  keys = np.zeros(len(stream) - order + 1, np.int64)
  for i in range(order):
    keys = keys * vocabulary + stream[i:len(stream) - order + 1 + i]
  return keys


def _look(table, keys):
  """Counts of keys in (sorted keys, counts); 0 for those not there."""
  names, counts = table
  at = np.minimum(np.searchsorted(names, keys), len(names) - 1)
  return np.where(names[at] == keys, counts[at], 0)


def fit(stream, vocabulary, order=5):
  """Tables of a stream of ids, for `probabilities`.

  Raises:
    ValueError: an n-gram does not fit into 63 bits.
  """
  if vocabulary**order >= 2**63:
    raise ValueError(f'{order}-grams of {vocabulary} pieces do not fit into 63 '
                     'bits')
  stream = np.asarray(stream, np.int64)
  tables = []
  seen = None  # n-grams of the order above, each once
  for n in range(order, 0, -1):
    if seen is None:
      names, counts = np.unique(_keys(stream, n, vocabulary),
                                return_counts=True)
    else:  # continuation counts: the oldest piece is cut off
      names, counts = np.unique(seen % vocabulary**n, return_counts=True)
    n1, n2 = (counts == 1).sum(), (counts == 2).sum()
    discount = n1 / max(n1 + 2 * n2, 1)
    context, start = np.unique(names // vocabulary, return_index=True)
    total = np.add.reduceat(counts, start)
    kinds = np.diff(np.append(start, len(names)))
    tables.append(dict(grams=(names, counts), total=(context, total),
                       kinds=(context, kinds), discount=discount))
    seen = names
  return dict(vocabulary=vocabulary, tables=tables[::-1])


def probabilities(model, stream):
  """p of every piece of a stream from the (order - 1)th on, given those before.
  """
  v, order = model['vocabulary'], len(model['tables'])
  stream = np.asarray(stream, np.int64)
  whole = _keys(stream, order, v)
  p = np.full(len(whole), 1 / v)
  for n, table in enumerate(model['tables'], 1):
    grams = whole % v**n
    total = _look(table['total'], grams // v)
    known = np.maximum(total, 1)
    d = table['discount']
    new = (np.maximum(_look(table['grams'], grams) - d, 0)
           + d * _look(table['kinds'], grams // v) * p) / known
    p = np.where(total > 0, new, p)
  return p
