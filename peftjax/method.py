"""The one type of the library: a method is a record of pure functions.

A method of parameter-efficient fine-tuning is described on ONE layer. It has
two views of that layer, and at least one of them:

* ``fold(p, t) -> p'``: from the layer's own parameters ``p`` and the method's
  trained values ``t`` (theta) to plain parameters. This is the definition of
  the method, and its export.
* ``layer(f, x, t, ctx) -> y``: the layer's call ``f`` wrapped. This is the fast
  path of weight methods (no dense delta is formed) and the only path of
  methods that edit activations.

Where both exist they are equal, and the conformance suite checks it. Letters:
``x`` input, ``y`` output, ``p`` parameters of one layer, ``t`` theta of one
layer, ``f`` the wrapped layer. Kernels reach a method as [d_in, d_out].
"""

from collections.abc import Callable, Mapping
import difflib
import importlib
import inspect
import pkgutil
from typing import Any, NamedTuple, Optional


class Site(NamedTuple):
  """One place a method can attach to; `describe` finds them all.

  A slice of a fused kernel is a site of its own, with the columns it covers at
  the end of its path: 'block_0/attn/qkv[0:192]'.
  """

  path: str  # 'encoder/block_3/attn/query'
  kind: str  # class of the layer: 'Dense', 'LayerNorm', 'Block', ...
  role: str  # q k v o up gate down norm embed head, or '' where unknown
  params: Mapping[str, Any]  # own leaves of ONE layer as the method sees them
  x: Any = None  # shapes of the first input of __call__
  y: Any = None  # shapes of the output of __call__
  stack: tuple[int, ...] = ()  # axes added by nn.scan
  leaves: Mapping[str, Any] = {}  # method's name of a leaf -> View
  hooks: Mapping[str, Any] = {}  # hook method -> Hook, as the model calls it
  attributes: Mapping[str, Any] = {}  # those of the layer that are numbers


class Hook(NamedTuple):
  """Shapes of a call of a module's method; None for what is no array."""

  inputs: tuple[Any, ...]
  output: Any


class Context(NamedTuple):
  """What a rule may see besides its input and its theta."""

  path: str
  site: Optional[Site] = None  # None in `prepare`
  params: Mapping[str, Any] = {}  # the layer's own leaves, as `fold` sees them
  rest: tuple[Any, ...] = ()  # further positional inputs of the call
  train: bool = False
  rng: Optional[Any] = None  # a key of this site and step, or None
  batch: Any = None  # side inputs (task ids, adapter ids)
  sow: Optional[Callable] = None  # sow(name, value): lands in apply's aux
  dot: Optional[Callable] = None  # dot(x, a [d_in, r]): x times a, as the layer
  kernel: Optional[Callable] = None  # kernel(): inner methods folded in
  hook: str = '__call__'  # the method of the module that is wrapped now


def identity(t, ctx):
  del ctx
  return t


def nothing(key, sites):
  del key, sites
  return {}


class Method(NamedTuple):
  """A method. All callables are pure and jittable.

  Attributes:
    name: Short name, the key of its theta.
    sites: `Site -> bool`, usually made by `select`.
    init: `(key, site, p, stats) -> t` for one layer; the engine vmaps it over
      stacked layers. `stats` is what `calibration` found for the layer, or None.
    prepare: `(t, ctx) -> t`, from stored to used theta, once per step.
    fold: `(p, t) -> p'` or None.
    layer: `(f, x, t, ctx) -> y` or None. f(x) is called with the further inputs
      of the call; f(x, *others) replaces them.
    on: The module method that `layer` wraps: '__call__', or a hook of our own
      backbones: 'attend', 'join', 'embed', 'readout'. A tuple wraps several;
      `ctx.hook` says which one is called.
    shared: `(key, sites) -> {name: array}`, arrays that all sites see.
    along: `Site -> bool`, sites that come along with the chosen ones.
    reads: `{path: Site} of the model -> {name: path of a leaf}`, leaves of the
      base that `init` finds in p beside the layer's own.
    frozen: Leaves of theta that are data, not trained.
    drops: Base leaves that the rule replaces ('kernel' once quantised).
    replaces: Theta holds new values of the layer's own leaves, by the same
      names; they stand in for the base's leaves and cost nothing.
    needs_x: False where `layer` reads x only through f(x) and ctx.dot(x, a), so
      that it also runs on convolutions and embeddings.
    labels: Theta leaf -> optimiser group ('b' -> 'fast'); '' is the default.
    penalty: `(theta, aux, step) -> scalar`, theta being {path: t}.
    after_step: `theta -> theta` after every update, over {path: t}: projects.
    track: `(theta, grads, step, steps) -> theta` after every update and before
      after_step, over {path: t}: what follows the gradients, such as budgets.
      It may change frozen leaves. `grads` holds those of the trained leaves,
      `step` counts from the stage's start and `steps` is its length.
    outer: `bilevel.Outer`: the trained leaves that follow the hypergradient of
      the loss on a part of the data of their own, and how; or None.
    calibration: `calibrate.Reducer` of the statistics that `init` gets, or None.
    fit: `(stats, {path: Site}) -> ({hyper-parameter: value}, stats)`: outside
      jit, what `load` makes the method from whose shapes follow from
      statistics, stats being {path: statistics}, and those for its `init`.
    phases: Further `phases.Phase`s of a procedure that changes its method.
    check: `{path: Site} -> None`, raises where the chosen sites do not suit.
    tolerance: Largest |adapted - base| at init that the card allows; 0 = exact.
    count: `(site) -> int`, trained numbers per layer by the card's formula.
    spec: The keywords that `load` makes this method from again, for artifacts;
      None for methods made in another way.
  """

  name: str
  sites: Callable
  init: Callable
  prepare: Callable = identity
  fold: Optional[Callable] = None
  layer: Optional[Callable] = None
  on: str | tuple[str, ...] = '__call__'
  shared: Callable = nothing
  along: Optional[Callable] = None
  reads: Optional[Callable] = None
  frozen: tuple[str, ...] = ()
  drops: tuple[str, ...] = ()
  replaces: bool = False
  needs_x: bool = True
  labels: Mapping[str, str] = {}
  penalty: Optional[Callable] = None
  after_step: Optional[Callable] = None
  track: Optional[Callable] = None
  outer: Optional[Any] = None
  calibration: Optional[Any] = None
  fit: Optional[Callable] = None
  phases: tuple = ()
  check: Optional[Callable] = None
  tolerance: float = 0.0
  count: Optional[Callable] = None
  spec: Optional[Mapping[str, Any]] = None


