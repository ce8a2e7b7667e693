"""Apply: the adapted model, by one interceptor. The file that knows Linen.

While a model is traced, theta is grafted into the params tree beside the layer
it belongs to (params[...]['query']['peft']['lora']['']['a']), so that nn.scan
and nn.remat slice and rematerialise it like any other parameter. The
interceptor looks for 'peft' among a module's own params and applies the rules
it finds there: no paths, no ids, no mutable state at run time.
"""

import inspect
import itertools

from flax import errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax import trees
from peftjax import views as views_lib
from peftjax.folding import fold, fold_site, located, must_fold
from peftjax.method import as_methods, check_theta, Context, hooks_of, nearest
from peftjax.method import SHARED, Site

KEY = 'peft'


def graft(methods, params, theta):
  """Params with theta beside the layers it belongs to.

  Methods that replace leaves act here; the others leave their theta under
  'peft' for the interceptor.
  """
  flat = dict(trees.flatten(params))
  tree, dropped = {}, set()
  for name, m in as_methods(methods).items():
    for path, t in theta[name].items():
      if path == SHARED:
        continue
      base, span = views_lib.split_path(path)
      at = f'{base}/' if base else ''
      if m.drops:  # the layer may have nothing else
        dropped.add(f'{base}/')
      if not any(p.startswith(at) for p in (*flat, *dropped)):
        parents = {p.rpartition('/')[0] for p in flat}
        raise ValueError(
            f'{name}: the params tree has no {base!r}{nearest(base, parents)}')
      if m.replaces:
        for leaf, value in t.items():
          flat[f'{at}{leaf}'] = _put_columns(flat[f'{at}{leaf}'], value, span)
        continue
      for leaf in m.drops:
        flat.pop(f'{at}{leaf}', None)
      columns = f'{span[0]}:{span[1]}' if span else ''
      for leaf, value in t.items():
        tree[(*base.split('/'), KEY) if base else (KEY,),
             (name, columns, leaf)] = value
  out = trees.unflatten(flat)
  for (path, inner), value in tree.items():
    node = out
    for part in itertools.chain(path, inner[:-1]):
      node = node.setdefault(part, {})
    node[inner[-1]] = value
  return out


def _put_columns(stored, value, span):
  if not span:  # theta is float32; the layer computes in the base's dtype
    return value.astype(stored.dtype)
  whole = stored.reshape(*value.shape[:-1], -1)
  return whole.at[..., slice(*span)].set(
      value.astype(stored.dtype)).reshape(stored.shape)


# ------------------------------------------------------------ interceptor
def _route(method, module, layout, called):
  """How a method acts on this call of this module: 'layer', 'fold' or ''."""
  if isinstance(module, nn.Embed) and called == 'attend':
    return 'fold' if '__call__' in hooks_of(method) else ''
  if called not in hooks_of(method):
    return ''
  if method.layer is None:
    return 'fold'
  direct = layout.route in ('flat', 'plain') or (
      layout.route == 'dot' and not method.needs_x)
  return 'layer' if direct or method.fold is None else 'fold'


