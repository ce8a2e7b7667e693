"""Optimisers: AdamW by groups of theta's leaves, and wrappers for methods.

A method says which leaf is of which kind (`Method.labels`, leaf -> group); what
a group is trained with stands here and in the config. Each group has a learning
rate, a weight decay, decays of the moments (b1, b2) and a gradient norm of its
own to clip.

The wrappers turn one optax transformation into another: `by_label`, `gated`,
`project_after`, `transform_grad`.
"""

import jax
import jax.numpy as jnp
import optax

from peftjax.method import as_methods, nearest

# lr is a factor on the config's learning rate, lr_abs a learning rate.
GROUPS = {
    '': {},
    'head': {},
    'no_decay': dict(weight_decay=0.0),  # scales and gains, whose home is not 0
    # Gate logits of "Parameter-Efficient Transfer Learning with Diff Pruning"
    # (arXiv 2012.07463): 0.1 whatever the weights are trained with.
    'gate': dict(lr_abs=0.1, weight_decay=0.0),
    # The ratio of "LoRA+: Efficient Low Rank Adaptation of Large Models" (arXiv
    # 2402.12354).
    'fast': dict(lr=16.0),
    # Logits of a search, whose gradients are those of a loss that moves with
    # the weights: "AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank
    # Adaptation Based on Meta Learning" (arXiv 2403.09113).
    'search': dict(b1=0.5, b2=0.999, weight_decay=0.0),
    # lambda of "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv
    # 2503.18225), which is tuned apart from the angles and is not at home at 0.
    'strength': dict(weight_decay=0.0),
}
_KEYS = ('lr', 'lr_abs', 'weight_decay', 'clip', 'b1', 'b2')


# ------------------------------------------------------------ the optimiser
def labels(methods, theta):
  """Theta's tree with the name of each leaf's group in the place of arrays."""
  named = as_methods(methods)
  return {name: {path: {leaf: named[name].labels.get(leaf, '') for leaf in t}
                 for path, t in by_path.items()}
          for name, by_path in theta.items()}


def warmup(config, steps):
  """Number of steps of the warm-up in a schedule over `steps`."""
  return round(config.warmup * steps)


def schedule(config, steps, warm=None):
  """Factor on the learning rates at every step, `count -> factor`.

  A linear warm-up to 1, whose first step is not zero; then 'cosine' or 'linear'
  down to 0 at `steps`, or 'constant'.

  Args:
    config: `config.optim`.
    steps: Number of steps; it may be traced, and then `warm` is needed.
    warm: Steps of the warm-up; None: as `warmup` says.
  """
  warm = warmup(config, steps) if warm is None else warm

  def factor(count):
    u = jnp.clip((count - warm) / jnp.maximum(steps - warm, 1), 0, 1)
    decay = dict(cosine=(1 + jnp.cos(jnp.pi * u)) / 2, linear=1 - u,
                 constant=jnp.ones_like(u))[config.schedule]
    return jnp.minimum((count + 1) / jnp.maximum(warm, 1), decay)

  return factor


def settings(config, used, lr=None):
  """{group: {'lr', 'weight_decay', 'clip', 'b1', 'b2'}} of groups in `used`.

  Args:
    config: `config.optim`.
    used: Names of groups that leaves of theta are in.
    lr: Used for config.lr; it may be traced. None: config.lr.

  Raises:
    ValueError: the config names an unknown group or setting, gives both lr and
      lr_abs, a negative number, or a decay of 1 or more.
  """
  known = {*GROUPS, *used}
  for name, given in config.groups.items():
    if name not in known:
      raise ValueError(
          f'optim.groups: unknown group {name!r}{nearest(name, known)}')
    for key, value in given.items():
      if key not in _KEYS:
        raise ValueError(f'optim.groups.{name}: unknown setting {key!r}'
                         f'{nearest(key, _KEYS)}')
      if value is not None and not value >= 0:
        raise ValueError(
            f'optim.groups.{name}.{key}={value}: expected at least 0')
      if key in ('b1', 'b2') and value is not None and not value < 1:
        raise ValueError(f'optim.groups.{name}.{key}={value}: expected a number '
                         'in [0, 1)')
  out, lr = {}, config.lr if lr is None else lr
  for name in sorted(used):
    given = {k: v for k, v in config.groups.get(name, {}).items()
             if v is not None}
    if 'lr' in given and 'lr_abs' in given:
      raise ValueError(f'optim.groups.{name} has lr={given["lr"]}, a factor, '
                       f'and lr_abs={given["lr_abs"]}: give one of them')
    preset = dict(GROUPS.get(name, {}))
    if 'lr' in given:
      preset.pop('lr_abs', None)
    s = {**preset, **given}
    out[name] = dict(
        lr=s.get('lr_abs', lr * s.get('lr', 1.0)),
        weight_decay=s.get('weight_decay', config.weight_decay),
        clip=s.get('clip', config.clip), b1=s.get('b1', config.b1),
        b2=s.get('b2', config.b2))
  return out


