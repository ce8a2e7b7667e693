"""LoftQ against its recursion in float64 and Hugging Face PEFT."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
from peftjax.ops import quantise
import pytest


def load(**kwargs):
  return pj.load('quantised.loftq', **{'rank': 2, 'block': 16, **kwargs})


def parts(net, method, theta):
  """{path: (Q, s A B)}, both [d_in, d_out]."""
  nothing = jax.tree.map(lambda v: v, theta)
  out = {}
  for path, t in theta['loftq'].items():
    nothing['loftq'][path] = {**t, 'b': jnp.zeros_like(t['b'])}
  folded, base = (pj.fold(method, net.params, v, net.sites)
                  for v in (theta, nothing))
  for path in net.linear:
    get = net.sites[path].leaves['kernel'].get
    whole, q = (np.float64(get(f[path]['kernel'])) for f in (folded, base))
    out[path] = q, whole - q
  return out


def rounded(kernel, bits, block=16):
  return np.float64(quantise.dequantise(
      **quantise.quantise(jnp.float32(kernel), bits, block), bits=bits,
      block=block))


def truncated(w, r):
  u, s, vt = np.linalg.svd(w, full_matrices=False)
  return u[:, :r] * s[:r] @ vt[:r]


def recursion(kernel, bits, r, iterations):
  """[(Q, D)] of every round."""
  kernel, product, out = np.float64(kernel), 0, []
  for _ in range(iterations):
    q = rounded(kernel - product, bits)
    product = truncated(kernel - q, r)
    out.append((q, product))
  return out


# ----------------------------------------------------------------- closed forms
@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('alpha, scales', [
    (2.0, 'float32'), (7.0, 'float32'), (2.0, 'double')])
def test_one_round_leaves_the_tail_of_the_rounding(net, bits, alpha, scales):
  method = load(bits=bits, alpha=alpha, iterations=1, scales=scales)
  theta = net.start(method)
  for path, (q, product) in parts(net, method, theta).items():
    kernel = np.float64(net.kernels[path])
    off = np.abs(q - rounded(kernel, bits)).max() / np.abs(kernel).max()
    assert off < 1e-6 if scales == 'float32' else 1e-5 < off < 0.05
    np.testing.assert_allclose(product, truncated(kernel - q, 2), atol=5e-6)
    s = np.linalg.svd(kernel - q, compute_uv=False)
    left = np.square(kernel - q - product).sum()
    np.testing.assert_allclose(left, np.square(s[2:]).sum(), rtol=1e-4)
    assert left < np.square(kernel - q).sum()
    t = theta['loftq'][path]
    for gram in (t['a'].T @ t['a'], t['b'] @ t['b'].T):  # s = alpha / 2
      np.testing.assert_allclose(
          gram, np.diag(s[:2]) / (alpha / 2), atol=5e-6)


@pytest.mark.parametrize('iterations', [2, 5])
def test_keeps_the_best_of_the_rounds(net, iterations):
  method = load(bits=2, iterations=iterations)
  later = False
  for path, (q, product) in parts(net, method, net.start(method)).items():
    kernel = np.float64(net.kernels[path])
    rounds = recursion(kernel, 2, 2, iterations)
    errors = [np.linalg.norm(kernel - a - b) for a, b in rounds]
    best = int(np.argmin(errors))
    np.testing.assert_allclose(q, rounds[best][0], atol=1e-5)
    np.testing.assert_allclose(product, rounds[best][1], atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(kernel - q - product), min(errors), rtol=1e-4)
    later |= 0 < best
  assert later  # more rounds are of use


def test_start_of_peft_keeps_the_last_round_and_the_scale(net):
  method = load(bits=2, iterations=3, alpha=6.0, start='peft')
  best = {p: min(recursion(k, 2, 2, 3), key=lambda v, k=k: np.linalg.norm(
      k - v[0] - v[1])) for p, k in net.kernels.items()}
  differs = False
  for path, (q, product) in parts(net, method, net.start(method)).items():
    last = recursion(net.kernels[path], 2, 2, 3)[-1]
    np.testing.assert_allclose(q, last[0], atol=1e-5)
    np.testing.assert_allclose(product, 3 * last[1], atol=2e-5)
    differs |= np.abs(last[0] - best[path][0]).max() > 0.01
  same = [parts(net, m, net.start(m)) for m in (
      load(iterations=1, alpha=2.0, start=s) for s in ('exact', 'peft'))]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *same)
  assert differs


def test_eight_bits_are_those_of_int8(net):
  method = pj.load('quantised.loftq', rank=2, bits=8, iterations=1)
  int8 = net.start(pj.load('quantised.int8'))['int8']
  for path, t in net.start(method)['loftq'].items():
    np.testing.assert_array_equal(t['q'], int8[path]['q'])
    np.testing.assert_array_equal(t['scale'], int8[path]['scale'])
    rest = np.float64(net.kernels[path]) - t['q'] * np.float64(t['scale'])
    np.testing.assert_allclose(
        8 * t['a'] @ t['b'], truncated(rest, 2), atol=1e-6)  # s = 16 / 2


def test_moves_as_a_lora_on_the_rounded_kernel(net):
  method = load(alpha=6.0)
  theta = net.start(method)
  trained, frozen = pj.partition(method, theta)
  assert {n for t in frozen['loftq'].values() for n in t} == {'codes', 'absmax'}
  theta = pj.combine(net.noisy(trained, 4), frozen)
  for path, (_, product) in parts(net, method, theta).items():
    t = theta['loftq'][path]
    np.testing.assert_allclose(product, 3 * (t['a'] @ t['b']), atol=2e-5)
    assert method.count(net.sites[path]) == t['a'].size + t['b'].size
  base = {p: {**t, 'b': jnp.zeros_like(t['b'])}
          for p, t in theta['loftq'].items()}
  params = pj.fold(method, net.params, dict(loftq=base), net.sites)
  lora = pj.load('lowrank.lora', rank=2, alpha=6.0)
  factors = {p: dict(a=t['a'], b=t['b']) for p, t in theta['loftq'].items()}
  y, want = jax.jit(lambda: (
      pj.apply(net.model, method, net.bare, theta, net.x)[0],
      pj.apply(net.model, lora, params, dict(lora=factors), net.x)[0]))()
  np.testing.assert_allclose(y, want, atol=1e-5)


def test_dropout_acts_on_the_adapter_alone_on_convolutions_too(net):
  method = load(dropout=0.5, sites=pj.select(path='patch'))
  theta = net.start(method)
  run = jax.jit(lambda t, key: pj.apply(
      net.model, method, net.bare | {n: net.params[n] for n in (
          'split', 'out')}, t, net.x, train=True, rng=key)[0])
  one, two = (run(theta, jax.random.key(i)) for i in (1, 2))
  assert np.abs(one - two).max() > 1e-4
  silent = jax.tree.map(lambda v: v, theta)
  silent['loftq']['patch']['b'] = jnp.zeros_like(theta['loftq']['patch']['b'])
  one, two = (run(silent, jax.random.key(i)) for i in (1, 2))
  np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize('kwargs, message', [
    (dict(rank=9), "rank 9 at '.*': expected .*nearest is"),
    (dict(alpha=0), 'alpha=0: expected a positive number'),
    (dict(dropout=1.0), 'dropout=1.0: expected a rate'),
    (dict(bits=5), 'bits=5: expected 2, 3 or 4'),
    (dict(iterations=0), 'iterations=0: .* from 1 to 100; the nearest is 1'),
    (dict(iterations=500), 'iterations=500: .* the nearest is 100'),
    (dict(start='exakt'), "unknown start 'exakt'; did you mean 'exact'"),
    (dict(bits=8), "block=16, scales='float32' at 8 bits.*leave them out")])
def test_bad_arguments(net, kwargs, message):
  with pytest.raises(ValueError, match=message):
    net.start(load(**kwargs))


# ------------------------------------------------------------- another library
@pytest.fixture(scope='module')
def peft_start():
  """PEFT's own start, which asks for a GPU by name, on the CPU."""
  pytest.importorskip('torch')
  pytest.importorskip('bitsandbytes')
  utils = pytest.importorskip('peft.utils.loftq_utils')
  source = inspect.getsource(utils.loftq_init).replace('"cuda"', '"cpu"')
  there = dict(vars(utils))
  exec(source, there)  # pylint: disable=exec-used
  return there['loftq_init']


@pytest.mark.parametrize('iterations', [1, 3])
def test_equals_peft(peft_start, iterations):
  torch = pytest.importorskip('torch')
  kernel = np.float32(np.random.default_rng(0).normal(size=(128, 24)))
  method = pj.load('quantised.loftq', rank=4, alpha=8.0, start='peft',
                   iterations=iterations)
  site = pj.describe(dict(one=dict(kernel=kernel)))['one']
  t = jax.jit(lambda k: method.init(None, site, dict(kernel=k), None))(kernel)
  used = method.prepare(t, pj.Context('one'))
  q = method.fold({}, {**used, 'b': jnp.zeros_like(t['b'])})['kernel']
  theirs, r, l = (v.numpy() for v in peft_start(
      torch.from_numpy(kernel.T.copy()), 4, 4, iterations))
  np.testing.assert_allclose(q, theirs.T, atol=1e-6)
  np.testing.assert_allclose(t['a'] @ t['b'], (l @ r).T, atol=2e-5)
  np.testing.assert_allclose(np.abs(t['a']), np.abs(r.T), atol=2e-4)
  np.testing.assert_allclose(np.abs(t['b']), np.abs(l.T), atol=2e-4)
