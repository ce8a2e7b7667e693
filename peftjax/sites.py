"""Where a method can attach: every layer of a model, found by one trace.

`describe` runs the model's init abstractly (no arrays are made) and records
each layer's path, class, role, parameters and activations. `select` makes the
predicates that methods take as `sites`.
"""

import numbers
import re

import flax.linen as nn
from flax.linen import meta
import jax

from peftjax import trees
from peftjax import views as views_lib
from peftjax.folding import own_leaves
from peftjax.method import Hook, nearest, Site

ROLES = ('q', 'k', 'v', 'o', 'up', 'gate', 'down', 'norm', 'embed', 'head')

# Ordered (pattern on the path, role); the first match wins.
ROLE_RULES = (
    (r'(^|/)head/', 'head'),
    (r'(^|/)(q|query|q_proj|query_proj|to_q|wq|q_lin)$', 'q'),
    (r'(^|/)(k|key|k_proj|key_proj|to_k|wk|k_lin)$', 'k'),
    (r'(^|/)(v|value|v_proj|value_proj|to_v|wv|v_lin)$', 'v'),
    (r'(^|/)(attn|attention|self_attn|self_attention|mha)[^/]*/([^/]+/)*'
     r'(out|output|o|wo|proj|c_proj|dense|out_lin|out_proj|o_proj)$', 'o'),
    (r'(^|/)(o_proj|out_proj|to_out|out_lin)$', 'o'),
    (r'(^|/)MultiHead[^/]*/out$', 'o'),
    (r'(^|/)(gate|gate_proj|wi_0|w1)$', 'gate'),
    (r'(^|/)(up|up_proj|fc1|wi|wi_1|w3|lin1|linear1|c_fc|intermediate'
     r'|intermediate/dense)$', 'up'),
    (r'(^|/)(down|down_proj|fc2|wo|w2|lin2|linear2)$', 'down'),
    (r'(^|/)(mlp|ffn|feed_forward)[^/]*/([^/]+/)*(out|c_proj|proj)$', 'down'),
    (r'(^|/)(head|heads|classifier|lm_head|logits|score)$', 'head'),
)

# Ordered (pattern, parts): kernels known to hold several projections side by
# side, in equal parts. Interleaved layouts must be named by the user.
FUSED = (
    (r'(^|/)(qkv|qkv_proj|to_qkv|Wqkv|c_attn|in_proj)$', ('q', 'k', 'v')),
    (r'(^|/)(kv|to_kv|kv_proj)$', ('k', 'v')),
    (r'(^|/)gate_up(_proj)?$', ('gate', 'up')),
)


# What config.model.fused may be.
FUSED_RULES = {'split': FUSED, 'whole': ()}


def _role(path, kind, rules):
  if 'Norm' in kind:
    return 'norm'
  if kind == 'Embed':
    return 'embed'
  return trees.first_match(rules, path, '')


