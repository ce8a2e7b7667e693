"""Trans-PEFT: a LoRA trained on a perturbed base, to survive the base's update.

Source: "Adapt Once, Thrive with Updates: Transferable Parameter-Efficient
Fine-Tuning on Evolving Base Models" (arXiv 2506.06844).

The LoRA is that of `lowrank.lora`. What the base knows changes most in its
perceptrons from one version to the next, so while training the adapter learns
not to lean on them:

  masking:  h' = h * m               h [..., d_ff] enters the kernel 'down';
                                     m ~ Bernoulli(1 - mask), every entry alone
  dropping: u' = u, or u + FFN(u)    u the residual stream, one draw with
                                     probability `drop` a layer and batch

Without a factor 1 / (1 - mask), as in the authors' code. A dropped layer leaves
out its whole perceptron, norm included, in the result and in all gradients; it
is computed, so no time is saved. Outside of training both are off. Keys are
those of the layer's own stream: nn.remat draws the same again on the way back.

Init: as `lowrank.lora`, exactly the base. 'mask' at the kernels 'down' and
'drop' at the blocks are frozen and mark the places; they hold the rates.

Count: r (d_in + d_out) a kernel of the LoRA.

It folds as a LoRA, and into the new base as well as into the old one: read an
adapter for another base by load_adapter(path, sites), without params.

Masking needs layers of the role 'down', on any model. Dropping needs blocks
that call the hook `join(u, x, a, which)` with which='mlp', as the library's
transformers do. Blocks that norm after the join (BERT's) still do so where the
perceptron is dropped.

Where sources differ:
  The code draws `drop` from the host's generator, on every worker anew and, in
    recomputed layers, again; here all of a batch and both ways see one draw.
  The script has mask=0 and drop=0.1, and the LoRA on q, k, v and o; so has
    this. Its other form, for bottleneck adapters, is not here.
"""

import jax
import jax.numpy as jnp

from peftjax.methods.lowrank.lora import lora

EXAMPLE = dict(rank=2, alpha=4.0, drop=0.1, mask=0.1)
JOINS = ('attn', 'cross_attn', 'mlp')


def attention(site):
  """Default sites: the kernels of attention layers."""
  return 'kernel' in site.params and site.role in ('q', 'k', 'v', 'o')


def trans_peft(rank=64, alpha=128.0, drop=0.1, mask=0.0, scaling='lora',
               rank_pattern=(), alpha_pattern=(), dropout=0.05,
               sites=attention):
  """Trans-PEFT.

  Args:
    rank: r, at least 1 and at most the smaller side of the kernel.
    alpha: Numerator of the scale, any positive number.
    drop: Probability that a layer's perceptron is left out, from 0 to 1.
    mask: Share of the perceptrons' hidden entries set to 0, from 0 to 1.
    scaling: 'lora' (alpha / r) or 'rslora' (alpha / sqrt(r)).
    rank_pattern: Ordered (regex, rank) pairs on site paths, or a mapping; the
      first match wins, other sites take `rank`.
    alpha_pattern: The same for alpha.
    dropout: Rate on the adapter's input while training, 0 for none.
    sites: Predicate on the LoRA's sites; by default the roles q, k, v and o.

  Raises:
    ValueError: what `lora` refuses, a drop or mask outside [0, 1], a model
      without the places that they need, or training where the layer that is to
      be masked is folded.
  """
  base = lora(rank, alpha, scaling, rank_pattern, alpha_pattern, dropout, sites)
  for name, rate in (('drop', drop), ('mask', mask)):
    if not 0 <= rate <= 1:
      raise ValueError(f'trans_peft: {name}={rate}: expected a probability, 0 '
                       f'to 1; the nearest is {0.0 if rate < 0 else 1.0}')
  joins = lambda site: drop > 0 and 'join' in site.hooks
  masked = lambda site: (
      mask > 0 and site.role == 'down' and 'kernel' in site.params)

  def shared(key, found):  # The first to be given what came along.
    del key
    for name, rate, here, needed in (
        ('drop', drop, joins, 'blocks with a hook join(u, x, a, which), as '
         'those of peftjax.models'),
        ('mask', mask, masked, "kernels of the role 'down'; describe(model, x, "
         'roles=...) names them')):
      if rate and not any(map(here, found.values())):
        raise ValueError(f'trans_peft: {name}={rate} needs {needed}, and this '
                         f'model has none; with {name}=0 it is left alone')
    return {}

  def init(key, site, p, stats):
    t = base.init(key, site, p, stats) if sites(site) else {}
    if masked(site):
      t['mask'] = jnp.float32(mask)
    if joins(site):
      t['drop'] = jnp.float32(drop)
    return t

  def prepare(t, ctx):
    folds = ctx.dot is None
    if ctx.train and folds and not {'mask', 'drop'}.isdisjoint(t):
      raise ValueError(f'trans_peft: {ctx.path!r} is folded while training, '
                       'and would lose its mask or drop: put methods that fold '
                       'before this one; a block that holds a kernel of its '
                       'own cannot be dropped')
    return base.prepare(t, ctx)

  def fold(p, t):
    return base.fold(p, t) if 'a' in t else p

  def layer(f, x, t, ctx):
    if ctx.hook == 'join':
      which = ctx.rest[-1]
      if which not in JOINS:
        raise ValueError(f'trans_peft: drop={drop}: {ctx.path!r} joins '
                         f'{which!r}, expected one of {JOINS}; set drop=0')
      if which != 'mlp' or not ctx.train:
        return f(x)
      return jnp.where(_draw(ctx, 'drop', drop), x, f(x))
    if 'mask' in t and ctx.train:
      x = jnp.where(_draw(ctx, 'mask', mask, x.shape), 0, x)
    return base.layer(f, x, t, ctx) if 'a' in t else f(x)

  def count(site):
    return base.count(site) if sites(site) else 0

  return base._replace(
      name='trans_peft', init=init, prepare=prepare, fold=fold, layer=layer,
      on=('__call__', 'join') if drop else '__call__', shared=shared,
      along=lambda site: masked(site) or joins(site), count=count,
      frozen=('mask', 'drop'))


def _draw(ctx, name, rate, shape=()):
  """Booleans, True with probability `rate`; not by the key of the dropout."""
  if ctx.rng is None:
    raise ValueError(f'{name}={rate} at {ctx.path!r} needs a key while '
                     'training: apply(..., train=True, rng=key)')
  return jax.random.bernoulli(jax.random.fold_in(ctx.rng, 1), rate, shape)
