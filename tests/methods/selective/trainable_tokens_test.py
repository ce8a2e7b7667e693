"""selective.trainable_tokens: rows of tables, tied logits, PEFT, errors."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
from peftjax import trees
from peftjax.methods.selective.trainable_tokens import token_tables
from peftjax.models.decoder import Decoder
from peftjax.models.encoder import Encoder
import pytest

IDS = np.array([[0, 3, 8, 5], [3, 3, 1, 2]])
TOKENS = (8, 3, 4)  # twice, once and never in IDS; in no order


class Words(nn.Module):
  """A table, a layer, and logits from the same table or from one of its own."""

  tied: bool = False

  @nn.compact
  def __call__(self, ids):
    table = nn.Embed(9, 6, name='embed_tokens')
    h = jnp.tanh(nn.Dense(6, name='linear')(table(ids)))
    if self.tied:
      return table.attend(h)
    return nn.Dense(9, use_bias=False, name='lm_head')(h)


def draw(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda v: rng.normal(0, 0.5, v.shape).astype(np.float32), tree)


def made(model, *inputs, **kwargs):
  """A model's params and sites, the method, its start, and a theta far off."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)['params']
  params, sites = draw(shapes, 1), pj.describe(model, *inputs)
  method = pj.load('selective.trainable_tokens', **dict(tokens=TOKENS) | kwargs)
  start = pj.init(method, jax.random.key(0), sites, params)
  return types.SimpleNamespace(
      model=model, inputs=inputs, params=params, sites=sites, method=method,
      start=start, theta=draw(start, 2))


def adapted(case):
  """(output, gradient of the sum of sines by theta)."""

  @jax.jit
  def run(theta):
    def loss(theta):
      y, _ = pj.apply(
          case.model, case.method, case.params, theta, *case.inputs)
      return jnp.sin(y).sum(), y
    return jax.grad(loss, has_aux=True)(theta)

  grads, y = run(case.theta)
  return y, grads['trainable_tokens']


# ----------------------------------------------------------------- closed forms
def test_looks_up_the_trained_rows_by_hand():
  case = made(nn.Embed(9, 6), IDS)
  table, rows = case.params['embedding'], case.theta['trainable_tokens']['']
  y, grads = adapted(case)
  want = np.array([[rows['rows'][TOKENS.index(i)] if i in TOKENS else table[i]
                    for i in line] for line in IDS])
  np.testing.assert_array_equal(y, want)
  # A row's gradient is that of all places where its token stands.
  times = np.array([(IDS == t).sum() for t in TOKENS])[:, None]
  assert times.ravel().tolist() == [1, 3, 0]
  np.testing.assert_allclose(
      grads['']['rows'], times * np.cos(rows['rows']), rtol=1e-6)


@pytest.mark.parametrize('tied', [False, True])
def test_equals_training_a_table_whose_other_rows_have_no_gradient(tied):
  case = made(Words(tied), IDS)
  base = trees.flatten(case.params)
  table = np.array(base['embed_tokens/embedding'])
  table[list(TOKENS)] = case.theta['trainable_tokens']['embed_tokens']['rows']

  @jax.jit
  def run(table):
    def loss(table):
      y = case.model.apply({'params': trees.unflatten(
          {**base, 'embed_tokens/embedding': table})}, IDS)
      return jnp.sin(y).sum(), y
    return jax.grad(loss, has_aux=True)(table)

  by_table, want = run(table)
  y, grads = adapted(case)
  np.testing.assert_allclose(y, want, rtol=0, atol=1e-5)
  by_table, rows = np.asarray(by_table), grads['embed_tokens']['rows']
  np.testing.assert_allclose(rows, by_table[list(TOKENS)], rtol=0,
                             atol=1e-5 * np.abs(by_table).max())
  # A token that is not read: its row is alive in the logits of a tied table.
  assert rows[2].any() == tied
  folded = trees.flatten(
      pj.fold(case.method, case.params, case.theta, case.sites))
  for path, v in base.items():
    np.testing.assert_array_equal(
        folded[path], table if path == 'embed_tokens/embedding' else v)


@pytest.mark.parametrize('tied', [False, True])
def test_starts_as_the_base_bit_for_bit(tied):
  case = made(Words(tied), IDS)
  rows = case.start['trainable_tokens']['embed_tokens']['rows']
  np.testing.assert_array_equal(
      rows, case.params['embed_tokens']['embedding'][list(TOKENS)])
  y, base = jax.jit(lambda params, theta: (
      pj.apply(case.model, case.method, params, theta, IDS)[0],
      case.model.apply({'params': params}, IDS)))(case.params, case.start)
  np.testing.assert_array_equal(y, base)
  assert pj.count(case.start) == 3 * 6 == case.method.count(
      case.sites['embed_tokens'])


def test_no_copy_of_the_table_where_it_is_looked_up():
  """Nothing but the table itself has its size in a compiled step."""
  case = made(nn.Embed(4096, 8), IDS)
  step = jax.jit(jax.grad(lambda theta, params: jnp.sin(pj.apply(
      case.model, case.method, params, theta, IDS)[0]).sum()))
  compiled = step.lower(case.theta, case.params).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 8 * 4 / 8


@pytest.mark.parametrize('model', [
    Encoder(vocab=9, width=8, depth=1, heads=2, mlp_dim=16, positions=6),
    Decoder(vocab=9, width=8, depth=1, heads=2, mlp_dim=16, tied=True,
            position='learned', max_positions=6)],
    ids=['encoder', 'decoder'])
