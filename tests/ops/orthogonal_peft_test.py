"""Rotations against Hugging Face PEFT's, given the same vectors."""

import jax
import numpy as np
from peftjax.ops import orthogonal
import pytest

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')
oft_layer = pytest.importorskip('peft.tuners.oft.layer')
boft_layer = pytest.importorskip('peft.tuners.boft.layer')


def triangles(n, b, scale):
  rng = np.random.default_rng(b)
  return (scale * rng.normal(size=(n, b * (b - 1) // 2))).astype(np.float32)


def rotations(v, b, terms=None):
  """Our blocks, exact or from a Neumann series."""
  def blocks(v):
    q = orthogonal.skew(v, b)
    return (orthogonal.cayley_neumann(q, terms) if terms
            else orthogonal.cayley(q))
  return np.array(jax.jit(blocks)(v))


def module(v, b, **kwargs):
  n, elements = v.shape
  out = oft_layer.OFTRotationModule(n, elements, b, n * b, **kwargs)
  out.weight.data = torch.from_numpy(v.copy())
  return out


@pytest.mark.parametrize('b', (4, 20))
def test_cayley_blocks(b):
  v = triangles(3, b, 0.3)
  theirs = module(v, b)._cayley_batch(torch.from_numpy(-v), b, False)
  np.testing.assert_allclose(
      rotations(v, b), theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize('terms', range(1, 8))
def test_neumann_blocks(terms):
  v = triangles(3, 4, 0.3)
  theirs = module(v, 4)._cayley_batch(torch.from_numpy(v), 4, True, terms)
  np.testing.assert_allclose(
      rotations(v, 4, terms), theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize('shared', (False, True))
@pytest.mark.parametrize('neumann', (False, True))
def test_linear_layer(neumann, shared):
  rng = np.random.default_rng(0)
  d, b, tokens = 12, 4, 5
  x = rng.normal(size=(2, tokens, d)).astype(np.float32)
  torch.manual_seed(0)
  model = torch.nn.Sequential(torch.nn.Linear(d, 7))
  kernel = model[0].weight.detach().numpy().T.copy()
  bias = model[0].bias.detach().numpy().copy()
  config = peft.OFTConfig(
      r=0, oft_block_size=b, target_modules=['0'], block_share=shared,
      use_cayley_neumann=neumann, num_cayley_neumann_terms=5)
  adapted = peft.get_peft_model(model, config)
  v = triangles(1 if shared else d // b, b, 0.2)
  weight, = [p for p in adapted.parameters() if p.requires_grad]
  assert tuple(weight.shape) == v.shape
  weight.data = torch.from_numpy(v if neumann else -v)
  with torch.no_grad():
    theirs = adapted(torch.from_numpy(x)).numpy()
  r = rotations(v, b, 5 if neumann else None)
  ours = np.asarray(jax.jit(orthogonal.block_rotate)(x, r)) @ kernel + bias
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert np.abs(x @ kernel + bias - theirs).max() > 0.1


def test_coft_projection():
  v = triangles(6, 4, 0.05) * np.linspace(0.01, 1, 6, dtype=np.float32)[:, None]
  eps = 0.2  # theirs is shared out over the stored blocks
  theirs = module(v, 4)._project_batch(torch.from_numpy(v), eps).numpy()
  ours = np.asarray(orthogonal.project_ball(v, eps / np.sqrt(6)))
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)
  changed = (ours != v).any(-1)
  assert changed.any() and not changed.all()


@pytest.mark.parametrize('d,b,m', ((16, 4, 3), (24, 4, 2), (48, 2, 4)))
def test_butterfly_permutations(d, b, m):
  # Their layer falls back to one factor without a GPU; their permutations and
  # products are rebuilt here from their own index function.
  n = d // b
  v = triangles(m * n, b, 0.5)
  blocks = rotations(v, b).reshape(m, n, b, b)
  product = torch.eye(d)
  for i in range(m):
    index = boft_layer.BOFTLayer.block_butterfly_perm(
        None, d, n // 2**i, b // 2, m - 1)
    p = boft_layer.BOFTLayer.perm2mat(None, index)
    factor = torch.block_diag(*torch.from_numpy(blocks[i]))
    product = p @ factor @ p.T @ product
  ours = jax.jit(orthogonal.butterfly_rotate)(
      np.eye(d, dtype=np.float32), blocks)
  np.testing.assert_allclose(ours, product.numpy(), atol=1e-5)


@pytest.mark.filterwarnings('ignore::UserWarning')  # no CUDA extension
def test_butterfly_linear_layer_with_one_factor():
  rng = np.random.default_rng(0)
  d, b = 12, 4
  x = rng.normal(size=(5, d)).astype(np.float32)
  torch.manual_seed(0)
  model = torch.nn.Sequential(torch.nn.Linear(d, 7))
  kernel = model[0].weight.detach().numpy().T.copy()
  bias = model[0].bias.detach().numpy().copy()
  adapted = peft.get_peft_model(model, peft.BOFTConfig(
      boft_block_size=b, boft_n_butterfly_factor=1, target_modules=['0']))
  a = rng.normal(size=(1, d // b, b, b)).astype(np.float32)
  s = rng.uniform(0.5, 2, size=(7, 1)).astype(np.float32)
  for name, p in adapted.named_parameters():
    if p.requires_grad:
      p.data = torch.from_numpy(a if 'boft_R' in name else s)
  with torch.no_grad():
    theirs = adapted(torch.from_numpy(x)).numpy()
  q = -(a[0] - a[0].swapaxes(-1, -2)) / 2  # their sign is the other one
  y = jax.jit(lambda x, q: orthogonal.butterfly_rotate(
      x, orthogonal.cayley(q)[None]))(x, q)
  y = np.asarray(y) @ kernel
  np.testing.assert_allclose(y * s[:, 0] + bias, theirs, atol=1e-5)
