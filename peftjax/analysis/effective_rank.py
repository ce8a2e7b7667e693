"""Effective rank: how many directions hold most of a kernel, or of its change.

Source: "LoRA Learns Less and Forgets Less" (arXiv 2405.09673).

  r(p) = min {k: sum_{i <= k} s_i^2 >= p sum_i s_i^2}      s in descending order

of the base, the tuned kernel, and delta = tuned - base, by default for p = 0.9.
Rotations and scales of a kernel do not change it; a LoRA's delta has at most
its rank; a flat spectrum of n has ceil(p n).

Noise alone looks high-rank: of i.i.d. normal entries, r(0.9) of a square kernel
is 0.51 of its side. So two controls go along: the rank of a normal matrix with
the shape and the root mean square of delta, and of the base with that added.
And a delta of high rank does not rule out that one of low rank does as well.
"""

import zlib

import jax
import jax.numpy as jnp

from peftjax import sites as sites_lib
from peftjax.analysis import kernels

# Sums of squares in float32 are good to this share: a spectrum that reaches p
# but for rounding has reached it.
ROUNDING = 1e-5


def effective_rank(spectrum, p=0.9):
  """r(p) of a spectrum; of nothing but zeros it is 0.

  Args:
    spectrum: [..., k], singular values in descending order.
    p: Share of the squares, above 0 and below 1.

  Returns:
    [...] of int32.

  Raises:
    ValueError: a p that is not between 0 and 1.
  """
  if not 0 < p < 1:
    raise ValueError(f'p={p}: expected a share above 0 and below 1; 0.9 is '
                     'usual')
  sums = jnp.cumsum(jnp.square(jnp.asarray(spectrum, jnp.float32)), -1)
  whole = sums[..., -1:]
  short = sums < p * (1 - ROUNDING) * whole
  return jnp.where(whole[..., 0] > 0, short.sum(-1) + 1, 0)


@jax.jit
def spectra(base, tuned, key):
  """Singular values of a kernel, its change and the controls.

  Args:
    base: [d_in, d_out].
    tuned: [d_in, d_out].
    key: Of the noise.

  Returns:
    dict(base, tuned, delta, noise, noised: [min(d_in, d_out)]); noise has the
    root mean square of delta, noised is base + noise.
  """
  delta = tuned - base
  noise = jnp.sqrt(jnp.mean(delta ** 2)) * jax.random.normal(
      key, delta.shape, delta.dtype)
  found = dict(base=base, tuned=tuned, delta=delta, noise=noise,
               noised=base + noise)
  return {n: jnp.linalg.svd(w, compute_uv=False) for n, w in found.items()}


def report(base, tuned, sites, p=0.9, key=None, chosen=sites_lib.kernels):
  """Effective ranks and spectra of every kernel.

  Args:
    base: Params tree.
    tuned: Params tree of the same model, as `fold` makes it.
    sites: What `describe` returned.
    p: Share of the squares.
    key: Of the controls; by default that of seed 0.
    chosen: Predicate on sites; by default every kernel but heads and tables.

  Returns:
    {name of a kernel: dict(rank: {base, tuned, delta, noise, noised: r(p)},
    norm: {the same: Frobenius norms}, spectra: {the same: arrays})}.

  Raises:
    ValueError: a p that is not between 0 and 1, kernels that are not there.
  """
  key = jax.random.key(0) if key is None else key
  out = {}
  for name, k0, k1 in kernels.each(sites, base, tuned, chosen=chosen):
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    found = jax.device_get(spectra(k0, k1, own))
    out[name] = dict(
        rank={n: int(effective_rank(s, p)) for n, s in found.items()},
        norm={n: float((s.astype(float) ** 2).sum() ** 0.5)
              for n, s in found.items()},
        spectra=found)
  return out


def of_theta(methods, params, theta, sites, p=0.9, key=None,
             chosen=sites_lib.kernels):
  """`report` of what theta makes of the params; base and delta in float32.

  Raises:
    ValueError: as `report`; a method that cannot fold.
  """
  base, tuned = kernels.tuned(methods, params, theta, sites)
  return report(base, tuned, sites, p, key, chosen)
