"""What of each method reaches PEFT, measured: the table of docs/peft.md.

  python -m peftjax.interop.peft.probe [--write]

Every method is put on a tiny random BERT (a GPT-2 for what reads prompts), its
theta drawn at random, written, and opened by PEFT and transformers themselves,
which the test extra brings. A cell is the largest difference of outputs, or why
there is none.
"""

import importlib
import os
import tempfile
import warnings

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from peftjax.apply import apply
from peftjax.artifact import save_adapter
from peftjax import calibrate
from peftjax.fold import fold_adapter
from peftjax.interop.peft import as_lora
from peftjax.interop.peft import reading
from peftjax.interop.peft import source as source_lib
from peftjax.interop.peft import writing
from peftjax.method import load, names
from peftjax.report import markdown
from peftjax import theta as theta_lib

IDS = np.random.default_rng(0).integers(3, 31, (3, 8))
# Where an example's settings are not what PEFT on a CPU can hold.
_SETTINGS = {'orthogonal.boft': dict(factors=1),
             'lowrank.dense_lora': dict(activation='identity')}
PAGE = os.path.join('docs', 'peft.md')
RANK = 8


def bases(folder):
  """Two tiny random checkpoints, written with transformers."""
  import torch  # the test extra
  import transformers
  torch.manual_seed(0)
  sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2,
               num_attention_heads=4, intermediate_size=24)
  made = {
      'bert': transformers.BertForSequenceClassification(
          transformers.BertConfig(**sizes, max_position_embeddings=20,
                                  num_labels=3)),
      'gpt2': transformers.GPT2LMHeadModel(transformers.GPT2Config(
          vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=40,
          bos_token_id=1, eos_token_id=2))}
  for name, model in made.items():
    with torch.no_grad():
      for p in model.parameters():
        p += 0.2 * torch.randn_like(p)
    model.save_pretrained(os.path.join(folder, name))
  return {n: os.path.join(folder, n) for n in made}


def theirs(weights, adapter=None):
  """Outputs of the checkpoint in transformers, with an adapter of PEFT."""
  import peft
  import torch
  import transformers
  cls = (transformers.GPT2LMHeadModel if weights.endswith('gpt2')
         else transformers.BertForSequenceClassification)
  model = cls.from_pretrained(adapter if adapter and os.path.exists(
      os.path.join(adapter, 'config.json')) else weights).eval()
  if adapter and os.path.exists(os.path.join(adapter, 'adapter_config.json')):
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
  with torch.no_grad():
    out = model(input_ids=torch.tensor(IDS),
                attention_mask=torch.ones(IDS.shape, dtype=torch.long)).logits
  return out.numpy()[:, -IDS.shape[1]:] if out.ndim == 3 else out.numpy()


def probe(name, weights, folder):
  """One line of the table."""
  example = importlib.import_module(f'peftjax.methods.{name}').EXAMPLE
  method = load(name, **{**example, **_SETTINGS.get(name, {})})
  source = source_lib.open_base(weights)
  sites, params = source.sites, source.base.params
  theta = theta_lib.init((method,), jax.random.key(0), sites, params,
                         calibrate.stand_in(method, sites))
  keys = iter(jax.random.split(jax.random.key(1), 500))
  trained, frozen = theta_lib.partition((method,), theta)
  trained = jax.tree.map(
      lambda v: v + 0.05 * jax.random.normal(next(keys), v.shape), trained)
  theta = theta_lib.after_step((method,), theta_lib.combine(trained, frozen))
  mine = os.path.join(folder, 'mine')
  save_adapter(mine, (method,), theta, sites, params, base=dict(
      weights=weights, head=source.base.model.head))
  ours = np.asarray(apply(source.base.model, (method,), params, theta,
                          jnp.asarray(IDS))[0])
  line = {'method': f'`{name}`', 'peft_type': '', 'export': '', 'import': '',
          f'as LoRA of rank {RANK}': '', 'merged': ''}
  def far(folder):
    return f'{np.abs(theirs(weights, folder) - ours).max():.1e}'
  try:
    out = os.path.join(folder, 'peft')
    line['peft_type'] = writing.export_adapter(mine, out)['peft_type']
    line['export'] = far(out)
    back = os.path.join(folder, 'back')
    reading.convert_adapter(out, back, weights)
    again = source_lib.open_adapter(back)[1].theta
    # A method that becomes another (PiSSA a LoRA) comes back as that one.
    same = jax.tree.map(np.array_equal, again.get(method.name), theta.get(
        method.name)) if method.name in again else None
    line['import'] = 'as another method' if same is None else (
        'bit for bit' if all(jax.tree.leaves(same)) else 'differs')
  except ValueError as e:
    line['export'] = line['export'] or _short(e)
  try:
    out = os.path.join(folder, 'lora')
    report = as_lora.export_lora(mine, out, RANK)
    line[f'as LoRA of rank {RANK}'] = (
        f'residual {100 * report["residual"]:.2g} %')
  except ValueError as e:
    line[f'as LoRA of rank {RANK}'] = _short(e)
  try:
    out = os.path.join(folder, 'merged')
    fold_adapter(mine, out)
    line['merged'] = far(out)
  except ValueError as e:
    line['merged'] = _short(e)
  return line


def _short(error):
  """No, and the beginning of why."""
  if 'PEFT has none of them' in str(error):
    return 'no: not in PEFT'
  text = str(error).split(';')[0].split(':')[-1].strip()
  return f'no: {text[:60]}' if len(text) < 61 else 'no'


def table():
  lines = []
  with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    warnings.simplefilter('ignore')
    weights = bases(folder)
    for name in names():
      place = os.path.join(folder, name)
      os.makedirs(place)
      which = 'gpt2' if name.startswith('prompts.') else 'bert'
      lines.append(probe(name, weights[which], place))
  return markdown(lines)


def main(argv):
  del argv
  text = table()
  print(text)
  if _WRITE.value:
    with open(PAGE, encoding='utf-8') as f:
      head, _, rest = f.read().partition('<!-- probe:begin -->')
    tail = rest.partition('<!-- probe:end -->')[2]
    with open(PAGE, 'w', encoding='utf-8') as f:
      f.write(f'{head}<!-- probe:begin -->\n{text.strip()}\n<!-- probe:end -->'
              f'{tail}')


if __name__ == '__main__':
  _WRITE = flags.DEFINE_bool('write', False, f'Write the table into {PAGE}.')
  app.run(main)
