"""Tiny random models of transformers under PEFT, and the same ones here."""

import copy
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from peftjax import models
from peftjax import trees
from peftjax.conformance.models import jit
from peftjax.generate import generate

WIDTH = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2,
             num_attention_heads=4, intermediate_size=24)
ENCODER = dict(WIDTH, max_position_embeddings=16, num_labels=3)
CONFIGS = {
    'bert': ('Bert', ENCODER),
    'roberta': ('Roberta', dict(ENCODER, type_vocab_size=1, pad_token_id=1)),
    'gpt2': ('GPT2', dict(vocab_size=31, n_embd=16, n_layer=2, n_head=4,
                          n_positions=32, bos_token_id=1, eos_token_id=2)),
    'llama': ('Llama', dict(WIDTH, num_key_value_heads=2, pad_token_id=0,
                            bos_token_id=1, eos_token_id=2)),
    't5': ('T5', dict(vocab_size=31, d_model=16, d_kv=4, d_ff=24, num_layers=2,
                      num_heads=4, relative_attention_num_buckets=8,
                      relative_attention_max_distance=12)),
}
AUTO = dict(SEQ_CLS='SequenceClassification', TOKEN_CLS='TokenClassification',
            CAUSAL_LM='CausalLM', SEQ_2_SEQ_LM='Seq2SeqLM')
IDS = np.random.default_rng(0).integers(3, 31, (3, 7)).astype(np.int32)
MASK = np.arange(7) < np.array([[7], [4], [2]])
TARGETS = np.random.default_rng(1).integers(3, 31, (3, 5)).astype(np.int32)


@pytest.fixture(scope='session')
def pair(tmp_path_factory):
  """(name, task) -> a model on both sides, and what it is given."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.set_num_threads(1)

  @functools.cache
  def make(name, task):
    family, sizes = CONFIGS[name]
    config = getattr(transformers, f'{family}Config')(**sizes)
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    model = getattr(transformers, f'AutoModelFor{AUTO[task]}').from_config(
        config, attn_implementation='eager').eval()
    with torch.no_grad():
      for part, p in model.named_parameters():  # So large that all parts show.
        std = 0.2
        if name == 'gpt2':  # Which else writes one token for ever.
          std = 0.1 if 'wte' in part else 0.05 if p.ndim == 1 else 0.3
        p.add_(std * torch.randn(p.shape, generator=rng))
    folder = tmp_path_factory.mktemp(f'{name}_{task}')
    model.save_pretrained(folder)
    ours, params, _ = models.load(folder)
    ids = np.where(MASK, IDS, 1)
    args = (ids, TARGETS, MASK) if name == 't5' else (ids, MASK)
    return types.SimpleNamespace(
        name=name, task=task, theirs=model, model=ours, params=params,
        args=args, sites=peftjax.describe(ours, *args), torch=torch)

  return make


@pytest.fixture(scope='session')
def under_peft():
  """(pair, PEFT's config) -> its model, with larger numbers in the adapter."""
  peft = pytest.importorskip('peft')

  def make(pair, config):
    rng = pair.torch.Generator().manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(pair.theirs), config).eval()
    with pair.torch.no_grad():
      for p in model.prompt_encoder.parameters():
        p.copy_(0.5 * pair.torch.randn(p.shape, generator=rng))
    return model

  return make


