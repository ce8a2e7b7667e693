"""Diff pruning: a sparse difference from the base, found by relaxed gates.

Source: "Parameter-Efficient Transfer Learning with Diff Pruning" (Guo, Rush and
Kim, ACL 2021, arXiv 2012.07463). For every leaf p of every chosen layer:

  p' = p + z_g z * w         w, alpha like p; alpha_g a scalar; z_g, z in [0, 1]
  penalty = l0 (sum sigmoid(alpha - log(-l / r)) + the same of every alpha_g)

z and z_g are hard-concrete gates (`ops.gates`, l = -1.5, r = 1.5) with logits
alpha ('alpha.<leaf>') and, where structured, alpha_g ('group.<leaf>': the group
is one leaf), drawn anew for every entry and step while training. Init: w = 0,
all logits 5, so the adapted model starts as the base whatever is drawn.

Two phases. Half of the steps train w and the gates together; the gates belong
in an optimiser group of their own ('gate', learning rate 0.1, clipped alone).
Then one sample of the gates is taken, the floor(density n) entries with the
largest |z_g z w| over all layers together are kept, and their w is trained on
alone, without gates or penalty: theta is then 'index.<leaf>' int32 [k], frozen,
and 'value.<leaf>' [k], positions in the flattened leaf. That is what is stored:
density n values and as many positions.

Count: 2 n, and one per leaf where structured, then density n over all layers. n
is the numbers of the chosen layers.

Where this differs from the released code, which is what the above follows:
  * The penalty adds element and group probabilities, as the code does; the
    paper's structured penalty, to our memory, multiplies them.
  * Without training or key, gates stand at their median (u = 1/2); the code
    evaluates with the last random sample.
  * The k-th largest magnitude is exact, where the code bisects [0, 1] to 1e-6.
    With fewer than k non-zero differences, zero ones fill up, and start at 0.
  * n counts the chosen layers; the code counts the head, which is never pruned:
    train it by full(sites=select(roles='head'), group='head').
  * l0 is per gate: the code's 1.25e-7 was chosen for BERT-large's 334 million,
    and by default the same total weight is spread over the gates there are.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import support
from peftjax import trees
from peftjax.method import Method
from peftjax.ops import gates
from peftjax.phases import Phase

EXAMPLE = dict(density=0.1)
LOGIT = 5.0
L0, BERT_LARGE = 1.25e-7, 334e6


def leaves_but_not_head(site):
  """Every layer with parameters of its own but the head."""
  return bool(site.params) and site.role != 'head'


def budget(density, n):
  """Largest k with k / n <= density."""
  k = int(density * n)
  return k + 1 if (k + 1) / n <= density else k


def _check(density, found):
  for path, site in found.items():
    if not site.params:
      leaves = sorted({n for s in found.values() for n in s.params})
      raise ValueError(
          f'diff_pruning: {path!r} ({site.kind}) has no parameters of its own, '
          f'only its children have; choose layers: select(leaf={leaves})')
  n = sum(math.prod(v.shape) * math.prod(s.stack)
          for s in found.values() for v in s.params.values())
  if not budget(density, n):
    raise ValueError(
        f'diff_pruning: density {density} of {n} parameters keeps none; the '
        f'smallest that keeps one is {1 / n:.3g}')


def _gates(logits, key):
  """Gates of a tree of logits; without a key at their median."""
  if key is None:
    return jax.tree.map(gates.hard_concrete_deterministic, logits)
  leaves, form = jax.tree.flatten(logits)
  ends = np.cumsum([v.size for v in leaves])
  u = jnp.split(jax.random.uniform(key, (ends[-1],)), ends[:-1])
  return form.unflatten([gates.hard_concrete_from(u.reshape(v.shape), v)
                         for u, v in zip(u, leaves)])


def _differences(theta, key):
  """{path: {leaf: z_g z w}} of layers or stacks of them."""
  z = _gates({p: {n: v for n, v in t.items() if not n.startswith('w.')}
              for p, t in theta.items()}, key)
  out = {}
  for path, t in theta.items():
    out[path] = {}
    for n in (name[2:] for name in t if name.startswith('w.')):
      v = z[path][f'alpha.{n}'] * t[f'w.{n}']
      group = z[path].get(f'group.{n}', jnp.ones(()))
      ones = [1] * (v.ndim - group.ndim)
      out[path][n] = v * group.reshape(*group.shape, *ones)
  return out


def diff_pruning(density=0.005, structured=True, l0=None,
                 sites=leaves_but_not_head):
  """Diff pruning.

  Args:
    density: Share of the chosen layers' parameters that may differ in the end.
    structured: Whether each leaf has a gate for all its entries together.
    l0: Weight of the penalty per gate, at least 0; None takes the reference's
      total weight, 41.75, over the number of gates.
    sites: Predicate on sites; by default every layer with parameters of its own
      but the head.

  Raises:
    ValueError: a density outside (0, 1] or too small to keep one parameter, a
      negative l0, or a chosen site without parameters of its own.
  """
  if not 0 < density <= 1:
    raise ValueError(f'diff_pruning: density={density}: expected a share in '
                     '(0, 1]; the default is 0.005')
  if l0 is not None and not 0 <= l0 < math.inf:
    raise ValueError(f'diff_pruning: l0={l0}: expected a finite number, at '
                     'least 0')

  def init(key, site, p, stats):
    del key, site, stats
    t = {}
    for n, v in p.items():
      t[f'w.{n}'] = jnp.zeros(v.shape)
      t[f'alpha.{n}'] = jnp.full(v.shape, LOGIT, jnp.float32)
      if structured:
        t[f'group.{n}'] = jnp.float32(LOGIT)
    return t

  def prepare(t, ctx):
    return _differences({'': t}, ctx.rng if ctx.train else None)['']

  def fold(p, t):
    return {n: v + t[n] if n in t else v for n, v in p.items()}

  def penalty(theta, aux, step):
    del aux, step
    logits = [v for t in theta.values() for n, v in t.items()
              if not n.startswith('w.')]
    number = sum(v.size for t in theta.values() for n, v in t.items()
                 if n.startswith('alpha.'))
    weight = L0 * BERT_LARGE / number if l0 is None else l0
    return weight * sum(gates.open_probability(v).sum() for v in logits)

  def count(site):
    sizes = [math.prod(v.shape) for v in site.params.values()]
    return 2 * sum(sizes) + structured * len(sizes)

  def project(theta, key, sites):
    delta = _differences(theta, key)
    where = [(path, n) for path, t in delta.items() for n in t]
    sizes = [jnp.abs(delta[path][n]) for path, n in where]
    k = budget(density, sum(v.size for v in sizes))
    out = {}
    for (path, n), mask in zip(where, gates.kth_threshold(sizes, k)):
      index = support.flat_index(mask, len(sites[path].stack))
      if index.size:
        w = jnp.where(delta[path][n] != 0, theta[path][f'w.{n}'], 0)
        out.setdefault(path, {}).update({
            f'index.{n}': index, f'value.{n}': support.gather(w, index)})
    return out

  return Method(
      'diff_pruning', sites, init, prepare, fold, penalty=penalty, count=count,
      labels=trees.Rules((r'^(alpha|group)\.', 'gate')),
      check=lambda found: _check(density, found),
      phases=(Phase('fixed_mask', 0.5, fixed_mask(density, sites), project),))


def fixed_mask(density, sites):
  """The second phase: w on a support that stays.

  Its theta comes from the first phase. Made on its own (`sparse.random_mask`)
  it gets a random support of the same density in every leaf, and w = 0.
  """

  def init(key, site, p, stats):
    del site, stats
    t, sizes = {}, [v.size for v in p.values()]
    u = jax.random.uniform(key, (sum(sizes),))
    for n, part in zip(p, jnp.split(u, np.cumsum(sizes)[:-1])):
      k = budget(density, part.size)
      if k:
        index = jnp.sort(jax.lax.top_k(part, k)[1])
        t |= {f'index.{n}': index.astype(jnp.int32),
              f'value.{n}': jnp.zeros(k)}
    return t

  def fold(p, t):
    return {n: support.scatter_add(v, t[f'index.{n}'], t[f'value.{n}'])
               if f'index.{n}' in t else v for n, v in p.items()}

  return Method('diff_pruning', sites, init, fold=fold,
                frozen=trees.Rules((r'^index\.', True)),
                check=lambda found: _check(density, found))