class _Engine:
  """State of one trace: the methods, what they see, which sites were met."""

  def __init__(self, named, theta, train, batch):
    self.named, self.train, self.batch = named, train, batch
    self.shared = {n: t.get(SHARED, {}) for n, t in theta.items()}
    self.met = set()
    self.prefix, self.folding = (), None
    self.called = {'__call__', 'attend'}.union(*map(hooks_of, named.values()))

  def __call__(self, f, args, kwargs, context):
    module, called = context.module, context.method_name
    if called not in self.called or not module.has_variable('params', KEY):
      return f(*args, **kwargs)
    tree = module.variables['params']
    grafts = tree[KEY]
    own = {n: v for n, v in tree.items() if hasattr(v, 'shape')}
    args, kwargs = views_lib.positional(module, called, args, kwargs)
    layout, leaves = views_lib.look(module, own, args)
    path = '/'.join((*self.prefix, *module.path))
    if (path, called) == self.folding:  # all that acts here is folded in
      return f(*args, **kwargs)
    steps = []
    for name, m in self.named.items():
      route = _route(m, module, layout, called) if name in grafts else ''
      if route:
        self.met |= {(name, path, c) for c in grafts[name]}
        steps.append((name, m, route, grafts[name]))
    cut = max((i for i, s in enumerate(steps) if s[2] == 'fold'), default=-1)
    if cut >= 0:
      f = self.refold(f, steps[:cut + 1], context, own, leaves, kwargs, path)
      kwargs = {}
    for i, (name, m, _, parts) in enumerate(steps[cut + 1:]):
      plain = cut < 0 and i == 0 and 'kernel' in own
      f = self.wrap(f, name, m, parts, module, called, layout, leaves, own,
                    path, plain, steps[:cut + 1 + i])
    return f(*args, **kwargs)

  def context(self, module, called, site, name, params, rest, leaves, layout,
              kernel):
    rng = None
    if self.train and module.has_rng('params'):
      rng = module.make_rng('params')  # split over layers by every nn.scan

    def sow(key, value):
      _carries_aux(module, f'{name} at {site.path!r}', key)
      module.sow('aux', key, value)

    return Context(
        site.path, site, params, rest, self.train, rng, self.batch, sow,
        lambda x, a: views_lib.dot(module, layout, leaves, x, a), kernel,
        called)

  def folded(self, steps, leaves, own, path, train=False, key=None):
    """Own leaves of a layer with methods folded in, in their order."""
    turn = itertools.count()
    for name, m, _, parts in steps:
      must_fold(name, m)
      for columns, t in parts.items():
        where, view = path, leaves
        if columns:
          span = tuple(map(int, columns.split(':')))
          where = f'{path}[{columns}]'
          view = {n: v._replace(span=span) for n, v in leaves.items()
                  if n in ('kernel', 'bias')}
        k = None if key is None else jax.random.fold_in(key, next(turn))
        ctx = Context(where, train=train, rng=k, batch=self.batch)
        own = fold_site(m, view, own, {**self.shared[name], **t}, ctx)
    return own

  def wrap(self, f, name, m, parts, module, called, layout, leaves, own, path,
           plain, inner):
    """`f` with one method's layer view around it.

    plain: f is the layer itself, so a part of a fused kernel can be multiplied
    alone. inner: the steps that made f, which a rule that asks for the kernel
    finds folded in, as outside of training.
    """
    flat = layout.route == 'flat' and called == '__call__'

    def call(x, *rest, **kwargs):
      dtype = _compute_dtype(module, x, own)
      base = lambda new, *more: f(new, *(more or rest), **kwargs)
      if flat:
        dims_in, dims_out = leaves['kernel'].dims
        raw = x
        x = views_lib.flatten(x, layout.x_axes)
        start = x

        def base(new, *more):
          back = raw if new is start else views_lib.unflatten(
              new, dims_in, layout.x_axes)
          y = f(back, *(more or rest), **kwargs)
          return views_lib.flatten(y, layout.y_axes)

      y = None
      for columns, t in parts.items():
        span = tuple(map(int, columns.split(':'))) if columns else None
        view = {n: v._replace(span=span) if span else v
                for n, v in leaves.items()}
        params = {n: v.get(own[v.leaf]) for n, v in view.items()
                  if v.leaf in own}
        where = f'{path}[{columns}]' if columns else path
        site = Site(where, type(module).__name__, '',
                    views_lib.shapes(params), views_lib.shapes(x))

        def kernel(of=view.get('kernel')):
          return of.get(self.folded(inner, leaves, own, path)[of.leaf])

        ctx = self.context(module, called, site, name, params, rest, leaves,
                           layout, kernel if 'kernel' in view else None)
        with located(name, where):
          t = m.prepare({**self.shared[name], **t}, ctx)
        t = {n: _as(v, dtype) for n, v in t.items()}
        if not span:
          with located(name, where):
            y = m.layer(base, x, t, ctx)
          continue
        if y is None:
          y = base(x)
        alone = _matmul(params, dtype) if plain else (
            lambda new, a=span[0], b=span[1]: base(new)[..., a:b])
        with located(name, where):
          part = m.layer(_columns(alone, x, y, span), x, t, ctx)
        y = y.at[..., slice(*span)].set(part.astype(y.dtype))
      if flat:
        y = views_lib.unflatten(y, dims_out, layout.y_axes)
      return y

    return call

  def refold(self, f, steps, context, own, leaves, kwargs, path):
    """The layer called on folded parameters, folded inside the layer.

    Under jax.checkpoint: the folded kernel is made again in the backward pass
    and never stored. A module with submodules is not rematerialised.
    """
    module, method = context.module, context.method_name
    state = [c for c, v in module.variables.items()
             if c not in ('params', 'aux') and jax.tree.leaves(v)]
    if state:
      raise ValueError(
          f'{path} ({type(module).__name__}) keeps state in {state}; '
          f'{steps[-1][0]} has no layer view for it')
    params = module.variables['params']
    children = {n: v for n, v in params.items() if n not in own and n != KEY}
    hooks = {n: v for n, v in params[KEY].items()
             if set(hooks_of(self.named[n])) - {'__call__', method}}
    if hooks:  # of other methods of this module, called inside
      children[KEY] = hooks
    rngs = {n: module.make_rng(n) for n in ('dropout', 'params')
            if module.has_rng(n)}
    bare = module.clone(parent=None, name=None)

    def run(own, theta, first, rest):
      given = [(*step[:3], parts) for step, parts in zip(steps, theta)]
      own = self.folded(
          given, leaves, own, path, self.train, rngs.get('params'))
      outer = self.prefix, self.folding
      self.prefix = tuple(path.split('/')) if path else ()
      self.folding = (path, method)
      try:
        return bare.apply({'params': {**children, **own}}, *first, *rest,
                          method=method, rngs=rngs, mutable=['aux'], **kwargs)
      finally:
        self.prefix, self.folding = outer

    def call(*args):
      # Further inputs are closed over: some are Python booleans.
      one = lambda own, theta, first: run(own, theta, first, args[1:])
      one = one if children else jax.checkpoint(one)
      out, state = one(own, [parts for *_, parts in steps], args[:1])
      for key, value in state.get('aux', {}).items():
        _carries_aux(module, f'a method below {path!r}', key)
        module.put_variable('aux', key, value)
      return out

    return call


