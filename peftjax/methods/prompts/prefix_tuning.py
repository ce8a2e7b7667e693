"""Prefix tuning: trained keys and values before those of every attention.

Source: "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (arXiv
2101.00190); as "P-Tuning v2" (arXiv 2110.07602) the same in encoders.

  K' = k || K,  V' = v || V            k, v [P, K heads, h], every layer its own
  attn(q, K', V') = (1 - s) attn(q, K, V) + s attn(q, k, v)
  s = sum exp(q k^T) / (sum exp(q k^T) + sum exp(q K^T))

Queries stay T, and every query sees the whole prefix. project=m makes it of
vectors that all layers share, which train more steadily:

  (k, v) = tanh(Z W1 + b1) W2 + b2     Z [P, e], W1 [e, m], e = K heads * h,
                                       W2 [m, 2, K heads, h] every layer its own

Positions: shift=True counts the text's tokens from P, as the reference and
Hugging Face PEFT do, who pass the prefix as cached tokens: learned and rotary
positions move, and T5's biases by distance see the prefix as the P tokens
before the text. shift=False leaves positions as they are, and prefixes without
a bias. Keys of the prefix are never rotated.

Init: k, v ~ N(0, std); 0.02 is P-Tuning v2's in effect, PEFT's tables are
N(0, 1). With project Z ~ N(0, 1) and torch's linear layers. It does not start
as the base: a key of zeros takes its part of the attention too.

Count: 2 P e an attention layer; with project 2 (m + 1) e each, and P e +
(e + 1) m once.

Paper and code: an encoder-decoder gets a prefix of its own in the encoder, the
decoder and across, with one Z in all; the reference has three, PEFT 0.21 one
alone, in the decoder's self-attention: sites=dict(path='decoder/.*/attn$'). Of
its table T5's decoder layer l of L reads block 2 l mod L; told of one submodule
it also lets the targets attend across to themselves. In layers that see a
window, PEFT's prefix leaves it with its position.
"""

import math

import jax
import jax.numpy as jnp

from peftjax.method import Method
from peftjax.ops import prompts

EXAMPLE = dict(length=2, std=0.5)


def attention(site):
  """Default sites: every attention layer."""
  hook = site.hooks.get('attend')
  return bool(hook) and len(hook.inputs) > 2


def prefix_tuning(length=10, std=0.02, shift=True, project=0, sites=attention):
  """Prefix tuning.

  Args:
    length: P, 1 to 65536.
    std: Standard deviation of k and v at the start, any from 0 (zeros).
    shift: Whether the text's positions are counted from P, not from 0.
    project: m, width of the network that makes k and v, up to 65536; 0: none.
    sites: Predicate on sites; by default every attention layer.

  Raises:
    ValueError: a length below 1, a negative std or project, a site that is no
      attention layer, layers of different widths with project, positions that
      run out.
  """
  prompts.check_size('prefix_tuning', 'length', length)
  prompts.check_size('prefix_tuning', 'project', project, least=0)
  if not 0 <= std < math.inf:
    raise ValueError(f'prefix_tuning: std={std}: expected 0 or more')

  def heads(site):
    return tuple(site.hooks['attend'].inputs[1].shape[-2:])

  def check(found):
    for path, site in found.items():
      if not attention(site):
        raise ValueError(f'prefix_tuning: {path!r} ({site.kind}) has no hook '
                         'attend(q, k, v, mask): expected attention layers')
    if project and len({math.prod(heads(s)) for s in found.values()}) > 1:
      raise ValueError(
          f'prefix_tuning: project={project} needs layers of one width, not '
          f'{ {p: heads(s) for p, s in found.items()} }')

  def shared(key, found):
    if not project:
      return {}
    e = math.prod(next(heads(s) for s in found.values() if attention(s)))
    keys = jax.random.split(key)
    w1, b1 = prompts.linear(keys[0], e, project)
    return dict(embedding=jax.random.normal(keys[1], (length, e)), w1=w1, b1=b1)

  def init(key, site, p, stats):
    del p, stats
    if not attention(site):  # Where positions are made.
      return dict(shift=jnp.full((), length, jnp.int32))
    if project:
      return dict(zip(('w2', 'b2'),
                      prompts.linear(key, project, 2, *heads(site))))
    k, v = std * jax.random.normal(key, (2, length, *heads(site)))
    return dict(k=k, v=v)

  def prepare(t, ctx):
    del ctx
    if 'w2' not in t:
      return t
    h = jnp.tanh(t['embedding'] @ t['w1'] + t['b1'])
    k, v = jnp.einsum('pm,mcnh->cpnh', h, t['w2']) + t['b2'][:, None]
    return dict(k=k, v=v)

  def layer(f, x, t, ctx):
    if ctx.hook == 'place':
      spare, = ctx.rest
      if spare is not None and length > spare:
        raise ValueError(f'prefix_tuning: length={length} moves the tokens '
                         f'beyond the positions of the model: {spare} are left '
                         'over; use a shorter prefix or text, or shift=False')
      return f(x) + t['shift']
    if ctx.hook == 'reach':
      return jnp.concatenate([jnp.arange(-length, 0), f(x)])
    k, v, *others = ctx.rest
    return f(x, prompts.in_front(t['k'], k), prompts.in_front(t['v'], v),
             *others)

  def count(site):
    if not attention(site):
      return 0
    return 2 * math.prod(heads(site)) * (project + 1 if project else length)

  return Method(
      'prefix_tuning', sites, init, prepare, layer=layer, shared=shared,
      on=('attend', 'place', 'reach') if shift else 'attend', check=check,
      along=(lambda s: not {'place', 'reach'}.isdisjoint(s.hooks))
      if shift else None, frozen=('shift',), count=count,
      tolerance=float('inf'))
