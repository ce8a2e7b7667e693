"""An adapter of ours -> an adapter of PEFT.

One method of the adapter decides the peft_type; beside it may stand
`selective.full` (modules_to_save), `selective.bitfit` (bias) and, with LoRA,
`selective.trainable_tokens` (trainable_token_indices).
"""

import json

import numpy as np

from peftjax.interop.peft import files
from peftjax.interop.peft.part import array
from peftjax.interop.peft.source import open_adapter
from peftjax.interop.peft.types import trainable_tokens
from peftjax.method import nearest

FULL, BIAS, TOKENS = (
    'selective.full', 'selective.bitfit', 'selective.trainable_tokens')
# Our head -> task_type; PEFT makes modules of these names trainable by itself.
_TASKS = {'classify': 'SEQ_CLS', 'tag': 'TOKEN_CLS', 'lm': 'CAUSAL_LM',
          None: 'FEATURE_EXTRACTION', 'pool': 'FEATURE_EXTRACTION'}
_CLASSIFIERS = ('classifier', 'score')
_BIASED = ('LORA', 'ADALORA', 'DELORA', 'VERA', 'OFT', 'BOFT')
_ALONE = ('TRAINABLE_TOKENS',)  # has no modules_to_save


def export_adapter(adapter_dir, out, base=None, head='keep', transformers=5):
  """Writes an adapter of PEFT; see the module docstring.

  Args:
    adapter_dir: What `save_adapter` wrote.
    out: Folder to make; an adapter of PEFT there is replaced.
    base: Folder or hub id of the base, as PEFT is to find it; by default what
      the adapter says.
    head: 'keep'; or 'drop' to leave a head of our own (such as 'mean'), and
      what was trained of it, out.
    transformers: 4 or 5: whose module names are written.

  Returns:
    dict(peft_type, methods, tensors, out, left_out: paths of a dropped head).

  Raises:
    ValueError: whatever PEFT has no counterpart of; nothing is written then.
  """
  source, _, parts = open_adapter(
      adapter_dir, base, keep_head=head, transformers=transformers)
  config, tensors, left = convert(parts, source, base)
  files.write(out, config, tensors, {
      'peftjax.methods': json.dumps([p.spec['name'] for p in parts]),
      **source.metadata})
  return dict(peft_type=config['peft_type'], out=str(out), left_out=left,
              methods=[p.spec['name'] for p in parts], tensors=len(tensors))


def convert(parts, source, base=None):
  """(config, {full name: array}, paths left out) of an adapter's parts."""
  names, left = source.names, []
  if names.dropped:
    parts = [_without_head(p, left) for p in parts]
    parts = [p for p in parts if p.theta or p.shared]
  kinds = files.types()
  main, kind = _main(parts, kinds)
  module = kinds[kind]
  own, modules = module.write(main, names, source.unrolled)
  prompt = not hasattr(module, 'SUFFIXES') or not module.SUFFIXES
  config = dict(
      own, peft_type=kind, inference_mode=True, revision=None,
      peft_version=files.VERSION,
      base_model_name_or_path=str(base or source.weights),
      task_type=_task(names))
  tensors, saved, biases = {}, {}, {}
  for name, t in modules.items():
    written = names.written(name) if name else ''
    for suffix, value in t.items():
      tensors['.'.join(filter(None, (written, suffix)))] = value
  if not prompt:
    config.setdefault('target_modules', names.targets(filter(None, modules)))
  for part in parts:
    what = part.spec['name']
    if part is main:
      continue
    if what == FULL:
      saved |= _values(part, names)
    elif what == BIAS and kind in _BIASED:
      biases |= _values(part, names)
    elif what == TOKENS and kind == 'LORA':
      more, indices = trainable_tokens.beside(part, names)
      tensors |= more
      config['trainable_token_indices'] = indices
    else:
      raise ValueError(
          f'{what} beside {main.spec["name"]}: {kind} in PEFT has no room for '
          "it; write the folded model (format 'merged')")
  if biases:
    config['bias'] = 'all'
    tensors |= _all_biases(biases, source, modules, names)
  entries, more = (), {}
  if kind in _ALONE and saved:
    raise ValueError(f'{FULL} on {sorted(saved)[:3]} beside {kind}: PEFT saves '
                     'nothing beside it; put the token rows beside a LoRA')
  if kind not in _ALONE:
    entries, more = _modules_to_save(saved, biases, config, source, modules)
  if entries:
    config['modules_to_save'] = entries
  start = 'base_model.' if prompt else 'base_model.model.'
  top = '' if prompt else 'base_model.'
  whole = {top + n: array(v) for n, v in tensors.items() if '.' not in n}
  rest = {**{n: v for n, v in tensors.items() if '.' in n}, **more}  # in order
  return config, {**whole, **{start + n: array(v) for n, v in rest.items()}}, left