def make(config, methods, theta, steps, warm=None, lr=None):
  """AdamW by groups.

  Args:
    config: `config.optim`: lr, weight_decay, clip (0: off), schedule, warmup,
      b1, b2, eps, groups.
    methods: As given to `init`.
    theta: The trained part of theta, or its shapes.
    steps: Number of steps that the schedule spans.
    warm, lr: As in `schedule` and `settings`; steps, warm and lr may be traced.

  Returns:
    An optax transformation of trees like `theta`.

  Raises:
    ValueError: as `settings`.
  """
  tree = labels(methods, theta)
  factor = schedule(config, steps, warm)
  groups = {}
  for name, s in settings(config, set(jax.tree.leaves(tree)), lr).items():
    adamw = optax.adamw(
        lambda count, lr=s['lr']: lr * factor(count), s['b1'], s['b2'],
        config.eps, weight_decay=s['weight_decay'])
    groups[name] = adamw if not s['clip'] else optax.chain(
        optax.clip_by_global_norm(s['clip']), adamw)
  return by_label(groups, tree)


def state_sharding(tx, state, theta_sharding, other):
  """Shardings of an optimiser state: moments lie where their leaf of theta is.

  Args:
    tx: The transformation.
    state: What `tx.init` returned, or its shapes.
    theta_sharding: Shardings, a tree like theta.
    other: Sharding of counters and whatever else the state holds.
  """
  masked = lambda v: isinstance(v, optax.MaskedNode)
  return optax.tree_map_params(
      tx, lambda v, s: v if masked(v) else s, state, theta_sharding,
      transform_non_params=lambda _: other, is_leaf=masked)


# ------------------------------------------------------------------ wrappers
def by_label(groups, labels):  # pylint: disable=redefined-outer-name
  """Every leaf updated by the transformation of its group.

  What a transformation computes over all leaves, such as a norm, it computes
  over its own group.

  Args:
    groups: {label: optax transformation}.
    labels: Tree of labels like the trained tree, as from `labels`.

  Raises:
    ValueError: a label without a transformation.
  """
  for label in set(jax.tree.leaves(labels)) - set(groups):
    raise ValueError(f'no transformation for the group {label!r}'
                     f'{nearest(label, groups)}')
  return optax.partition(groups, labels)


def gated(inner, support):
  """`inner` on a support: nothing outside it moves, nor sees the optimiser.

  Gradients are zeroed before `inner` (so that clipping and moments know only
  the support), updates after it (so that weight decay does not move the rest).

  Args:
    inner: An optax transformation.
    support: Tree like the trained one of booleans that broadcast to its leaves;
      or a function from the trained tree to such a tree.

  Raises:
    ValueError: in `init`, a support that does not fit its leaf.
  """
  inner = optax.with_extra_args_support(inner)

  def masks(params):
    return support(params) if callable(support) else support

  def keep(tree, params):
    return jax.tree.map(lambda m, v: jnp.where(m, v, jnp.zeros_like(v)),
                        masks(params), tree)

  def init(params):
    def check(path, m, v):
      try:
        fits = jnp.broadcast_shapes(jnp.shape(m), v.shape) == v.shape
      except ValueError:
        fits = False
      if not fits:
        raise ValueError(f'support of {jax.tree_util.keystr(path)} has shape '
                         f'{jnp.shape(m)}, expected {v.shape} or less')
    jax.tree_util.tree_map_with_path(check, masks(params), params)
    return inner.init(params)

  def update(grads, state, params=None, **extra):
    updates, state = inner.update(keep(grads, params), state, params, **extra)
    return keep(updates, params), state

  return optax.GradientTransformationExtraArgs(init, update)


def project_after(fn):
  """Last in a chain: the trained tree becomes fn(what it would have become).

  Exact up to the rounding of p + (fn(p + u) - p); a projection that must hold
  to the bit is a method's `after_step`.
  """

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('project_after needs the trained tree: call '
                       'update(grads, state, params)')
    new = fn(optax.apply_updates(params, updates))
    return jax.tree.map(jnp.subtract, new, params), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def transform_grad(fn):
  """First in a chain: gradients become fn(gradients, trained tree)."""

  def update(grads, state, params=None):
    return fn(grads, params), state

  return optax.GradientTransformation(optax.init_empty_state, update)
