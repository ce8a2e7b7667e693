"""Intruder dimensions: singular directions that fine-tuning brought in.

Source: "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv
2410.21228).

  K0 = U0 S0 V0^T, K1 = U1 S1 V1^T     base and tuned, [d_in, d_out]
  c_j = max_i |<v1_j, v0_i>|           over all i, for the first `top` j
  j is an intruder where c_j < eps
  mitigated: K = K1 + (lam - 1) sum_{j intruder} s1_j u1_j v1_j^T

v are directions of the output, which the paper, with kernels [d_out, d_in],
calls left singular vectors. lam = 1 changes nothing, lam = 0 takes intruders
out. A change along v that the base does not have, c u0_i v^T, is one where c >
s0_i (1 / eps^2 - 1)^(1/2) and its singular value is among the first `top`.

Single vectors turn freely where singular values are nearly equal, so that a
cosine of single vectors may be small although nothing changed. The subspace
version takes, for every i, the projection of v1_j on all v0 whose singular
values are within `near` of s0_i:

  c_j = max_i || V0_N(i)^T v1_j ||,   N(i) = {n: |s0_n - s0_i| <= near s0_i}

without the v0 of no singular value, which are no directions of the base; a
v1_j of none counts as known.

Counts depend on rank and scale of an adapter: compare at equal task accuracy.

Where sources differ:
  Tables. Hugging Face PEFT's `reduce_intruder_dimension` takes the left vectors
    of a table as it is stored, [vocabulary, d]: directions of the input. Here
    it is the output for all, and tables and heads are left out by default.
  Without intruders PEFT copies the adapter; here it is made again from the same
    delta, by other factors with the same product.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from peftjax import sites as sites_lib
from peftjax import theta as theta_lib
from peftjax import trees
from peftjax.analysis import kernels
from peftjax.method import Context
from peftjax.ops import svd

# Singular values below this share of the largest are rounding of float32.
NOTHING = 1e-6
_mul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Directions(NamedTuple):
  """The first singular directions of a tuned kernel, largest first."""

  values: jax.Array  # [top]
  cosines: jax.Array  # [top], with the nearest direction of the base
  subspace: jax.Array  # [top], with the nearest subspace of the base


def _compare(base, tuned, top, near):
  """(terms of the tuned kernel's SVD, cosines, cosines with subspaces)."""
  most = min(base.shape)
  _, s0, v0 = svd.split(base, most)
  u, s, vt = svd.split(tuned, min(top, most))
  overlap = jnp.abs(_mul(v0, vt.T))  # [most, top]
  real = s0 > NOTHING * s0[0]
  window = (jnp.abs(s0[:, None] - s0) <= near * s0[:, None]) & real
  inside = jnp.sqrt(_mul(window.astype(overlap.dtype), overlap ** 2).max(0))
  known = s <= NOTHING * s[0]
  return (u, s, vt), overlap.max(0), jnp.where(known, 1, inside)


@functools.partial(jax.jit, static_argnames='top')
def directions(base, tuned, top=10, near=0.05):
  """How well the base knows the first directions of a tuned kernel.

  Args:
    base: [d_in, d_out].
    tuned: [d_in, d_out].
    top: How many directions; at most min(d_in, d_out) are there.
    near: Of the subspace version.

  Returns:
    `Directions`.
  """
  (_, s, _), cosines, subspace = _compare(base, tuned, top, near)
  return Directions(s, cosines, subspace)


def report(base, tuned, sites, top=10, eps=0.5, near=0.05,
           chosen=sites_lib.kernels):
  """Intruders of every kernel.

  Args:
    base: Params tree.
    tuned: Params tree of the same model, as `fold` makes it.
    sites: What `describe` returned.
    top, eps, near: As above; papers use 10 and 0.5.
    chosen: Predicate on sites; by default every kernel but heads and tables.

  Returns:
    {name of a kernel: dict(intruders, subspace_intruders: counts; values,
    cosines, subspace: [top] arrays, as `Directions`)}.

  Raises:
    ValueError: settings outside their ranges, kernels that are not there.
  """
  _check(top, eps)
  if not 0 <= near < 1:
    raise ValueError(f'near={near}: expected a number in [0, 1); 0.05 is usual')
  out = {}
  for name, k0, k1 in kernels.each(sites, base, tuned, chosen=chosen):
    found = jax.device_get(directions(k0, k1, top, near))
    out[name] = dict(
        intruders=int((found.cosines < eps).sum()),
        subspace_intruders=int((found.subspace < eps).sum()),
        **found._asdict())
  return out


# ------------------------------------------------------------------ mitigation
@functools.partial(jax.jit, static_argnames='top')
def mitigate_kernel(base, tuned, lam=0.75, top=10, eps=0.5):
  """One kernel with its intruders scaled by lam, [d_in, d_out]."""
  (u, s, vt), cosines, _ = _compare(base, tuned, top, 0.0)
  return tuned + (lam - 1) * _mul(u * (s * (cosines < eps)), vt)


def mitigate(base, tuned, sites, lam=0.75, top=10, eps=0.5,
             chosen=sites_lib.kernels):
  """The tuned params with the intruders of every kernel scaled by lam.

  Args:
    base: Params tree.
    tuned: Params tree of the same model, as `fold` makes it.
    sites: What `describe` returned.
    lam: From 0, no intruders, to 1, as they are.
    top, eps: As of `report`.
    chosen: As of `report`; everything else stays as it is in `tuned`.

  Returns:
    A params tree of the structure and dtypes of `tuned`.

  Raises:
    ValueError: as `report`; a lam outside [0, 1].
  """
  _check(top, eps)
  if not 0 <= lam <= 1:
    raise ValueError(f'lam={lam}: expected a number from 0 (intruders are '
                     'taken out) to 1 (nothing is done); 0.75 is usual')
  fn = lambda k1, k0: mitigate_kernel(k0, k1, lam, top, eps)
  return kernels.replace(fn, sites, tuned, base, chosen=chosen)


def to_lora(method, base, tuned, sites):
  """The change from base to tuned as the theta of a LoRA.

  s A B is the nearest to the change, at each site of the method, of the rank
  that the method has there; A and B take the root of the singular values each.
  A mitigated change may exceed that rank: what is lost is told.

  Args:
    method: From `load('lowrank.lora', ...)`.
    base: Params tree.
    tuned: Params tree; it differs from base in kernels of the method's alone.
      What else was trained, such as a head, is folded into base before.
    sites: What `describe` returned.

  Returns:
    (theta, {name of a kernel: ||change - s A B|| / ||change||, 0 for none}).

  Raises:
    ValueError: another method, or a change that a LoRA at these sites is not.
  """
  if method.name != 'lora':
    raise ValueError(f'to_lora: the method is {method.name!r}, expected one '
                     "made by load('lowrank.lora', rank=...)")
  shapes = jax.eval_shape(lambda p: theta_lib.init(
      method, jax.random.key(0), sites, p), base)[method.name]
  chosen = lambda site: site.path in shapes
  rest = kernels.replace(lambda _, k0: k0, sites, tuned, base, chosen=chosen)
  old = trees.flatten(base)
  for path, value in trees.flatten(rest).items():
    if not np.array_equal(value, old[path]):
      raise ValueError(
          f'to_lora: {path!r} changed too, which no LoRA at these sites can '
          'say; add the site to the method, or fold what changed it into base '
          'first')
  theta, lost = {}, {}
  for path, form in shapes.items():
    rank, made = form['a'].shape[-1], []
    scale = method.prepare({}, Context(path))['scale']
    for name, k0, k1 in kernels.each(
        {path: sites[path]}, base, tuned, chosen=chosen):
      a, b, share = _nearest(k1 - k0, rank, scale)
      made.append(dict(a=a, b=b))
      lost[name] = float(share)
    theta[path] = {n: jnp.stack([m[n] for m in made]).reshape(leaf.shape)
                   for n, leaf in form.items()}
  return {method.name: theta}, lost


@functools.partial(jax.jit, static_argnames='rank')
def _nearest(delta, rank, scale):
  """(a, b, ||delta - scale a b|| / ||delta||)."""
  a, b = svd.refactor(delta, rank, scale)
  whole = jnp.linalg.norm(delta)
  left = jnp.linalg.norm(delta - scale * _mul(a, b))
  return a, b, jnp.where(whole > 0, left / jnp.where(whole > 0, whole, 1), 0)


def _check(top, eps):
  if not isinstance(top, int) or top < 1:
    raise ValueError(f'top={top!r}: expected a whole number, at least 1; 10 is '
                     'usual')
  if not 0 <= eps <= 1:
    raise ValueError(f'eps={eps}: expected a cosine in [0, 1]; 0.5 is usual')