def _without_head(part, left):
  gone = [p for p in part.theta if p == 'head' or p.startswith('head/')]
  left += gone
  return part._replace(
      theta={p: t for p, t in part.theta.items() if p not in gone})


def _main(parts, kinds):
  """(the part that decides the kind, the kind)."""
  known = {m for v in kinds.values() for m in v.METHODS}
  found = [p for p in parts if p.spec['name'] in known]
  others = [p for p in found if p.spec['name'] != TOKENS]
  found = others or found
  if len(found) == 1:
    part, = found
    takes = lambda v: part.spec['name'] in v.METHODS and (
        not hasattr(v, 'takes') or v.takes(part))
    return part, next(k for k, v in kinds.items() if takes(v))
  said = [p.spec['name'] for p in parts]
  if not found:
    raise ValueError(
        f'{said}: PEFT has none of them as a method of its own'
        f'{nearest(said[0], known) if said else ""} Write the folded model '
        "(format 'merged'), or the nearest LoRA of a rank (format 'lora')")
  raise ValueError(f'{[p.spec["name"] for p in found]}: an adapter of PEFT is of '
                   "one kind; write the folded model (format 'merged')")


def _task(names):
  head = getattr(names.own, 'head', None)
  kind = type(names.own).__module__.rsplit('.', 1)[-1]
  if kind not in ('encoder', 'decoder', 'encdec'):
    return None  # PEFT's task classes are of models that read ids
  if kind == 'encdec' and head == 'lm':
    return 'SEQ_2_SEQ_LM'
  return _TASKS.get(head)


def _values(part, names):
  """{module: {leaf: array}} of a method that holds new values of leaves."""
  out = {}
  for path, t in part.theta.items():
    module, span = names.module(path)
    if span is not None:
      raise ValueError(
          f'{path!r} is a part of {module.name}, which PEFT saves whole; '
          f'choose {module.path!r}')
    out[module.name] = t
  return out


def _all_biases(trained, source, adapted, names):
  """Every bias, as bias='all' of PEFT has it; the base's where not trained."""
  out = {}
  for name, module in names.modules.items():
    for leaf, last in module.leaves:
      if last != 'bias':
        continue
      value = trained.get(name, {}).get(leaf)
      if value is None:
        value = source.flat[f'{module.path}/{leaf}']
      inner = 'base_layer.' if name in adapted else ''
      out[f'{names.written(name)}.{inner}bias'] = array(value)
  return out


def _modules_to_save(saved, biases, config, source, adapted):
  """(entries, tensors) of whole modules: what PEFT will wrap, all of it."""
  names, entries = source.names, []
  own = config['task_type'] in ('SEQ_CLS', 'TOKEN_CLS')
  for name in saved:
    if name in adapted:
      raise ValueError(f'{name} is trained whole and adapted at once, which PEFT '
                       'does not do; leave it out of the sites of one of them')
    top = name.split('.')[0]
    entry = top if own and top in _CLASSIFIERS else names.written(name)
    if entry not in entries:
      entries.append(entry)
  # These PEFT wraps by itself, and then misses what is not there.
  wanted = (*entries, *(_CLASSIFIERS if own else ()))
  out = {}
  for name, module in names.modules.items():
    parts = names.written(name).split('.')
    heads = ['.'.join(parts[:i + 1]) for i in range(len(parts))]
    hit = [w for w in wanted if any(h.endswith(w) for h in heads)]
    if not hit:
      continue
    if hit[0] not in entries:
      entries.append(hit[0])
    if name in adapted:
      raise ValueError(f'{name} is adapted, and PEFT saves it whole as a '
                       'classifier; leave the head out of the sites')
    for leaf, _ in module.leaves:
      value = saved.get(name, biases.get(name, {})).get(leaf)
      if value is None:
        value = source.flat[f'{module.path}/{leaf}']
      full, value = names.stored(module, leaf, value)
      last = full.rpartition('.')[2]
      out[f'{names.written(name)}.{last}'] = np.asarray(value, np.float32)
  return entries, out
