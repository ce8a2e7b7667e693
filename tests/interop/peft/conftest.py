"""Tiny random models of transformers, adapters of PEFT on them, and ours."""

import collections
import functools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax
from peftjax import theta as theta_lib
from peftjax.artifact import load_adapter
from peftjax.interop.peft import files
from peftjax.interop.peft import reading
from peftjax.interop.peft import source as source_lib
from peftjax.interop.peft.writing import export_adapter
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

SIZES = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2,
             num_attention_heads=4, intermediate_size=24)
LLAMA = dict(SIZES, num_key_value_heads=2, max_position_embeddings=40,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
BERT = dict(SIZES, max_position_embeddings=20, num_labels=3)
VIT = dict({k: v for k, v in SIZES.items() if k != 'vocab_size'}, image_size=8,
           patch_size=4, num_labels=3)
TOWER = {k: v for k, v in SIZES.items() if k != 'vocab_size'}

# family -> (class without Config or head, ending, settings).
FAMILIES = {
    'bert': ('Bert', 'ForSequenceClassification', BERT),
    'roberta': ('Roberta', 'ForTokenClassification',
                dict(BERT, type_vocab_size=1, pad_token_id=1)),
    'distilbert': ('DistilBert', 'ForSequenceClassification', dict(
        vocab_size=32, dim=16, n_layers=2, n_heads=2, hidden_dim=24,
        max_position_embeddings=20, num_labels=3)),
    'electra': ('Electra', 'ForSequenceClassification',
                dict(BERT, embedding_size=8)),
    'gpt2': ('GPT2', 'LMHeadModel', dict(
        vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=40,
        bos_token_id=1, eos_token_id=2)),
    'llama': ('Llama', 'ForCausalLM', LLAMA),
    'mistral': ('Mistral', 'ForCausalLM', dict(LLAMA, sliding_window=4)),
    'qwen2': ('Qwen2', 'ForCausalLM', LLAMA),
    'qwen3': ('Qwen3', 'ForCausalLM', dict(LLAMA, head_dim=8)),
    'gemma2': ('Gemma2', 'ForCausalLM', dict(LLAMA, head_dim=4,
                                             sliding_window=4)),
    'mixtral': ('Mixtral', 'ForCausalLM', dict(LLAMA, num_local_experts=3)),
    't5': ('T5', 'ForConditionalGeneration', dict(
        vocab_size=32, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24,
        decoder_start_token_id=0, tie_word_embeddings=False,
        scale_decoder_outputs=False)),
    'vit': ('ViT', 'ForImageClassification', VIT),
    'deit': ('Deit', 'ForImageClassification', VIT),
    'dinov2': ('Dinov2', 'ForImageClassification',
               dict(VIT, use_swiglu_ffn=True)),
    'clip': ('CLIP', 'Model', dict(
        text_config=dict(SIZES, max_position_embeddings=10, projection_dim=8,
                         eos_token_id=31),
        vision_config=dict(TOWER, image_size=8, patch_size=4, projection_dim=8),
        projection_dim=8)),
    'resnet': ('ResNet', 'ForImageClassification', dict(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
        layer_type='basic', num_labels=3)),
    'convnext': ('ConvNext', 'ForImageClassification', dict(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2,
        num_labels=3, layer_scale_init_value=0.5)),
}
RNG = np.random.default_rng(0)
IDS = RNG.integers(3, 31, (3, 8))
MASK = np.arange(8) < np.array([[8], [6], [3]])
IMAGES = RNG.normal(size=(3, 8, 8, 3)).astype(np.float32)

Family = collections.namedtuple('Family', 'name folder cls')


def _class(name, ending):
  if name == 'Deit':
    return transformers.DeiTForImageClassification, transformers.DeiTConfig
  return (getattr(transformers, name + ending),
          getattr(transformers, f'{name}Config'))


@pytest.fixture(scope='session')
def family(tmp_path_factory):
  """name -> Family, its random model saved once."""
  torch.set_num_threads(1)

  @functools.cache
  def make(name):
    first, ending, sizes = FAMILIES[name]
    cls, config = _class(first, ending)
    torch.manual_seed(0)
    model = cls(config(**sizes)).eval()
    with torch.no_grad():
      for p in model.parameters():  # nothing at zero or one
        p += 0.3 * torch.randn_like(p) / max(1, p[0].numel()) ** 0.5 if (
            p.ndim > 1) else 0.3 * torch.randn_like(p)
      for n, b in model.named_buffers():
        if n.endswith('running_mean'):
          b.normal_()
        elif n.endswith('running_var'):
          b.uniform_(0.5, 2.)
    if name == 't5':  # an untied head: logits of 20 have no 1e-5 in float32
      with torch.no_grad():
        model.lm_head.weight *= 0.1
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    return Family(name, str(folder), cls)

  return make


def base(family):
  return family.cls.from_pretrained(family.folder).eval()


def inputs(name):
  """Arguments of transformers' model."""
  ids = dict(input_ids=torch.tensor(IDS),
             attention_mask=torch.tensor(MASK).long())
  pixels = dict(pixel_values=torch.tensor(IMAGES.transpose(0, 3, 1, 2).copy()))
  if name == 't5':
    return dict(ids, decoder_input_ids=torch.tensor(IDS[:, ::-1].copy()))
  if name == 'clip':
    text = IDS.copy()
    text[:, -1] = 31
    return dict(input_ids=torch.tensor(text), **pixels)
  if name in ('vit', 'deit', 'dinov2', 'resnet', 'convnext'):
    return pixels
  return ids


def torch_output(model, name):
  out = model(**inputs(name))
  if name == 'clip':
    return out.logits_per_image
  # Those of the text: PEFT leaves a prompt's in front.
  return out.logits[:, -IDS.shape[1]:] if out.logits.ndim == 3 else out.logits


def our_output(source, methods, params, theta):
  """The same output of ours."""
  run = functools.partial(peftjax.apply, source.base.model, methods, params,
                          theta)
  name = source.names.model_type
  ids, mask = jnp.asarray(IDS, jnp.int32), jnp.asarray(MASK)
  if name == 't5':
    return run(ids, ids[:, ::-1], mask)[0]
  if name == 'clip':
    return run(ids.at[:, -1].set(31), jnp.asarray(IMAGES))[0]
  if name in ('vit', 'deit', 'dinov2', 'resnet', 'convnext'):
    return run(jnp.asarray(IMAGES))[0]
  return run(ids, mask)[0]


def real(name, out):
  """The entries that padding does not touch."""
  if name in ('bert', 'distilbert', 'electra', 'clip', 'vit', 'deit', 'dinov2',
              'resnet', 'convnext', 't5'):
    return out
  return out[MASK]


def adapted(family, config, seed=1, scale=0.1):
  """A PEFT model with nothing of its adapter at its start."""
  torch.manual_seed(seed)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of the CUDA extension, of ties
    model = peft.get_peft_model(base(family), config).eval()
  with torch.no_grad():
    for p in model.parameters():
      if p.requires_grad:
        p += scale * torch.randn_like(p)
  return model


def imported(family, model, folder, **kwargs):
  """(Source, methods, theta) of a PEFT model, by way of its files."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    model.save_pretrained(folder / 'theirs')
  reading.convert_adapter(folder / 'theirs', folder / 'ours', family.folder,
                          **kwargs)
  source, adapter, _ = source_lib.open_adapter(folder / 'ours')
  return source, adapter.methods, adapter.theta


def gradients(family, model, source, loss):
  """Gradients of torch, in the form of theta, of loss(output)."""
  model.zero_grad()
  loss(torch_output(model, family.name)).backward()
  grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
  grads = {n: torch.zeros_like(dict(model.named_parameters())[n]) if v is None
           else v for n, v in grads.items()}
  # Data of the whole adapter, which PEFT asks for beside them.
  grads |= {n: v for n, v in model.named_buffers(remove_duplicate=False)
            if '.vera_' in n}
  config = model.peft_config['default']
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    named = peft.get_peft_model_state_dict(model, state_dict=grads)
  kind = files.types()[str(config.peft_type.value)]
  settings = {**kind.CONFIG, **{k: v for k, v in config.to_dict().items()
                                if v is not None}}
  settings['target_modules'] = None
  modules, rest = files.grouped(
      {n: v.detach().numpy() for n, v in named.items()}, kind.SUFFIXES)
  parts = reading.parts_of(settings, kind, modules, rest, source)
  return parts


def train_torch(family, model, target, steps, lr=1e-2, eps=1e-4):
  # A classifier that the exported adapter carries along is not trained here.
  tx = torch.optim.Adam([
      p for n, p in model.named_parameters()
      if p.requires_grad and 'modules_to_save' not in n], lr, eps=eps)
  for _ in range(steps):
    tx.zero_grad()
    out = real(family.name, torch_output(model, family.name))
    ((out - torch.tensor(target)) ** 2).mean().backward()
    tx.step()
  return torch_output(model, family.name).detach().numpy()


def train_ours(family, source, methods, theta, target, steps, lr=1e-2,
               eps=1e-4):
  """(output, theta) after as many steps."""
  trained, frozen = theta_lib.partition(methods, theta)
  tx = optax.adam(lr, eps=eps)

  @jax.jit
  def step(trained, state, params):
    def loss(trained):
      out = our_output(source, methods, params,
                       theta_lib.combine(trained, frozen))
      return jnp.mean((real(family.name, out) - target) ** 2)
    updates, state = tx.update(jax.grad(loss)(trained), state)
    return optax.apply_updates(trained, updates), state

  state = tx.init(trained)
  for _ in range(steps):
    trained, state = step(trained, state, source.base.params)
    new = theta_lib.after_step(methods, theta_lib.combine(trained, frozen))
    trained, _ = theta_lib.partition(methods, new)
  theta = theta_lib.combine(trained, frozen)
  return np.asarray(jax.jit(lambda p, t: our_output(source, methods, p, t))(
      source.base.params, theta)), theta


def reopened(family, folder, trainable=True):
  """The written adapter in PEFT; a warning of PEFT is an error."""
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    for about in ('.*CUDA.*', '.*butterfly.*', '.*deprecated.*', '.*SwigPy.*',
                  '.*tie_word_embeddings.*',
                  "Unsupported layer type.*Norm",  # of its own LN tuning
                  '.*rank_pattern keys did not match.*lora_E'):  # of AdaLoRA's
      warnings.filterwarnings('ignore', about)
    return peft.PeftModel.from_pretrained(
        base(family), folder, is_trainable=trainable).eval()


@pytest.fixture(scope='session')
def kit():
  return types.SimpleNamespace(**{
      f.__name__: f for f in (
          base, inputs, torch_output, our_output, real, adapted, imported,
          gradients, train_torch, train_ours, reopened, export_adapter,
          load_adapter)})
