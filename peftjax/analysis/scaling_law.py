"""The scaling law of fine-tuning: loss against data and one factor of scale.

Source: "When Scaling Meets LLM Finetuning: The Effect of Data, Model and
Finetuning Method" (arXiv 2402.17193).

  multiplicative   L(X, D) = A X^-alpha D^-beta + E
  additive         L(X, D) = A X^-alpha + B D^-beta + E     the rival
  of data alone    L(D) = A D^-beta + E                     X = 1, alpha = 0

X is a factor: size of the model, pretraining tokens, numbers that a method
trains; D counts fine-tuning examples; L is perplexity a token on test data. All
constants belong to one task, one method and, A and alpha, one factor.

The fit, in the paper's order:
  1. A = e^a, E = e^e (B = e^b); the sum of Huber(L_fit - L), delta = 0.001 and
     on L itself, is minimised by L-BFGS from a grid of starts; the best fit is
     kept.
  2. beta and E (and b) are fitted jointly over the factors in `joint`, with an
     a and an alpha for each: over 'model' and 'pretraining', where they are
     there, but not over how many numbers a method trains, whose effect is too
     weak.
  3. With beta, E (and b) fixed, a and alpha are fitted for each factor alone.
  4. `deviation`: the mean of |L_fit - L| on fitted and on held-out points.

Hold out the largest scale, not points at random. The delta is absolute: L in
other units is another fit. beta of methods fitted on ranges of D that do not
overlap are not to be compared. The paper has no error bars; `bootstrap` has.

Everything is float64 on the host. X and D enter as logarithms about their mean,
so that their units change A (and B) alone.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy import optimize

from peftjax.method import nearest

FORMS = ('multiplicative', 'additive')
JOINT = ('model', 'pretraining')
DELTA = 1e-3
# Starts: exponents, and E as a share of the smallest loss.
ALPHAS, BETAS, FLOORS = (0.0, 0.1, 0.5), (0.05, 0.3, 1.0), (0.1, 0.5, 0.9)


class Law(NamedTuple):
  """The law of one factor."""

  a: float  # A = e^a
  alpha: float
  beta: float
  e: float  # E = e^e
  b: float | None = None  # B = e^b; None: multiplicative

  def __call__(self, x, d):
    """L at X = x and D = d, numbers or arrays above 0."""
    x, d = np.log(x), np.log(d)
    if self.b is None:
      return np.exp(self.a - self.alpha * x - self.beta * d) + np.exp(self.e)
    return (np.exp(self.a - self.alpha * x) + np.exp(self.b - self.beta * d)
            + np.exp(self.e))


# ------------------------------------------------------------------------ data
def hold_out(points, x=None, d=None):
  """Points apart: those to fit, and those of the largest scale.

  Args:
    points: {factor: (x [n], d [n], loss [n])}.
    x: {factor: the X to hold out}; by default the largest of each.
    d: {factor: the D to hold out}; by default the largest of each.

  Returns:
    (points to fit, points held out): of these X or D is the one held out.

  Raises:
    ValueError: an X or a D that no point has, or nothing left to fit.
  """
  points, kept, held = _checked(points), {}, {}
  for name, (xs, ds, loss) in points.items():
    out = np.zeros(len(loss), bool)
    for what, values, given in (('x', xs, x), ('d', ds, d)):
      at = (given or {}).get(name, values.max())
      if at not in values:
        near = values[np.abs(values - at).argmin()]
        raise ValueError(f'{name}: no point has {what}={at}; the nearest is '
                         f'{near:g}')
      out |= values == at
    if out.all():
      raise ValueError(f'{name}: all {len(out)} points are held out; expected '
                       'two values of X and of D at least')
    kept[name], held[name] = ((xs[m], ds[m], loss[m]) for m in (~out, out))
  return kept, held


def deviation(laws, points):
  """{factor: mean of |L_fit - L|}, and under '' that of all points."""
  gaps = {name: np.abs(laws[name](x, d) - loss)
          for name, (x, d, loss) in _checked(points).items()}
  return {**{name: float(g.mean()) for name, g in gaps.items()},
          '': float(np.concatenate(list(gaps.values())).mean())}


# ------------------------------------------------------------------------- fit
def fit(points, joint=None, form='multiplicative'):
  """Fits the law of every factor; see the module docstring.

  Args:
    points: {factor: (x [n], d [n], loss [n])}, such as 'model', 'pretraining'
      and 'trained'; all above 0.
    joint: The factors that beta and E are fitted on; by default those of
      `JOINT` that are there.
    form: 'multiplicative' or 'additive'.

  Returns:
    {factor: `Law`}; beta, e (and b) are the same for all.

  Raises:
    ValueError: an unknown form or factor, points that are no positive numbers,
      fewer points than the constants of a step, or one x alone of a factor.
  """
  if form not in FORMS:
    raise ValueError(f'unknown form {form!r}{nearest(form, FORMS)}')
  points = _checked(points)
  joint = _joint(points, joint)
  for name, (x, *_) in points.items():
    if len(set(x)) < 2:
      raise ValueError(f'{name}: all points have x={x[0]:g}; expected two values '
                       'at least, or any alpha fits')
  problem = _Problem({n: points[n] for n in joint}, form == 'additive')
  problem.check_count(joint)
  shared = problem.best(problem.starts())
  return _refit(points, problem, shared)


def fit_data(d, loss):
  """The law of data alone, fitted on (d [n], loss [n]): X = 1, alpha = 0."""
  d, loss = np.asarray(d, float), np.asarray(loss, float)
  points = _checked({'data': (np.ones_like(d), d, loss)})
  problem = _Problem(points, False, flat=True)
  problem.check_count(('data',))
  return problem.laws(problem.best(problem.starts()))['data']


def bootstrap(points, joint=None, form='multiplicative', samples=200,
              level=0.95, seed=0):
  """Intervals of the constants, by resampling the points of each factor.

  Every sample is fitted from the fit of all points, not from the grid.

  Args:
    points, joint, form: As of `fit`.
    samples: How many resamples.
    level: Of the intervals, between the quantiles (1 -+ level) / 2.
    seed: Of the resampling.

  Returns:
    {factor: {constant: (low, high)}}.
  """
  if samples < 1 or not 0 < level < 1:
    raise ValueError(f'samples={samples}, level={level}: expected at least 1 '
                     'and a share between 0 and 1')
  points, laws = _checked(points), fit(points, joint, form)
  joint = _joint(points, joint)
  rng, drawn = np.random.default_rng(seed), {name: [] for name in points}
  for _ in range(samples):
    some = {}
    for name, columns in points.items():
      rows = rng.integers(0, len(columns[0]), len(columns[0]))
      some[name] = tuple(c[rows] for c in columns)
    problem = _Problem({n: some[n] for n in joint}, form == 'additive')
    shared = problem.best([problem.start_at(laws)])
    for name, law in _refit(some, problem, shared, laws).items():
      drawn[name].append(law)
  ends = ((1 - level) / 2, (1 + level) / 2)
  out = {}
  for name, found in drawn.items():
    columns = {k: [getattr(law, k) for law in found] for k in Law._fields
               if getattr(laws[name], k) is not None}
    out[name] = {k: tuple(map(float, np.quantile(v, ends)))
                 for k, v in columns.items()}
  return out


def _joint(points, joint):
  if joint is None:
    joint = [name for name in JOINT if name in points]
  for name in joint:
    if name not in points:
      raise ValueError(f'joint: unknown factor {name!r}{nearest(name, points)}')
  if not joint:
    raise ValueError('joint: expected a factor to fit beta and E on, of '
                     f'{sorted(points)}')
  return tuple(joint)


def _refit(points, problem, shared, laws=None):
  """Step 3: a and alpha of every factor, what is shared being fixed."""
  out = {}
  for name, columns in points.items():
    one = problem.alone(name, columns, shared)
    starts = one.starts() if laws is None else [one.start_at(laws)]
    if name in problem.names:
      starts.append(one.start_at(problem.laws(shared)))
    out |= one.laws(one.best(starts))
  return out


class _Problem:
  """Points, and the constants that are fitted to them.

  A vector holds (a, alpha) of every factor, then beta, e and, in the additive
  form, b. Logarithms are about their means, `cx` of each factor and `cd`.
  """

  def __init__(self, points, additive, flat=False, cd=None, fixed=None):
    self.points, self.additive, self.flat = points, additive, flat
    self.names, self.fixed = tuple(points), fixed
    columns = [np.concatenate(c) for c in zip(*points.values())]
    self.cd = np.log(columns[1]).mean() if cd is None else cd
    self.cx = {n: np.log(p[0]).mean() for n, p in points.items()}
    self.x = np.concatenate([np.log(p[0]) - self.cx[n]
                             for n, p in points.items()])
    self.d, self.loss = np.log(columns[1]) - self.cd, columns[2]
    sizes = [len(p[0]) for p in points.values()]
    self.which = np.repeat(np.arange(len(sizes)), sizes)

  def alone(self, name, columns, shared):
    """The problem of one factor, what is shared being fixed."""
    return _Problem({name: columns}, self.additive, cd=self.cd,
                    fixed=shared[2 * len(self.names):])

  def check_count(self, names):
    own = 1 if self.flat else 2
    need = own * len(names) + (3 if self.additive else 2)
    if len(self.loss) < need:
      raise ValueError(f'{len(self.loss)} points of {", ".join(names)} for '
                       f'{need} constants: expected at least as many')

  def whole(self, v):
    return v if self.fixed is None else np.concatenate([v, self.fixed])

  def value(self, v):
    """Sum of Huber / DELTA, and its gradient."""
    n = 2 * len(self.names)
    w = self.whole(v)
    a, alpha = w[:n:2][self.which], w[1:n:2][self.which]
    beta, e, *b = w[n:]
    exp = lambda v: np.exp(np.minimum(v, 300))  # a line search may go far
    first = exp(a - alpha * self.x - (0 if b else beta * self.d))
    second, floor = exp(b[0] - beta * self.d) if b else 0, exp(e)
    r = first + second + floor - self.loss
    slope, size = np.clip(r / DELTA, -1, 1), np.abs(r)
    small = np.minimum(size, DELTA)
    total = (small * (size - small / 2)).sum() / DELTA
    grad = np.zeros_like(w)
    g = slope * first
    count = lambda v: np.bincount(self.which, v, len(self.names))
    grad[:n:2] = count(g)
    if not self.flat:
      grad[1:n:2] = count(-g * self.x)
    grad[n] = -(slope * (second if b else first) * self.d).sum()
    grad[n + 1] = slope.sum() * floor
    if b:
      grad[n + 2] = (slope * second).sum()
    return total, grad[:len(v)]

  def starts(self):
    """Vectors of the grid; a (and b) fill what E leaves of the mean loss."""
    out = []
    alphas = (0.0,) if self.flat else ALPHAS
    if self.fixed is not None:
      rest = max(self.loss.mean() - math.exp(min(self.fixed[1], 300)), 1e-3)
      return [np.array([math.log(rest * share), alpha])
              for alpha in (-0.1, *alphas) for share in (0.5, 1.0)]
    for alpha, beta, floor in itertools.product(alphas, BETAS, FLOORS):
      low = floor * self.loss.min()
      a = math.log(max(self.loss.mean() - low, 1e-3))
      if self.additive:
        a -= math.log(2)
      out.append(np.array([a, alpha] * len(self.names) + [beta, math.log(low)]
                          + ([a] if self.additive else [])))
    return out

  def start_at(self, laws):
    """The vector of laws."""
    v = []
    for name in self.names:
      law = laws[name]
      a = law.a - law.alpha * self.cx[name]
      v += [a if self.additive else a - law.beta * self.cd, law.alpha]
    if self.fixed is None:
      v += [law.beta, law.e]
      v += [law.b - law.beta * self.cd] if self.additive else []
    return np.array(v)

  def best(self, starts):
    """The whole vector of the best fit from any of the starts."""
    def run(v, most=2000):
      return optimize.minimize(
          self.value, v, jac=True, method='L-BFGS-B', options=dict(
              maxiter=most, maxfun=10 * most, maxcor=20, ftol=1e-15,
              gtol=1e-10))

    # All a little way, then those that came furthest to the end.
    first = sorted((run(v, 100) for v in starts), key=lambda r: r.fun)
    found = min((run(r.x) for r in first[:4]), key=lambda r: r.fun)
    for _ in range(4):  # from where it stopped, without its memory
      again = run(found.x)
      if not again.fun < found.fun * (1 - 1e-4):
        break
      found = again
    return self.whole(found.x)

  def laws(self, w):
    """{factor: Law} of a whole vector."""
    n, out = 2 * len(self.names), {}
    beta, e, *b = map(float, w[n:])
    for i, name in enumerate(self.names):
      a, alpha = map(float, w[2 * i:2 * i + 2])
      a += alpha * float(self.cx[name])
      shift = beta * float(self.cd)  # D about its mean
      out[name] = (Law(a, alpha, beta, e, b[0] + shift) if b
                   else Law(a + shift, alpha, beta, e))
    return out


# --------------------------------------------------------------- critical size
def critical_sizes(one, two, x, low=1.0, high=1e12, grid=2000):
  """The D at which two laws tie, by their numbers; there are at most two.

  Args:
    one, two: `Law`s of two methods, of the same factor.
    x: The factor's value.
    low, high: Where to look.
    grid: Points, evenly in log D, between which a sign may change.

  Returns:
    Ascending array, empty where one method is better throughout.
  """
  gap = lambda t: float(one(x, np.exp(t)) - two(x, np.exp(t)))
  at = np.linspace(math.log(low), math.log(high), grid)
  signs = np.sign([gap(t) for t in at])
  roots = [math.exp(at[i]) for i in np.flatnonzero(signs == 0)]
  for i in np.flatnonzero(signs[:-1] * signs[1:] < 0):
    roots.append(math.exp(optimize.brentq(gap, at[i], at[i + 1], xtol=1e-12)))
  return np.array(sorted(roots))


def critical_size(one, two, x):
  """The D at which two multiplicative laws of the same E tie, in closed form.

    D = ((A1 / A2) X^(alpha2 - alpha1))^(1 / (beta1 - beta2))

  Raises:
    ValueError: laws of different E, of one beta, or additive ones; numbers:
      `critical_sizes`.
  """
  if one.b is not None or two.b is not None:
    raise ValueError('critical_size: additive laws have no closed form; use '
                     'critical_sizes')
  if not math.isclose(one.e, two.e, rel_tol=1e-9, abs_tol=1e-9):
    raise ValueError(
        f'critical_size: E is {math.exp(one.e):g} and {math.exp(two.e):g}: '
        'there is a closed form for equal E alone; use critical_sizes')
  if one.beta == two.beta:
    raise ValueError(f'critical_size: beta={one.beta} of both: they tie '
                     'nowhere, or everywhere')
  log = one.a - two.a + (two.alpha - one.alpha) * math.log(x)
  return math.exp(log / (one.beta - two.beta))


def _checked(points):
  """{factor: three float64 arrays of one length, all above 0}."""
  out = {}
  if not points:
    raise ValueError('no points: expected {factor: (x, d, loss)}')
  for name, columns in points.items():
    columns = tuple(np.asarray(c, float).ravel() for c in columns)
    if len(columns) != 3 or len({len(c) for c in columns}) != 1:
      raise ValueError(f'{name}: expected x, d and loss of one length, got '
                       f'{[len(c) for c in columns]}')
    for what, c in zip(('x', 'd', 'loss'), columns):
      bad = c[~(np.isfinite(c) & (c > 0))]
      if not len(c) or len(bad):
        raise ValueError(f'{name}: {what} holds {bad[:1]}: expected numbers '
                         'above 0')
    out[name] = columns
  return out