def _slices(path, width, fused):
  """[(role, start, stop)] of a fused kernel of `width` columns, or []."""
  parts = trees.first_match(fused, path, None)
  if not parts:
    return []
  if isinstance(parts[0], str):
    if width % len(parts):
      raise ValueError(
          f'{path}: {width} columns do not divide into {parts}; give their '
          f'widths, as in fused=(({path!r}, (("q", 512), ("k", 128), ...)),)')
    parts = [(role, width // len(parts)) for role in parts]
  if sum(n for _, n in parts) != width:
    raise ValueError(f'{path}: {parts} do not add up to its {width} columns')
  out, start = [], 0
  for role, n in parts:
    out.append((role, start, start + n))
    start += n
  return out


def _site(path, kind, role, leaves, own, x, y, stack, span=None, hooks=None,
          attributes=None):
  """A site from its views; with a span, the part of a fused kernel."""
  if span:
    path = f'{path}[{span[0]}:{span[1]}]'
    leaves = {n: v._replace(span=span) for n, v in leaves.items()
              if n in ('kernel', 'bias')}
    y = jax.ShapeDtypeStruct((*y.shape[:-1], span[1] - span[0]), y.dtype)
  params = {
      n: jax.eval_shape(v.get, jax.ShapeDtypeStruct(v.shape, own[v.leaf].dtype))
      for n, v in leaves.items()}
  return Site(path, kind, role, params, x, y, stack, leaves, hooks or {},
              attributes or {})


def _stack(path, own, flat, children):
  """Leading axes that scan (or vmap) adds to a layer's leaves."""
  for p, leaves in [(path, own), *children]:
    for name, one in leaves.items():
      key = f'{p}/{name}' if p else name
      full = flat[key].shape
      n = len(full) - len(one.shape)
      if n < 0 or tuple(full[n:]) != tuple(one.shape):
        raise ValueError(
            f'{key}: {tuple(one.shape)} in the layer but {tuple(full)} in the '
            'params tree; only leading stacked axes are understood')
      return tuple(full[:n])
  return ()


def _hook(module, name, args, kwargs, y):
  """(name, Hook) of a call of a backbone's own method, or None."""
  if name.startswith('_') or name == 'setup' or module.scope is None or (
      type(module).__module__.partition('.')[0] == 'flax'):
    return None
  args, _ = views_lib.positional(module, name, args, kwargs)
  shape = lambda v: views_lib.shapes(v) if hasattr(v, 'shape') else None
  return name, Hook(*jax.tree.map(shape, (tuple(args), y)))


def describe(model, *args, roles=(), fused=FUSED, **kwargs):
  """Finds every site of a model without running it.

  Args:
    model: A Linen module; or a params tree (nested mapping of arrays) of any
      other framework, in which case `args` stay empty.
    *args: Example inputs (arrays or ShapeDtypeStructs) of `model.__call__`.
    roles: Ordered (regex, role) rules tried before the built-in ones.
    fused: Ordered (regex, parts) rules naming fused kernels, where parts is
      ('q', 'k', 'v') for equal parts or (('q', 512), ('k', 128)) with widths;
      () keeps fused kernels whole.
    **kwargs: Further keyword inputs of `model.__call__`.

  Returns:
    {path: Site} in call order. The root's own leaves stand under ''.

  Raises:
    ValueError: boxed parameters, a fused kernel whose parts do not fit, or an
      unknown role.
  """
  rules = tuple(roles) + ROLE_RULES
  for _, role in rules:
    if role not in ROLES:
      raise ValueError(f'unknown role {role!r}{nearest(role, ROLES)}')
  if not isinstance(model, nn.Module):
    return _describe_tree(model, rules)

  seen, clash, hooks, numbers_of = {}, {}, {}, {}

  def record(f, args_, kwargs_, context):
    y = f(*args_, **kwargs_)
    module = context.module
    if context.method_name != '__call__':
      found = _hook(module, context.method_name, args_, kwargs_, y)
      if found:
        at = '/'.join(module.path)
        hooks.setdefault(at, {}).setdefault(*found)
      return y
    path = '/'.join(module.path)
    kind = type(module).__name__
    if path in seen:
      if seen[path][0] != kind:
        clash[path] = (seen[path][0], kind)
      return y
    tree = module.variables.get('params', {})
    if any(isinstance(v, meta.AxisMetadata) for v in jax.tree.leaves(
        dict(tree), is_leaf=lambda v: isinstance(v, meta.AxisMetadata))):
      raise ValueError(
          f'{path}: boxed parameters (nn.with_partitioning); build the model '
          'without them, or pass params through flax.linen.meta.unbox and '
          'state shardings by rules (peftjax.sharding)')
    own = {n: v for n, v in tree.items() if hasattr(v, 'shape')}
    args_, _ = views_lib.positional(module, '__call__', args_, kwargs_)
    layout, leaves = views_lib.look(module, own, args_)
    seen[path] = (kind, layout, leaves, views_lib.shapes(own),
                  views_lib.shapes(args_[0]) if args_ else None,
                  views_lib.shapes(y), y)
    numbers_of[path] = {
        n: v for n, v in vars(module).items()
        if n in module.__dataclass_fields__ and isinstance(v, numbers.Number)}
    return y

  last = []

  def run(*a):
    out, variables = model.init_with_output(jax.random.key(0), *a, **kwargs)
    # A layer whose output IS the model's output is its head, whatever its name.
    last.extend(p for p, s in seen.items()
                if any(s[-1] is leaf for leaf in jax.tree.leaves(out)))
    return variables['params'] if 'params' in variables else {}

  with nn.intercept_methods(record):
    params = jax.eval_shape(run, *args)
  flat = trees.flatten(params)
  order = sorted(seen, key=_call_order(seen))
  sites = {}
  for path in order:
    kind, layout, leaves, own, x, y, _ = seen[path]
    if path in clash:
      raise ValueError(
          f'{path}: modules {" and ".join(clash[path])} share one scope '
          '(nn.share_scope); a method could not tell their leaves apart')
    inside = [(p, s[3]) for p, s in seen.items()
              if p.startswith(path + '/') and s[3]]
    stack = _stack(path, own, flat, inside)
    role = _role(path, kind, rules) if leaves else ''  # containers have none
    if 'kernel' in leaves and path in last and not role:
      role = 'head'
    parts = []
    if layout.route == 'flat' and layout.y_axes == (-1,):
      parts = _slices(path, leaves['kernel'].full[-1], fused)
    if parts:
      for part, start, stop in parts:
        s = _site(path, kind, part, leaves, own, x, y, stack, (start, stop))
        sites[s.path] = s
    else:
      sites[path] = _site(path, kind, role, leaves, own, x, y, stack,
                          hooks=hooks.get(path), attributes=numbers_of[path])
  return sites


def _call_order(seen):
  """Parents before children, else as called (children finish first)."""
  position = {p: i for i, p in enumerate(seen)}
  first = {}
  for p, i in position.items():
    parts = p.split('/') if p else []
    for n in range(len(parts) + 1):
      key = '/'.join(parts[:n])
      first[key] = min(first.get(key, i), i)
  return lambda p: (first[p], p.count('/') + bool(p), position[p])


def _describe_tree(params, rules):
  """Sites of a plain params tree: one for each dict that holds arrays."""
  groups = {}
  for key, value in trees.flatten(params).items():
    path, _, leaf = key.rpartition('/')
    groups.setdefault(path, {})[leaf] = value
  if not groups:
    raise ValueError('describe: neither a Linen module nor a tree of arrays')
  sites = {}
  for path, own in groups.items():
    leaves = {}
    for name, value in own.items():
      ndim = len(value.shape)
      alias = name
      if ndim == 2 and name in ('w', 'W', 'weight', 'kernel'):
        alias = 'kernel'
      elif ndim == 1 and name in ('b', 'bias'):
        alias = 'bias'
      leaves[alias] = (
          views_lib.matrix_view(name, value) if alias == 'kernel'
          else views_lib.native_view(name, value))
    sites[path] = _site(path, 'Tree', _role(path, '', rules), leaves,
                        views_lib.shapes(own), None, None, ())
  return sites


class Select:
  """A predicate on sites that knows its parts; made by `select`."""

  def __init__(self, roles, kind, path, leaf, exclude):
    self.roles, self.kind, self.path = roles, kind, path
    self.leaf, self.exclude = leaf, exclude

  def _parts(self):
    """(what, value, predicate) of every alternative that must match."""
    for r in self.roles:
      yield 'roles', r, lambda s, r=r: s.role == r
    for k in self.kind:
      yield 'kind', k, lambda s, k=k: s.kind == k
    for p in self.path:
      yield 'path', p, lambda s, p=p: re.search(p, s.path) is not None
    for n in self.leaf:
      yield 'leaf', n, lambda s, n=n: n in s.params

  def __call__(self, site):
    groups = {}
    for what, _, ok in self._parts():
      groups.setdefault(what, []).append(ok(site))
    if any(re.search(p, site.path) for p in self.exclude):
      return False
    return all(any(g) for g in groups.values())

  @property
  def keywords(self):
    """The keywords of `select` that make this predicate again."""
    return {n: v for n, v in vars(self).items() if v}

  def __repr__(self):
    parts = (f'{n}={v!r}' for n, v in self.keywords.items())
    return f'select({", ".join(parts)})'

  def unmatched(self, sites):
    """Alternatives that no site satisfies, as (what, value)."""
    found = [(what, value) for what, value, ok in self._parts()
             if not any(map(ok, sites))]
    return found + [('exclude', p) for p in self.exclude
                    if not any(re.search(p, s.path) for s in sites)]


def _tuple(value):
  if value is None:
    return ()
  return (value,) if isinstance(value, str) else tuple(value)


def select(roles=None, kind=None, path=None, leaf=None, exclude=None):
  """A predicate on sites; all given conditions must hold.

  Args:
    roles: Roles, as a sequence, one name, or letters: 'qv', ('q', 'up').
    kind: Class name(s) of layers: 'Dense', ('Dense', 'Conv').
    path: Regular expression(s), searched in the site's path.
    leaf: Own leaf name(s) that the layer must have: 'bias'.
    exclude: Regular expression(s) of paths to leave out.

  Raises:
    ValueError: an unknown role or a broken regular expression.
  """
  letters = isinstance(roles, str) and all(r in ROLES for r in roles)
  roles = tuple(roles) if letters else _tuple(roles)
  for r in roles:
    if r not in ROLES:
      raise ValueError(f'unknown role {r!r}{nearest(r, ROLES)}')
  for p in _tuple(path) + _tuple(exclude):
    try:
      re.compile(p)
    except re.error as e:
      raise ValueError(f'path {p!r} is not a regular expression: {e}') from e
  return Select(roles, _tuple(kind), _tuple(path), _tuple(leaf),
                _tuple(exclude))


def kernels(site):
  """Default of most weight methods: every kernel but the head's."""
  return ('kernel' in site.params and len(site.params['kernel'].shape) == 2
          and site.role not in ('head', 'embed'))


def matched(method, sites):
  """{path: Site} that a method attaches to.

  Raises:
    ValueError: nothing matches, or a part of the selection matches nothing; the
      message lists what exists.
  """
  found = {p: s for p, s in sites.items() if method.sites(s)}
  rule = repr(method.sites) if isinstance(method.sites, Select) else getattr(
      method.sites, '__name__', repr(method.sites))
  if not found:
    raise ValueError(
        f'{method.name}: {rule} matches no site. There are:\n{table(sites)}')
  if isinstance(method.sites, Select):
    missed = method.sites.unmatched(sites.values())
    if missed:
      what, value = missed[0]
      field = {'roles': 'role', 'kind': 'kind'}.get(what, 'path')
      choices = (
          {n for s in sites.values() for n in s.params} if what == 'leaf'
          else {getattr(s, field) for s in sites.values()} - {''})
      raise ValueError(
          f'{method.name}: {what}={value!r} matches no site'
          f'{nearest(value, choices)}')
  if method.check:
    method.check(found)
  if method.along:
    found = {p: s for p, s in sites.items() if p in found or method.along(s)}
  return found


def table(sites):
  """One line a site: path, kind, role, leaves."""
  rows = []
  for s in sites.values():
    leaves = ' '.join(f'{n}{list(v.shape)}' for n, v in s.params.items())
    stack = f' x{list(s.stack)}' if s.stack else ''
    rows.append(f'  {s.path or "(root)":<40} {s.kind:<14} {s.role:<5} '
                f'{leaves}{stack}')
  return '\n'.join(rows)


def check_fits(sites, params):
  """Raises where a params tree is not the one that `sites` describe."""
  flat = trees.flatten(params)
  for site in sites.values():
    own_leaves(site, flat)
