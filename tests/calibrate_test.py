"""Calibration against brute force, in all forms; broken off; in training."""

import os
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import peftjax
from peftjax import calibrate
from peftjax import taps
from peftjax import trees
from peftjax.conformance import models
from peftjax.ops import statistics
from peftjax.ops.statistics import Reducer
from peftjax.tasks.base import Task


class Text(nn.Module):
  """Table, a fused kernel, kernels of many axes, head: [B, T] -> [B, 3]."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, ids, mask):
    x = nn.Embed(11, 6, dtype=self.dtype, name='table')(ids)
    q, k, v = jnp.split(nn.Dense(24, dtype=self.dtype, name='qkv')(x), 3, -1)
    h = jnp.tanh(q * k + v).reshape(*ids.shape, 2, 4)
    x += nn.DenseGeneral(6, (-2, -1), dtype=self.dtype, name='join')(h)
    h = jnp.tanh(nn.DenseGeneral((2, 3), dtype=self.dtype, name='part')(x))
    h = h.reshape(*ids.shape, 6) * mask[..., None]
    return nn.Dense(3, dtype=self.dtype, name='head')(
        h.sum(1) / mask.sum(1, keepdims=True))


def reads(p, ids, mask):
  """{path: what the layer reads} of Text, in numpy."""
  x = p['table']['embedding'][ids]
  y = x @ p['qkv']['kernel'] + p['qkv']['bias']
  h = np.tanh(y[..., :8] * y[..., 8:16] + y[..., 16:])
  u = x + h @ p['join']['kernel'].reshape(8, 6) + p['join']['bias']
  v = np.tanh(u @ p['part']['kernel'].reshape(6, 6)
              + p['part']['bias'].reshape(6)) * mask[..., None]
  return {**{f'qkv[{a}:{a + 8}]': x for a in (0, 8, 16)}, 'join': h, 'part': u,
          'head': v.sum(1) / mask.sum(1, keepdims=True)}


def squared(out, batch, smoothing):
  del smoothing
  return ((out - batch['y']) ** 2).sum(-1), None


TEXT = Task('test', 'loss', lambda b: ((b['ids'],), dict(mask=b['mask'])),
            squared, None, None)
ROWS = Task('test', 'loss', lambda b: ((b['x'],), {}), squared, None, None)


def moments(name='moments'):
  """Sum of x^T x over the rows that count, and how many they are."""
  def init(site):
    d = site.params['kernel'].shape[0]
    return dict(total=jnp.zeros((d, d)), n=jnp.zeros(()))

  def update(state, x, keep):
    return dict(total=state['total'] + (x * keep[:, None]).T @ x,
                n=state['n'] + keep.sum())

  return Reducer('inputs', init, update, name=name)


def squares(of='examples'):
  return Reducer(
      of, lambda site: dict(total=jnp.zeros(site.params['kernel'].shape)),
      lambda state, g, keep: dict(total=state['total'] + g ** 2),
      name='squares')


def every(site):
  return 'kernel' in site.params and site.kind != 'Embed'


@pytest.fixture(scope='module')
def text():
  """Text with parameters, three batches, and `collect(reducer, ...)`."""
  rng = np.random.default_rng(0)
  batches = [dict(
      ids=rng.integers(0, 11, (4, 5)), y=rng.normal(size=(4, 3)).astype('f4'),
      mask=np.arange(5) < rng.integers(1, 6, (4, 1))) for _ in range(3)]
  args = batches[0]['ids'], batches[0]['mask']
  model = Text()
  params = jax.jit(model.init)(jax.random.key(0), *args)['params']
  params = jax.tree.map(np.asarray, params)
  sites = peftjax.describe(model, *args)

  def collect(reducer, model=model, params=params, batches=batches,
              chosen=every, **kwargs):
    return calibrate.collect(model, params, sites, TEXT, lambda: iter(batches),
                             reducer, chosen, **kwargs)

  return types.SimpleNamespace(
      model=model, params=params, sites=sites, batches=batches, collect=collect)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


# ------------------------------------------------------------- brute force
def test_inputs_without_padding(text):
  got = text.collect(moments())
  assert list(got) == [p for p, s in text.sites.items() if every(s)]
  for path, stats in got.items():
    total, n = 0, 0
    for b in text.batches:
      x = reads(text.params, b['ids'], b['mask'])[path]
      rows = x[b['mask']] if x.ndim == 3 else x  # pooled: no row is padding
      total, n = total + rows.T @ rows, n + len(rows)
    assert stats['n'] == n
    np.testing.assert_allclose(stats['total'], total, atol=1e-4, err_msg=path)


def own(params, sites, path):
  """The kernel of a site in a tree like params, [d_in, d_out]."""
  view = sites[path].leaves['kernel']
  base = path.split('[')[0]
  return np.asarray(view.get(trees.flatten(params)[f'{base}/{view.leaf}']))


def test_gradients_and_squares_of_examples(text):
  @jax.jit
  @jax.grad
  def grad(params, batch):
    args, kwargs = TEXT.inputs(batch)
    out = text.model.apply({'params': params}, *args, **kwargs)
    return squared(out, batch, None)[0].mean()

  mean = text.collect(statistics.mean_gradient())
  square = text.collect(squares())
  norm = text.collect(squares()._replace(
      finish=lambda s: dict(norm=s['total'].sum())))
  whole = [grad(text.params, b) for b in text.batches]
  each = [grad(text.params, {k: v[i:i + 1] for k, v in b.items()})
          for b in text.batches for i in range(4)]
  for path in mean:
    of = lambda tree, path=path: own(tree, text.sites, path)
    np.testing.assert_allclose(
        mean[path]['gradient'], sum(map(of, whole)) / 3, atol=1e-5)
    np.testing.assert_allclose(
        square[path]['total'], sum(of(g) ** 2 for g in each), rtol=1e-4,
        atol=1e-6)
    np.testing.assert_allclose(
        norm[path]['norm'], square[path]['total'].sum(), rtol=1e-5)


def test_gradients_of_tables_and_convolutions():
  model, x, y = models.model_for('layers', False, False)
  sites, params = models.base_of('layers', False)
  got = calibrate.collect(
      model, params, sites, ROWS, lambda: iter([dict(x=x, y=y)]),
      statistics.mean_gradient(), lambda s: s.path in ('stem', 'embed'))
  want = jax.jit(jax.grad(lambda p: squared(
      model.apply({'params': p}, x), dict(y=y), None)[0].mean()))(params)
  for path in got:
    np.testing.assert_allclose(
        got[path]['gradient'], own(want, sites, path), atol=1e-5)


def test_dropout_is_on_where_the_reducer_says_so():
  class Dropped(nn.Module):

    @nn.compact
    def __call__(self, x, train):
      x = nn.Dropout(0.5, deterministic=not train)(x)
      return nn.Dense(3, name='one')(x)

  model, x = Dropped(), np.ones((64, 5), np.float32)
  params = model.init(jax.random.key(0), x, train=False)['params']
  sites = peftjax.describe(model, x, train=False)
  for train in (False, True):
    got = calibrate.collect(
        model, params, sites, ROWS, lambda: iter([dict(x=x)] * 2),
        moments()._replace(train=train), every)['one']['total']
    if train:  # half of the entries, each doubled; other ones in each batch
      assert 1.5 * 128 < np.diag(got).mean() < 2.5 * 128
      assert np.abs(got / 4 - np.round(got / 4)).max() < 1e-4
    else:
      np.testing.assert_allclose(got, 128)


# --------------------------------------------------------- forms of a model
def in_form(reducer, scan, remat, dtype=jnp.float32):
  model, x, y = models.model_for('layers', scan, remat)
  sites, params = models.base_of('layers', scan)
  params = jax.tree.map(lambda v: v.astype(dtype), params)
  batches = [dict(x=x, y=y), dict(x=2 * x[::-1], y=y)]
  return calibrate.collect(
      model.clone(dtype=dtype), params, sites, ROWS, lambda: iter(batches),
      reducer, calibrate.readable)


@pytest.mark.parametrize('reducer', [
    moments(), statistics.mean_gradient(), squares()], ids=lambda r: r.name)
def test_scanned_and_rematerialised_models_give_the_same(reducer):
  plain, scan, both = (in_form(reducer, *form) for form in (
      (False, False), (True, False), (True, True)))
  assert set(scan) == {'blocks' + p[7:] for p in plain}
  for path, stats in plain.items():
    layer = int(path[6])
    for n, v in stats.items():
      for other in (scan, both):
        w = other['blocks' + path[7:]][n]
        assert w.shape == (models.DEPTH, *v.shape)
        np.testing.assert_allclose(
            v, w[layer], rtol=1e-4, atol=1e-5 * np.abs(v).max())


@pytest.mark.parametrize('reducer', [
    moments(), statistics.mean_gradient()], ids=lambda r: r.name)
def test_bfloat16_models_keep_float32_states(reducer):
  want = in_form(reducer, True, False)
  got = in_form(reducer, True, False, jnp.bfloat16)
  for path, stats in want.items():
    for n, v in stats.items():
      assert got[path][n].dtype == jnp.float32
      far = np.linalg.norm(got[path][n] - v) / np.linalg.norm(v)
      assert 0 < far < 0.05 or n in ('n', 'batches'), (path, n, far)


def test_counts_beyond_bfloat16_are_exact(text):
  """256 + 1 is 256 in bfloat16."""
  params = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), text.params)
  got = text.collect(moments(), Text(jnp.bfloat16), params, text.batches * 9)
  count = 9 * sum(b['mask'].sum() for b in text.batches)
  assert count > 256 and got['join']['n'] == count


# ------------------------------------------------------------- equal inputs
def test_layers_that_read_the_same_share_a_state(text):
  sites, params = models.base_of('layers', True)
  model, x, y = models.model_for('layers', True, False)
  chosen = {p: s for p, s in sites.items() if calibrate.readable(s)}
  owner = taps.owners(model, params, chosen, ROWS, dict(x=x, y=y))
  first = 'blocks/attn/key'
  assert owner == {p: first if p[-5:] in ('query', 'n/key', 'value') else p
                   for p in chosen}
  made = []
  one = moments()
  got = text.collect(one._replace(
      init=lambda site: made.append(site.path) or one.init(site)))
  assert sorted(made) == ['head', 'join', 'part', 'qkv[0:8]']
  same(got['qkv[0:8]'], got['qkv[16:24]'])


# ------------------------------------------------------------------- masks
class Pair(nn.Module):
  """An encoder-decoder in small: two texts, each read by a layer."""

  @nn.compact
  def __call__(self, ids, targets, mask):
    table = nn.Embed(11, 6, name='table')
    h = nn.Dense(6, name='encoder')(table(ids)) * mask[..., None]
    return nn.Dense(11, name='decoder')(
        table(targets) + h.sum(1, keepdims=True))


@pytest.mark.parametrize('length', [4, 5])
def test_both_texts_of_an_encoder_decoder_have_their_masks(length):
  """Also where they have one length, and shapes do not tell them apart."""
  rng = np.random.default_rng(0)
  batch = dict(
      ids=rng.integers(0, 11, (3, 4)), mask=np.arange(4) < [[2], [4], [1]],
      targets_in=rng.integers(0, 11, (3, length)),
      target_weights=(np.arange(length) < [[3], [1], [4]]).astype('f4'))
  model = Pair()
  inputs = lambda b: ((b['ids'], b['targets_in']), dict(mask=b['mask']))
  args, kwargs = inputs(batch)
  params = model.init(jax.random.key(0), *args, **kwargs)['params']
  sites = peftjax.describe(model, *args, **kwargs)
  got = calibrate.collect(
      model, params, sites, ROWS._replace(inputs=inputs), lambda: iter([batch]),
      moments(), every)
  assert (got['encoder']['n'], got['decoder']['n']) == (7, 8)
  x = params['table']['embedding'][batch['ids'][batch['mask']]]
  np.testing.assert_allclose(got['encoder']['total'], x.T @ x, atol=1e-5)


def test_texts_of_a_pair_are_masked_as_the_model_is_called(text):
  """Retrieval puts both texts of a pair into one call."""
  both = lambda b: jnp.concatenate([b, b[::-1, ::-1]])
  task = TEXT._replace(inputs=lambda b: (
      (both(b['ids']),), dict(mask=both(b['mask']))))
  got = calibrate.collect(
      text.model, text.params, text.sites, task, lambda: iter(text.batches),
      moments(), every)
  want = sum(b['mask'].sum() for b in text.batches)
  assert got['join']['n'] == 2 * want


@pytest.mark.parametrize('name, kind', [('weights', 'f4'), ('labels', 'i4')])
def test_tokens_without_a_label_are_left_out_where_asked(text, name, kind):
  """Weights of 0 in texts that are continued, negative tags; no other tasks."""
  has = [np.arange(5) > [[0], [1], [4], [2]] for _ in text.batches]
  batches = [{**b, name: (h if name == 'weights' else h * 2 - 1).astype(kind)}
             for b, h in zip(text.batches, has)]
  asked = moments()._replace(labelled=True)
  got = text.collect(asked, batches=batches)
  keep = [b['mask'] & h for b, h in zip(batches, has)]
  assert got['qkv[0:8]']['n'] == sum(k.sum() for k in keep)
  x = np.concatenate([text.params['table']['embedding'][b['ids'][k]]
                      for b, k in zip(batches, keep)])
  np.testing.assert_allclose(got['qkv[0:8]']['total'], x.T @ x, atol=1e-5)
  same(text.collect(moments(), batches=batches), text.collect(asked))


@pytest.mark.parametrize('name', ['pissa', 'olora', 'corda', 'lora_ga'])
def test_stacked_layers_start_as_the_same_layers_unrolled(name):
  found = {}
  for scan in (False, True):
    model, x, y = models.model_for('layers', scan, False)
    sites, params = models.base_of('layers', scan)
    method = peftjax.load(f'lowrank.{name}', rank=2, sites=calibrate.readable)
    stats = None
    if method.calibration:
      stats = {name: calibrate.collect(
          model, params, sites, ROWS, lambda x=x, y=y: iter([dict(x=x, y=y)]),
          method.calibration, method)}
      assert all(isinstance(v, np.ndarray) for v in jax.tree.leaves(stats))
    found[scan] = peftjax.init(
        method, jax.random.key(0), sites, params, stats)[name]
  stacked = [p for p in found[True] if p.startswith('blocks')]
  assert stacked
  for path in stacked:
    t = found[True][path]
    got = [a @ b for a, b in zip(t['a'], t['b'])]
    assert np.abs(got[0] - got[1]).max() > 1e-2
    for i, product in enumerate(got):
      one = found[False][path.replace('blocks', f'block_{i}')]
      want = one['a'] @ one['b']
      np.testing.assert_allclose(
          product, want, atol=1e-3 * np.abs(want).max(), err_msg=path)


# -------------------------------------------------------- passes, broken off
@pytest.mark.parametrize('reducer', [
    moments(), statistics.mean_gradient()], ids=lambda r: r.name)
def test_a_pass_for_each_layer_gives_the_same(text, reducer):
  whole = text.collect(reducer)
  for at_once in (1, 3):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
                 whole, text.collect(reducer, at_once=at_once))


def broken(batches, after):
  """The batches, broken off after so many; None: all of them."""
  for i, batch in enumerate(batches):
    if i == after:
      raise KeyboardInterrupt
    yield batch


@pytest.mark.parametrize('at_once', [0, 2])
@pytest.mark.parametrize('reducer', [
    moments(), statistics.mean_gradient()], ids=lambda r: r.name)
def test_what_is_broken_off_goes_on(text, tmp_path, steps, reducer, at_once):
  six, passes = text.batches * 2, []
  known = dict(at_once=at_once, folder=str(tmp_path), every=2,
               marks=dict(base='one', data=dict(batch=4)))

  def collect(breaks=None, **more):
    passes.clear()

    def batches():
      passes.append(1)
      return broken(six, 5 if len(passes) == breaks else None)

    return calibrate.collect(
        text.model, text.params, text.sites, TEXT, batches,
        more.pop('reducer', reducer), every, **{**known, **more})

  whole = collect(folder='')
  inputs = reducer.of == 'inputs'  # whose first pass looks for equal ones
  with pytest.raises(KeyboardInterrupt):
    collect(inputs + (2 if at_once else 1))
  steps()
  same(collect(), whole)
  # The last 2 batches of the group that was broken off; of the one before it
  # nothing, of the one after it, which gradients have, all.
  assert steps() == 2 + 6 * (at_once == 2 and not inputs)
  same(collect(), whole)
  assert not steps()
  for change, words in ((dict(marks=dict(base='two')),
                         "was collected with base='one', expected 'two'"),
                        (dict(at_once=1), f'at_once={at_once}, expected 1'),
                        (dict(reducer=reducer._replace(name='x')),
                         "with reducer='.*', expected 'x'")):
    with pytest.raises(ValueError, match=words):
      collect(**change)


def test_damaged_and_foreign_files_are_refused(text, tmp_path):
  path = tmp_path / calibrate.FILE.format(0)
  collect = lambda: text.collect(moments(), folder=str(tmp_path))
  collect()
  good = path.read_bytes()
  with safetensors.safe_open(path, 'numpy') as f:
    meta = f.metadata()
  path.write_bytes(good[:-20])
  with pytest.raises(ValueError, match='is damaged.*delete it'):
    collect()
  for other in (None, dict(about='{}')):
    safetensors.numpy.save_file(dict(a=np.zeros(3)), path, other)
    with pytest.raises(ValueError, match='is damaged.*delete it'):
      collect()
  arrays = safetensors.numpy.load(good)
  arrays['join:total'] = arrays['join:total'][:-1]
  safetensors.numpy.save_file(arrays, path, meta)
  with pytest.raises(ValueError, match=r"'total' of 'join' .* shape \(7, 8"):
    collect()


def test_nan_is_refused_and_not_kept(text, tmp_path):
  p = jax.tree.map(np.copy, text.params)
  p['table']['embedding'][3, 2] = np.nan
  for reducer in (moments(), statistics.mean_gradient()):
    with pytest.raises(ValueError, match=(
        r"calibration: '\w+' of '[^']+' is not finite; look for NaN")):
      text.collect(reducer, params=p, folder=str(tmp_path), every=1)
    assert not os.listdir(tmp_path)
  with pytest.raises(ValueError, match="'v' of 'head' is not finite"):
    text.collect(moments()._replace(finish=lambda s: dict(v=1 / (s['n'] * 0))))


def test_batches_end_when_all_layers_are_done(text):
  seen = []

  def batches():
    for batch in text.batches * 3:
      seen.append(1)
      yield batch

  reducer = moments()._replace(done=lambda s: s['n'] >= 16)
  per = [b['mask'].sum() for b in text.batches]  # rows of all but the head
  calibrate.collect(text.model, text.params, text.sites, TEXT, batches,
                    reducer, every)
  assert sum(per) > 16 and len(seen) - 1 == 4  # the head has 4 rows a batch


# --------------------------------------------------------------- refusals
def test_what_cannot_be_calibrated_is_refused(text):
  class Twice(nn.Module):

    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(5, name='one')
      return layer(layer(x))

  x = np.ones((2, 5), np.float32)
  p = Twice().init(jax.random.key(0), x)['params']
  with pytest.raises(ValueError, match="calls 'one' 2 times, expected once"):
    calibrate.collect(Twice(), p, peftjax.describe(Twice(), x), ROWS,
                      lambda: iter([dict(x=x)]), moments(), every)
  with pytest.raises(ValueError, match=r"'table' \(Embed\) cannot .*exclude="):
    text.collect(moments(), chosen=peftjax.select(leaf='kernel'))
  for reducer in (moments(), statistics.mean_gradient()):
    with pytest.raises(ValueError, match='there are no batches'):
      text.collect(reducer, batches=[])
  with pytest.raises(ValueError, match="of 'input'; did you mean 'inputs'"):
    text.collect(moments()._replace(of='input'))
  with pytest.raises(ValueError, match="'n' of .* is int32; expected float32"):
    text.collect(moments()._replace(init=lambda site: dict(n=jnp.int32(0))))
  dead = {**text.params, 'head': jax.tree.map(
      np.zeros_like, text.params['head'])}
  with pytest.raises(ValueError, match='all gradients are 0: .*head'):
    text.collect(statistics.mean_gradient(), params=dead,
                 chosen=calibrate.readable)


def test_init_without_statistics_is_refused(text):
  method = peftjax.load('lowrank.lora_ga', rank=1, sites=dict(path='join'))
  with pytest.raises(ValueError, match=(
      "lora_ga starts from statistics of the data, and has none of 'join'")):
    peftjax.init(method, jax.random.key(0), text.sites, text.params)