SHARED = '*'  # the key of a method's shared arrays beside its paths


def hooks_of(method):
  """The module methods that a method wraps, a tuple."""
  return (method.on,) if isinstance(method.on, str) else tuple(method.on)


def as_methods(methods):
  """One method or a sequence of them -> {unique name: method}, innermost first.

  Two methods of one name (two LoRAs) become 'lora' and 'lora_2'.
  """
  methods = (methods,) if isinstance(methods, Method) else tuple(methods)
  named = {}
  for m in methods:
    if not isinstance(m, Method):
      raise ValueError(
          f'expected a Method, got {m!r}; make one with peftjax.load(name)')
    name, n = m.name, 1
    while name in named:
      n += 1
      name = f'{m.name}_{n}'
    named[name] = m
  return named


def check_theta(named, theta):
  """Raises where theta was made by other methods."""
  if set(theta) != set(named):
    raise ValueError(
        f'theta holds {sorted(theta)}, the methods are {sorted(named)}')


def nearest(word, choices, n=3):
  """'; did you mean a, b?' for an error message, or the list of choices."""
  choices = sorted(map(str, choices))
  close = difflib.get_close_matches(str(word), choices, n, 0.5)
  if close:
    return f'; did you mean {" or ".join(map(repr, close))}?'
  return f'; choose from {", ".join(choices) or "nothing: there is none"}'


def names():
  """All method names, 'family.method', found by walking the package."""
  package = importlib.import_module('peftjax.methods')
  found = []
  for family in pkgutil.iter_modules(package.__path__):
    if family.ispkg:
      sub = importlib.import_module(f'peftjax.methods.{family.name}')
      found += [f'{family.name}.{m.name}'
                for m in pkgutil.iter_modules(sub.__path__)]
  return sorted(found)


def factory(name):
  """The factory function of 'family.method': the function named as its file."""
  if name not in names():
    meant = [n for n in names() if name in n.split('.')]  # without its family
    raise ValueError(
        f'unknown method {name!r}'
        + (f'; did you mean {" or ".join(map(repr, meant))}?' if meant
           else nearest(name, names())))
  module = importlib.import_module(f'peftjax.methods.{name}')
  return getattr(module, name.rsplit('.', 1)[-1])


def load(name, *, phase=0, **kwargs):
  """Makes a method by its path: load('lowrank.lora', rank=8).

  Args:
    name: 'family.method', a file under peftjax/methods.
    phase: For procedures that change their method: 0 is the method that they
      start with, i the one that their i-th `phases.Phase` brings.
    **kwargs: The factory's hyper-parameters. `sites` may be a predicate made by
      `select`, or the keywords of `select` as a mapping (as configs have it).

  Returns:
    A `Method`. Its `spec` holds what was given here.

  Raises:
    ValueError: unknown method, hyper-parameter or phase, with the nearest
      choices.
  """
  make = factory(name)
  known = inspect.signature(make).parameters
  for key in kwargs:
    if key not in known:
      raise ValueError(
          f'{name} has no hyper-parameter {key!r}{nearest(key, known)}')
  spec = dict(name=name, **kwargs)
  if hasattr(kwargs.get('sites'), 'items'):  # a dict or a ConfigDict
    from peftjax.sites import select  # sites.py reads Site from here
    words = inspect.signature(select).parameters
    for key in kwargs['sites']:
      if key not in words:
        raise ValueError(
            f'{name}: sites has no keyword {key!r}{nearest(key, words)}')
    kwargs['sites'] = select(**kwargs['sites'])
  first = make(**kwargs)
  later = tuple(
      p._replace(method=p.method._replace(spec={**spec, 'phase': i}))
      for i, p in enumerate(first.phases, 1))
  if phase not in range(len(later) + 1):
    raise ValueError(
        f'{name} has no phase {phase!r}; choose from 0 to {len(later)}')
  if phase:
    return later[phase - 1].method
  return first._replace(spec=spec, phases=later)