def test_our_backbones(model):
  """Tables of positions and segments are left alone; a tied head follows."""
  case = made(model, IDS)
  tables = {p for p, s in case.sites.items() if s.kind == 'Embed'}
  (path,) = case.theta['trainable_tokens']
  assert path in ('word_embed', 'tokens') and len(tables) > 1
  y, _ = adapted(case)
  folded = pj.fold(case.method, case.params, case.theta, case.sites)
  want = model.apply({'params': folded}, IDS)
  np.testing.assert_allclose(y, want, rtol=0, atol=2e-5)
  assert np.abs(y - model.apply({'params': case.params}, IDS)).max() > 0.1


def test_default_sites_go_by_the_name():
  site = lambda path: pj.Site(path, 'Embed', 'embed', {})
  for path in ('embed_tokens', 'a/wte', 'shared', 'word_embeddings', 'Embed_0'):
    assert token_tables(site(path)), path
  for path in ('places', 'a/wpe', 'position_embed', 'token_type_embeddings',
               'embed_positions', 'type_embed'):
    assert not token_tables(site(path)), path


def test_folds_a_tree_of_another_framework():
  params = dict(wte=dict(weight=np.ones((9, 6), np.float32)))
  sites = pj.describe(params)
  method = pj.load('selective.trainable_tokens', tokens=[1],
                   sites=dict(path='wte'))
  theta = draw(pj.init(method, jax.random.key(0), sites, params), 3)
  folded = pj.fold(method, params, theta, sites)['wte']['weight']
  np.testing.assert_array_equal(
      folded[1], theta['trainable_tokens']['wte']['rows'][0])
  assert np.all(np.delete(folded, 1, 0) == 1)


# -------------------------------------------------------------- another library
@pytest.mark.parametrize('tied', [False, True])
def test_equals_peft(tied):
  peft = pytest.importorskip('peft')
  torch = pytest.importorskip('torch')
  case = made(Words(tied), IDS)

  class Net(torch.nn.Module):
    """As `Words`; PEFT finds a tied head by these names."""

    _tied_weights_keys = {'lm_head.weight': 'embed_tokens.weight'}

    def __init__(self):
      super().__init__()
      self.embed_tokens = torch.nn.Embedding(9, 6)
      self.linear = torch.nn.Linear(6, 6)
      self.lm_head = torch.nn.Linear(6, 9, bias=False)
      self.config = types.SimpleNamespace(
          tie_word_embeddings=tied, model_type='words',
          to_dict=lambda: dict(tie_word_embeddings=tied, model_type='words'))
      if tied:
        self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self):
      return self.embed_tokens

    def get_output_embeddings(self):
      return self.lm_head

    def forward(self, ids):
      return self.lm_head(torch.tanh(self.linear(self.embed_tokens(ids))))

  def put(parameter, value):
    with torch.no_grad():
      assert parameter.shape == value.shape
      parameter.copy_(torch.from_numpy(np.array(value)))

  net, p = Net(), case.params
  put(net.embed_tokens.weight, p['embed_tokens']['embedding'])
  put(net.linear.weight, p['linear']['kernel'].T)
  put(net.linear.bias, p['linear']['bias'])
  if not tied:
    put(net.lm_head.weight, p['lm_head']['kernel'].T)
  model = peft.get_peft_model(net, peft.TrainableTokensConfig(
      token_indices=list(TOKENS), target_modules=['embed_tokens']))
  delta = net.embed_tokens.trainable_tokens_delta['default']
  np.testing.assert_array_equal(  # the same start
      delta.detach(), case.start['trainable_tokens']['embed_tokens']['rows'])
  put(delta, case.theta['trainable_tokens']['embed_tokens']['rows'])
  y, grads = adapted(case)
  want = model(torch.from_numpy(IDS))
  np.testing.assert_allclose(y, want.detach(), rtol=0, atol=1e-5)
  torch.sin(want).sum().backward()
  g = delta.grad.numpy()
  np.testing.assert_allclose(grads['embed_tokens']['rows'], g, rtol=0,
                             atol=1e-4 * np.abs(g).max())
  merged = model.merge_and_unload()
  folded = pj.fold(case.method, p, case.theta, case.sites)
  np.testing.assert_array_equal(folded['embed_tokens']['embedding'],
                                merged.embed_tokens.weight.detach())


# ----------------------------------------------------------------------- errors
@pytest.mark.parametrize('tokens, match', [
    ((), r'tokens=\(\): expected at least one id'),
    ((1, -2), r'tokens\[1\]=-2: expected an id, a whole number from 0'),
    ((1.5,), r'tokens\[0\]=1.5: expected an id'),
    ('ab', r"tokens\[0\]='a': expected an id"),
    (None, r'tokens\[0\]=None: expected an id'),
    ((4, 2, 4), r'tokens\[2\]=4 stands there before: .* once, \(4, 2\)'),
    ((0, 9), "token 9 is outside the table 'embed_tokens' of 9 .* 0 to 8")])
def test_bad_tokens(tokens, match):
  with pytest.raises(ValueError, match=match):
    made(Words(), IDS, tokens=tokens)


def test_bad_sites():
  with pytest.raises(ValueError, match=(
      r"'linear' \(Dense\) is no embedding table.*kind=.Embed")):
    made(Words(), IDS, sites=dict(path='linear'))
  with pytest.raises(ValueError, match='token_tables matches no site'):
    made(nn.Dense(3), np.ones((2, 4), np.float32))