def _carries_aux(module, who, key):
  if not module.is_mutable_collection('aux'):
    raise ValueError(
        f"{who} reports {key!r}, but the model does not carry the collection "
        "'aux' to this layer: give its nn.scan variable_axes={'params': 0, "
        "'aux': 0}")


def _columns(alone, x, y, span):
  """A layer restricted to columns of a fused kernel; y is its output at x."""
  return lambda new: y[..., slice(*span)] if new is x else alone(new)


def _matmul(p, dtype):
  """x K + b on the columns that `p` holds."""
  bias = p['bias'].astype(dtype) if 'bias' in p else 0
  return lambda x: x.astype(dtype) @ p['kernel'].astype(dtype) + bias


def _as(v, dtype):
  return v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v


def _compute_dtype(module, x, own):
  """The dtype a layer computes in, which theta is cast to."""
  given = getattr(module, 'dtype', None)
  if given is not None:
    return jnp.dtype(given)
  kinds = [v.dtype for v in (x, *own.values())
           if hasattr(v, 'dtype') and jnp.issubdtype(v.dtype, jnp.floating)]
  return jnp.result_type(*kinds) if kinds else jnp.float32


# ------------------------------------------------------------------ apply
def _mode(model, method, train, args, kwargs):
  """Tells a Linen model the mode by the argument name it has for it."""
  signature = inspect.signature(getattr(type(model), method))
  given = signature.bind_partial(model, *args, **kwargs).arguments
  for name, value in (('train', train), ('deterministic', not train)):
    if name in signature.parameters:
      return kwargs if name in given else {**kwargs, name: value}
  return kwargs


def apply(model, methods, params, theta, *args, train=False, rng=None,
          batch=None, variables=None, sites=None, method='__call__',
          partial=False, **kwargs):
  """Runs the adapted model.

  Args:
    model: A Linen module; or any function `f(params, *args, **kwargs)`, whose
      params are then folded as a tree.
    methods: As given to `init`.
    params: The base's params tree, never written to.
    theta: What `init` made, trained or not.
    *args: Inputs of the model.
    train: Whether dropout and random gates are on. Passed on to a Linen model
      that takes `train` or `deterministic`.
    rng: Key for them; needed where train is set and something is random.
    batch: Side inputs that rules read from their context (task ids).
    variables: Further read-only collections of a Linen model ('batch_stats').
    sites: For functions only: what `describe(params)` returned.
    method: Name of the Linen model's method to run. One other than __call__
      may leave layers out, and the theta of these.
    partial: So may this call of __call__: a cached step of generation.
    **kwargs: Keyword inputs of the model.

  Returns:
    (output, aux): aux holds what rules reported, {path...: {name: values}}.

  Raises:
    ValueError: theta of other methods, theta for a layer that the model does
      not have or never calls, or params that do not fit the model.
  """
  named = as_methods(methods)
  check_theta(named, theta)
  if not callable(getattr(type(model), method, None)):
    known = [n for n in vars(type(model)) if not n.startswith('_')]
    raise ValueError(f'{type(model).__name__} has no method {method!r}'
                     f'{nearest(method, known)}')
  if not isinstance(model, nn.Module):
    if sites is None:
      sites = sites_lib.describe(params)
    plain = fold(methods, params, theta, sites, train=train, rng=rng)
    return model(plain, *args, **kwargs), {}
  engine = _Engine(named, theta, train, batch)
  rngs = {}
  if rng is not None:
    rngs = dict(zip(('params', 'dropout'), jax.random.split(rng)))
  variables = {**(variables or {}), 'params': graft(methods, params, theta)}
  kwargs = _mode(model, method, train, args, kwargs)
  try:
    with nn.intercept_methods(engine):
      out, state = model.apply(
          variables, *args, rngs=rngs, mutable=['aux'], method=method, **kwargs)
  except (errors.ScopeParamNotFoundError, errors.ScopeParamShapeError) as e:
    raise ValueError(f'the params tree does not fit the model: {e}') from e
  whole = method == '__call__' and not partial
  for name, by_path in theta.items() if whole else ():
    for path, t in by_path.items():
      base, span = views_lib.split_path(path)
      columns = f'{span[0]}:{span[1]}' if span else ''
      if t and path != SHARED and not named[name].replaces and (
          name, base, columns) not in engine.met:
        raise ValueError(
            f'{name}: theta for {path!r} was never used: the model did not '
            f'call {" or ".join(hooks_of(named[name]))} of that layer')
  return out, state.get('aux', {})
