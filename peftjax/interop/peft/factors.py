"""What of the low-rank family is a plain LoRA, and of which factors.

All of these add s A B to the kernel of the base, once they are trained:

  lora, dora, lora_plus, kasa, trans_peft   A, B
  eva                                       A, B
  auto_lora                                 A diag(p), B; then A, B
  selective_lora                            A, B where the gate is open
  pissa, olora, corda, lora_ga              [A, A0], [B; -B0]
  lora_xs, lora_sb                          A R, B
  dense_lora with activation='identity'     E, M D
  delora with form='paper'                  diag(w) [dA, A0], [B; dB]

(dora and kasa do more than that, which `types/lora.py` writes beside it; of
delora the columns and rows have norm 1, and dA, dB are what they turned by.)
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from peftjax.interop.peft.part import at
from peftjax.methods.lowrank import delora

# Their stacked layers have the largest rank of the stack, the rest being pairs
# of zeros, which train nowhere and are left out.
_PADDED = ('lowrank.eva', 'lowrank.auto_lora', 'lowrank.selective_lora')


class Factors(NamedTuple):
  """scale a b is what a method adds to a kernel."""

  a: Any  # [d_in, r]
  b: Any  # [r, d_out]
  scale: float
  alpha: float | None  # what it was given as, if it was


def rank_root(given):
  """What alpha is divided by: r -> r, or its root."""
  return math.sqrt if given.get('scaling') == 'rslora' else float


def of(part, names):
  """{path: Factors} of a Part, without sites where nothing is added.

  Raises:
    ValueError: a method that adds what no matrix can, or nothing anywhere.
  """
  given, name, out = part.settings, part.spec['name'], {}
  root = rank_root(given)
  for path, t in part.theta.items():
    found = FORMS[name](t, given, part.shared)
    if found is None:
      continue
    a, b, r, scale = found
    alpha = None
    if scale is None:
      alpha = at(given.get('alpha_pattern', ()), names.given(path),
                 given['alpha'])
      scale = alpha / root(r)
    if name in _PADDED:
      keep = (a != 0).any(0) | (b != 0).any(1)
      a, b = a[:, keep], b[keep]
    if a.shape[1]:
      out[path] = Factors(a, b, scale, alpha)
  if not out:
    raise ValueError(f'{name}: every rank is 0 and every gate closed; the '
                     'adapter is the base, and there is nothing to write')
  return out


# Each is (theta of a site, settings, shared arrays) -> (a, b, the rank that
# alpha is divided by, the scale where it is not alpha's), or None.
def _plain(t, given, shared):
  del given, shared
  if 'a' not in t:  # a site that came along, or of rank 0
    return None
  return t['a'], t['b'], t['a'].shape[1], None


def _beside_start(t, given, shared):
  del given, shared
  return (np.concatenate([t['a'], t['a0']], 1),
          np.concatenate([t['b'], -t['b0']], 0), t['a'].shape[1], None)


def _searched(t, given, shared):
  del given, shared
  p = np.asarray(jax.nn.softmax(t['logits'])) if 'logits' in t else 1
  return t['a'] * p, t['b'], t['a'].shape[1], float(t['scale'])


def _gated(t, given, shared):
  if 'u' in t and not t['u'] >= given['tau']:
    return None
  return _plain(t, given, shared)


def _core(t, given, shared):
  del shared
  a = np.matmul(t['a'], t['r'], dtype=np.float64).astype(np.float32)
  return a, t['b'], t['a'].shape[1], None if 'alpha' in given else 1.0


def _of_types(t, given, shared):
  if given['activation'] != 'identity':
    raise ValueError(
        f"lowrank.dense_lora with activation={given['activation']!r} adds to "
        'outputs what is not linear in the inputs: neither a LoRA nor another '
        "kernel says it; train with activation='identity' to export")
  name, = (n.removeprefix('m.') for n in t)
  b = np.matmul(t[f'm.{name}'], shared[f'd.{name}'], dtype=np.float64)
  return shared[f'e.{name}'], b.astype(np.float32), given['rank'], None


def _turned(t, given, shared):
  del given, shared
  _, a0, da = map(np.asarray, delora.turned(t['a'], t['a0'], 0))
  b, _, db = map(np.asarray, delora.turned(t['b'], t['b0'], 1))
  # The strength is each site's own: it goes into a, not into alphas.
  r = t['a'].shape[1]
  w = (t['strength'] / r * t['w'])[:, None]
  return (w * np.concatenate([da, a0], 1), np.concatenate([b, db], 0), r, 1.0)


FORMS = {
    'lowrank.lora': _plain, 'lowrank.dora': _plain, 'lowrank.lora_plus': _plain,
    'lowrank.kasa': _plain, 'lowrank.trans_peft': _plain, 'lowrank.eva': _plain,
    'lowrank.auto_lora': _searched, 'lowrank.selective_lora': _gated,
    'lowrank.pissa': _beside_start, 'lowrank.olora': _beside_start,
    'lowrank.corda': _beside_start, 'lowrank.lora_ga': _beside_start,
    'lowrank.lora_xs': _core, 'lowrank.lora_sb': _core,
    'lowrank.dense_lora': _of_types, 'lowrank.delora': _turned}
