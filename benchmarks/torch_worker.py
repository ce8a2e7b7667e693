"""Training steps of Hugging Face PEFT on torch, one at a time, when asked.

A process of its own beside benchmarks/step.py, which writes lines to it and
reads JSON lines back:

  build ARM        -> {"trained": numbers, "note": "..."} or {"error": "..."}
  step ARM         -> {"seconds": of one step, "loss": of it}
  logits ARM       -> {"values": the first logits}
  peak ARM         -> {"bytes": most memory of a step on a GPU}
  drop ARM         -> {}

The step is forward, backward and AdamW (torch's fused one); on a GPU a step is
timed to the end of its last kernel.
"""

import argparse
import gc
import json
import os
import sys
import time
import warnings

import peft
import torch
import transformers

from benchmarks import arms

BERT = ['query', 'key', 'value', 'attention.output.dense',
        'intermediate.dense', 'output.dense']
LLAMA = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj',
         'down_proj']


def peft_config(arm, llama):
  """PEFT's config of an arm, and a word on where it differs; None: no PEFT."""
  lin = LLAMA if llama else BERT
  task = dict(task_type='CAUSAL_LM' if llama else 'SEQ_CLS')
  spec = arms.METHODS[arm]
  if arm in ('lora', 'dora'):
    return peft.LoraConfig(
        r=spec['rank'], lora_alpha=spec['alpha'], target_modules=lin,
        use_dora=arm == 'dora', **task), ''
  if arm == 'oft':
    return peft.OFTConfig(oft_block_size=spec['block_size'],
                          target_modules=lin, **task), ''
  if arm == 'boft':
    return peft.BOFTConfig(
        boft_block_size=spec['block_size'],
        boft_n_butterfly_factor=spec['factors'], target_modules=lin,
        **task), 'PEFT takes 1 factor without its CUDA extension'
  if arm == 'ia3':
    scaled, down = (('k_proj|v_proj', 'down_proj') if llama
                    else ('key|value', r'\d+\.output\.dense'))
    return peft.IA3Config(target_modules=rf'.*({scaled}|{down})',
                          feedforward_modules=rf'.*{down}', **task), ''
  if arm == 'ln_tuning':
    norms = ['input_layernorm', 'post_attention_layernorm', 'norm'] if (
        llama) else ['LayerNorm']
    return peft.LNTuningConfig(target_modules=norms, **task), ''
  if arm == 'prompt':
    return peft.PromptTuningConfig(num_virtual_tokens=arms.TOKENS, **task), ''
  if arm == 'prefix':
    return peft.PrefixTuningConfig(num_virtual_tokens=arms.TOKENS, **task), ''
  return None, 'not in PEFT'


class Worker:
  """Models by arm, each with its optimiser."""

  def __init__(self, args):
    self.args, self.built = args, {}
    self.llama = arms.MODELS[args.model]['model_type'] == 'llama'
    self.dtype = getattr(torch, args.dtype)
    made = arms.batch(args.model, args.batch, args.tokens)
    as_ids = lambda x: torch.tensor(x.astype('int64')).to(args.device)
    self.inputs = dict(input_ids=as_ids(made['ids']))
    if args.device == 'cpu':  # a mask keeps flash attention off on a GPU
      self.inputs['attention_mask'] = as_ids(made['mask'])
    self.inputs['labels'] = as_ids(
        made['ids'] if self.llama else made['label'])

  def build(self, arm):
    kind = (transformers.AutoModelForCausalLM if self.llama
            else transformers.AutoModelForSequenceClassification)
    if self.args.folder:
      model = kind.from_pretrained(self.args.folder, dtype=self.dtype)
    else:
      config = transformers.AutoConfig.for_model(
          **arms.MODELS[self.args.model])
      with torch.device(self.args.device):
        model = kind.from_config(config, dtype=self.dtype)
    note = ''
    if arm != 'full':
      config, note = peft_config(arm, self.llama)
      if config is None:
        return dict(error=note)
      model = peft.get_peft_model(model, config)
    model = model.to(self.args.device).train()
    params = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(params, lr=arms.RATE, weight_decay=0., fused=True)
    self.built[arm] = model, tx
    return dict(trained=sum(p.numel() for p in params), note=note)

  def wait(self):
    if self.args.device != 'cpu':
      torch.cuda.synchronize()

  def step(self, arm):
    model, tx = self.built[arm]
    self.wait()
    start = time.perf_counter()
    tx.zero_grad(set_to_none=True)
    loss = model(**self.inputs).loss
    loss.backward()
    tx.step()
    self.wait()
    seconds = time.perf_counter() - start
    return dict(seconds=seconds, loss=loss.item())

  def logits(self, arm):
    with torch.inference_mode():
      out = self.built[arm][0](**self.inputs).logits
    return dict(values=out.float().flatten()[:64].tolist())

  def peak(self, arm):
    if self.args.device == 'cpu':
      return dict(bytes=0)
    torch.cuda.reset_peak_memory_stats()
    self.step(arm)
    return dict(bytes=torch.cuda.max_memory_allocated())

  def drop(self, arm):
    self.built.pop(arm, None)
    gc.collect()
    if self.args.device != 'cpu':
      torch.cuda.empty_cache()
    return {}


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--model', required=True)
  parser.add_argument('--folder', default='')
  parser.add_argument('--batch', type=int, required=True)
  parser.add_argument('--tokens', type=int, required=True)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--device', default='cpu')
  parser.add_argument('--threads', type=int, default=0)
  args = parser.parse_args()
  warnings.simplefilter('ignore')
  transformers.logging.set_verbosity_error()
  if args.threads:
    torch.set_num_threads(args.threads)
  torch.manual_seed(0)
  # What libraries and their compilers print must not come between the lines
  # of the protocol.
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  worker = Worker(args)
  for line in sys.stdin:
    verb, arm = line.split()
    try:
      reply = getattr(worker, verb)(arm)
    except Exception as e:  # pylint: disable=broad-exception-caught
      reply = dict(error=f'{type(e).__name__}: {str(e)[:200]}')
    print(json.dumps(reply), file=out, flush=True)


if __name__ == '__main__':
  main()