@pytest.fixture(scope='session')
def agree():
  """Asserts that a method computes what PEFT's model does, and its gradients.

  (pair, PEFT's model, method, convert): convert(encoder, get) makes theta of
  PEFT's prompt encoder, where get(parameter) is its value or its gradient.
  tied, of {path: gradients}, adds up those of what PEFT has once.
  """
  def check(pair, adapted, method, convert, tied=lambda by_path: by_path):
    torch, encoder = pair.torch, adapted.prompt_encoder['default']
    keys = ('input_ids', 'attention_mask')
    if pair.name == 't5':
      keys = ('input_ids', 'decoder_input_ids', 'attention_mask')
    out = adapted(**{k: torch.tensor(a.astype(np.int64))
                     for k, a in zip(keys, pair.args)})
    want = out.logits if hasattr(out, 'logits') else out[0]
    if pair.task in ('TOKEN_CLS', 'CAUSAL_LM'):
      want = want[:, want.shape[1] - IDS.shape[1]:]
    weights = np.random.default_rng(2).normal(size=want.shape)
    if pair.task in ('TOKEN_CLS', 'CAUSAL_LM'):
      weights *= MASK[..., None]  # Nothing reads what stands at padding.
    weights = weights.astype(np.float32)
    (want * torch.tensor(weights)).sum().backward()
    theta = {method.name: convert(encoder, lambda p: p.detach().numpy())}
    gradient = {method.name: convert(encoder, lambda p: p.grad.numpy())}
    trained, _ = peftjax.partition(method, theta)
    made = peftjax.init(method, jax.random.key(0), pair.sites, pair.params)
    _, frozen = peftjax.partition(method, made)
    shapes = lambda t: jax.tree.map(lambda v: tuple(v.shape), t)
    assert shapes(made) == shapes(peftjax.combine(trained, frozen))

    def loss(trained):
      y, _ = peftjax.apply(pair.model, method, pair.params,
                           peftjax.combine(trained, frozen), *pair.args)
      return (y * weights).sum(), y

    (_, y), grads = jit(jax.value_and_grad(loss, has_aux=True))(trained)
    real = weights != 0
    assert np.abs(want.detach().numpy()[real]).max() > 0.1
    np.testing.assert_allclose(y[real], want.detach().numpy()[real], rtol=0,
                               atol=1e-5)
    grads = {method.name: tied(grads[method.name])}
    grads, gradient = trees.flatten(grads), trees.flatten(gradient)
    for path, g in grads.items():
      top = np.abs(gradient[path]).max()
      assert top > 0, path
      np.testing.assert_allclose(g, gradient[path], rtol=0, atol=1e-4 * top,
                                 err_msg=path)
    return peftjax.combine(trained, frozen)

  return check


@pytest.fixture(scope='session')
def greedy():
  """Asserts that generation agrees with PEFT's, token by token."""
  def check(pair, adapted, method, theta, new=6):
    torch = pair.torch
    ids = IDS  # Without padding, where PEFT counts positions otherwise.
    adapted.generation_config.eos_token_id = None
    want = adapted.generate(
        input_ids=torch.tensor(ids.astype(np.int64)),
        attention_mask=torch.ones(ids.shape, dtype=torch.long),
        max_new_tokens=new, do_sample=False).numpy()[:, -new:]
    got = np.asarray(generate(
        pair.model, pair.params, ids, None, new, method, theta))
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(want)) > 3

  return check


def filled(function, *args):
  """What a function returns, in shape only, with random numbers in it."""
  rng = np.random.default_rng(3)
  return jax.tree_util.tree_map_with_path(
      lambda path, v: jnp.asarray(
          rng.normal(float(path[-1].key == 'scale'), 0.7, v.shape), v.dtype),
      jax.eval_shape(function, *args))


@pytest.fixture(scope='session')
def random_params():
  """(model, *inputs) -> parameters with nothing at zero."""
  return lambda model, *args: filled(
      model.init, jax.random.key(0), *args)['params']


@pytest.fixture(scope='session')
def generated():
  """Asserts that generation equals the full call on what it wrote."""
  def check(model, params, method, theta):
    mask = np.arange(7) >= np.array([[0], [3], [5]])
    tokens = np.asarray(generate(
        model, params, IDS, mask, 4, method, theta))
    ids = np.concatenate([IDS, tokens[:, :-1]], axis=1)
    mask = np.concatenate([mask, np.ones((3, 3), bool)], axis=1)
    logits = jit(lambda p, t: peftjax.apply(
        model, method, p, t, ids, mask)[0])(params, theta)
    np.testing.assert_array_equal(tokens, np.argmax(logits, -1)[:, 6:])
    assert len(np.unique(tokens)) > 2

  return check
