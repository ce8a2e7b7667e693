"""Perceptrons of decoders: plain or gated, and mixtures of them.

Letters: B batch, T tokens, d model width, f hidden width, E experts.

An expert is a `Mlp` under `nn.vmap`, its parameters stacked [E, ...], so that
fine-tuning methods see each of its layers as a Dense layer with a stack axis.
All experts run on all tokens and the router's gates, zero but for the chosen
ones, weight them: exact, without capacities, at E / experts_per_token times the
work of the chosen ones.

Sources: "Mixtral of Experts" (arXiv 2401.04088); "Qwen2 Technical Report"
(arXiv 2407.10671) for the shared expert; "GLU Variants Improve Transformer"
(arXiv 2002.05202).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax.models import layers


class Mlp(nn.Module):
  """Two layers, or three if gated: x [..., d] -> [..., d].

  Attributes:
    mlp_dim: f.
    activation: By its name in config files.
    gated: down(activation(gate(x)) * up(x)).
    mlp_bias: Whether the layers add a bias.
    dtype: Of the computation.
  """

  mlp_dim: int
  activation: str
  gated: bool = True
  mlp_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    dense = lambda n, name: nn.Dense(
        n, self.mlp_bias, dtype=self.dtype, name=name)
    act = layers.activation(self.activation)
    y = dense(self.mlp_dim, 'up')(x)
    if self.gated:
      gate = dense(self.mlp_dim, 'gate')(x)
      y = layers.cheap(lambda gate, y: act(gate) * y, gate, y)
    else:
      y = act(y)
    return dense(x.shape[-1], 'down')(y)


def gates(scores, n, normalise):
  """Router scores [..., E] -> gates [..., E], zero but for the n largest.

  normalise: the n gates add up to 1; else they are the softmax over all E.
  """
  p = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
  top, index = jax.lax.top_k(p, n)
  if normalise:
    top = top / top.sum(axis=-1, keepdims=True)
  chosen = jax.nn.one_hot(index, p.shape[-1], dtype=p.dtype)
  return jnp.einsum('...n,...ne->...e', top, chosen)


class Mixture(nn.Module):
  """Sparse mixture of `experts` gated perceptrons, x [B, T, d] -> [B, T, d].

  Attributes:
    mlp_dim, activation, gated, mlp_bias, dtype: Of each expert, see `Mlp`.
    experts: E.
    experts_per_token: How many of them a token meets.
    normalise_gates: See `gates`.
    shared_dim: Hidden width of one more that all tokens meet, behind a sigmoid
      gate of its own; 0: none.
  """

  mlp_dim: int
  activation: str
  experts: int
  experts_per_token: int
  normalise_gates: bool = True
  shared_dim: int = 0
  gated: bool = True
  mlp_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    rest = (self.activation, self.gated, self.mlp_bias, self.dtype)
    scores = nn.Dense(
        self.experts, use_bias=False, dtype=self.dtype, name='router')(x)
    w = gates(scores, self.experts_per_token, self.normalise_gates)
    many = nn.vmap(
        Mlp, in_axes=None, out_axes=-2, axis_size=self.experts,
        variable_axes={'params': 0, 'aux': 0},
        split_rngs={'params': True, 'dropout': True})
    y = many(self.mlp_dim, *rest, name='experts')(x)  # [B, T, E, d]
    y = jnp.einsum('bted,bte->btd', y, w.astype(y.dtype))
    if self.shared_dim:
      # A vector and no Dense layer: rank methods have nothing to do on it.
      init = nn.initializers.normal(x.shape[-1] ** -0.5)
      g = self.param('shared_gate', init, x.shape[-1:]).astype(x.dtype)
      g = jax.nn.sigmoid(x @ g)[..., None]
      y = y + g * Mlp(self.shared_dim, *rest, name='shared')(x)
    return y
