"""An adapter of PEFT -> an adapter of ours.

What is trained beside the adapter proper becomes methods of its own, innermost
first: biases `selective.bitfit`, token rows `selective.trainable_tokens`, then
the adapter, then whole modules (a head) `selective.full`.
"""

import functools
import re

import jax
import numpy as np

from peftjax import theta as theta_lib
from peftjax.artifact import save_adapter
from peftjax.config import DTYPES
from peftjax.interop.peft import files
from peftjax.interop.peft.names import scanned
from peftjax.interop.peft.part import array, at, matched, Part, sites_of
from peftjax.interop.peft.source import open_base
from peftjax.interop.peft.types import trainable_tokens
from peftjax.method import as_methods, load, nearest, SHARED

_HEADS = {'SEQ_CLS': 'classify', 'TOKEN_CLS': 'tag', 'CAUSAL_LM': 'lm',
          'SEQ_2_SEQ_LM': 'lm', 'FEATURE_EXTRACTION': None}


def convert_adapter(peft_dir, out, base=None, head='auto', scan=False):
  """Reads an adapter of PEFT and writes one of ours.

  Args:
    peft_dir: Folder with adapter_config.json and adapter_model.safetensors.
    out: Folder to make, as of `save_adapter`.
    base: The base's folder, hub id or packaged name; by default what the
      adapter says.
    head: Of the base, as of `bases.load`; 'auto': what task_type asks for.
    scan: Whether the adapter is to be for the scanned form of the base.

  Returns:
    dict(methods, sites, trained, out).

  Raises:
    FileNotFoundError, ValueError: whatever is missing, damaged, for another base
      or not known; nothing is written then.
  """
  config, tensors, metadata = files.read(peft_dir)
  weights = base or config.get('base_model_name_or_path')
  if not weights:
    raise ValueError(f'{peft_dir} does not name its base '
                     '(base_model_name_or_path); give --base')
  kind = files.types()[config['peft_type']]
  modules, rest = files.grouped(tensors, kind.SUFFIXES)
  if head == 'auto':
    head = _HEADS.get(config.get('task_type'), 'own')
  classes = _classes(rest) if head in ('classify', 'tag', 'own') else None
  # A base in bfloat16 has another fingerprint than the same in float32.
  dtype = metadata.get('peftjax.param_dtype', 'float32')
  if dtype not in DTYPES:
    raise ValueError(f'{peft_dir}: peftjax.param_dtype is {dtype!r}'
                     f'{nearest(dtype, DTYPES)}')
  opened = functools.partial(
      open_base, weights, head, classes, scan, param_dtype=dtype)
  source = opened()
  if any(source.names.path(n).path.endswith('attn/qkv') for n in modules
         if n in source.names.modules):
    source = opened(fused='whole')
    fused = 'whole'
  else:
    fused = 'split'
  told = metadata.get('peftjax.fingerprint')
  if told and classes is None and (
      told not in (source.base.fingerprint, source.fingerprint)):
    raise ValueError(
        f'{peft_dir} was written for another base: {told[:12]}..., {weights} is '
        f'{source.fingerprint[:12]}... (fingerprints)')
  parts = parts_of(config, kind, modules, rest, source)
  methods, theta = build(parts, source)
  save_adapter(out, methods, theta, source.sites, source.base.params, base=dict(
      weights=str(weights), scan=scan, fused=fused, param_dtype=dtype,
      head=getattr(source.base.model, 'head', None), classes=classes))
  trained, _ = theta_lib.partition(methods, theta)
  return dict(methods=[dict(p.spec) for p in parts], out=str(out),
              sites=sum(len(p.theta) for p in parts),
              trained=sum(np.size(v) for v in jax.tree.leaves(trained)))


def _classes(rest):
  """Outputs of a classifier among the tensors, or None."""
  for name, value in rest.items():
    if re.search(r'(^|\.)(classifier|score)(\.out_proj)?\.weight$', name):
      return int(value.shape[0])
  return None


def parts_of(config, kind, modules, rest, source):
  """[Part], innermost first, of what an adapter folder holds.

  Raises:
    ValueError: a tensor that belongs to nothing, or whose base is another.
  """
  names, sites = source.names, source.unrolled
  prompt = not kind.SUFFIXES
  common = getattr(kind, 'COMMON', ())
  own = {n: v for n, v in rest.items()
         if n in common or prompt and '.' not in n}
  rest = {n: v for n, v in rest.items() if n not in own}
  if not prompt and not modules:
    raise ValueError(f'no tensor of a {config["peft_type"]} adapter among '
                     f'{sorted(rest)[:5]}; expected names that end in '
                     f'{list(kind.SUFFIXES)}')
  for name in modules:
    if name in names.modules:  # a decoder tied to a table follows it
      _check_target(config, name)
  if prompt or common:
    modules = {**modules, '': own}
  adapter = kind.read(config, modules, names, sites)
  whole, biases, tokens = {}, {}, {}
  entries = tuple(config.get('modules_to_save') or ())
  for name, value in rest.items():
    module, _, last = name.rpartition('.')
    # bias='all' saves the biases of whole modules again, and those of the
    # copies that only a switched-off adapter reads.
    again = re.sub(r'\.(modules_to_save|original_module)(?=\.)', '', name)
    if again != name and again in rest:
      continue
    inner = module.removesuffix('.base_layer')
    table = name.removesuffix(f'.{trainable_tokens.BESIDE}')
    if table != name:
      tokens[table] = dict(trainable_tokens_delta=value)
      continue
    table = names.table_of(inner)
    if table:  # saved again as the decoder of an adapted table
      _check_copy(name, value, source.flat[f'{table.path}/embedding'])
      continue
    owner = names.path(inner)
    leaf = {theirs: ours for ours, theirs in owner.leaves}.get(last)
    if leaf is None:
      raise ValueError(f'{name}: {inner} has no parameter {last!r} in '
                       f'{names.architecture}'
                       f'{nearest(last, [t for _, t in owner.leaves])}')
    have = source.flat[f'{owner.path}/{leaf}']
    value = array(names.ours(owner, leaf, value, have.shape))
    if any(_below(inner, e) for e in entries):
      whole.setdefault(owner.path, {})[leaf] = value
    elif last == 'bias' and config.get('bias', 'none') != 'none':
      biases[owner.path] = {leaf: value}
    elif owner.kind == 'embedding':  # PEFT saves an adapted table whole
      _check_copy(name, value, have)
    else:
      raise ValueError(
          f'{name}: neither a tensor of {config["peft_type"]} nor below '
          f'modules_to_save {list(entries)}{nearest(name, names.modules)}')
  parts = []
  if biases:
    parts.append(Part(dict(name='selective.bitfit', sites=sites_of(biases)),
                      biases))
  if tokens:
    parts.append(_tokens(config, tokens, names, sites))
  parts.append(adapter)
  if whole:
    for path, t in whole.items():
      missing = set(dict(names.by_path[path].leaves)) - set(t)
      if missing:
        raise ValueError(f'{names.by_path[path].name} of modules_to_save: '
                         f'{sorted(missing)} is missing')
    parts.append(Part(dict(name='selective.full', sites=sites_of(whole),
                           group='head'), whole))
  return parts


def _below(name, entry):
  """Whether PEFT wraps a module, or one above it, for an entry."""
  parts = name.split('.')
  return any('.'.join(parts[:i + 1]).endswith(entry)
             for i in range(len(parts)))


def _check_target(config, name):
  """Raises where the config's targets leave out a module that has tensors."""
  targets = config.get('target_modules')
  if targets is None or targets == 'all-linear':
    return
  if isinstance(targets, str):
    fits = re.fullmatch(targets, name) is not None
  else:
    fits = any(name == t or name.endswith(f'.{t}') for t in targets)
  if not fits:
    raise ValueError(f'{name} has tensors but is not among target_modules '
                     f'{targets}: config and tensors are of two adapters')


def _check_copy(name, value, have):
  """PEFT saves adapted tables whole: they must be the base's."""
  if not np.array_equal(np.asarray(value, np.float32),
                        np.asarray(have, np.float32)):
    raise ValueError(
        f'{name} is saved with the adapter and differs from the base\'s: the '
        'vocabulary was resized or the base is another; save the changed base '
        'as a checkpoint and give it as --base')


def _tokens(config, tokens, names, sites):
  given = config.get('trainable_token_indices')
  if not given:
    raise ValueError('the adapter holds rows of tokens, but its config has no '
                     'trainable_token_indices')
  parts = []
  for table, t in tokens.items():
    indices = given if isinstance(given, list) else matched(given, table, None)
    if indices is None:
      raise ValueError(f'trainable_token_indices names {sorted(given)}, not '
                       f'{table!r}')
    parts.append(trainable_tokens.read(
        dict(token_indices=indices), {table: t}, names, sites))
  first = parts[0]
  return first._replace(theta={k: v for p in parts for k, v in p.theta.items()})


def _stacked(part, names):
  """A Part for the scanned model: its numbers stacked, its paths renamed."""
  def rename(value):
    if isinstance(value, str) and value.startswith('^('):
      paths = map(scanned, value[2:-2].split('|'))
      return '^(' + '|'.join(dict.fromkeys(paths)) + ')$'
    if isinstance(value, dict):
      return {k: rename(v) for k, v in value.items()}
    if isinstance(value, list):
      return [rename(v) for v in value]
    return value

  shapes = {}
  for path, t in part.theta.items():
    shapes.setdefault(scanned(path), set()).add(tuple(sorted(
        (n, np.shape(v)) for n, v in t.items())))
  for path, found in shapes.items():
    if len(found) > 1:
      raise ValueError(
          f'{path!r}: the layers differ in {sorted(found)[:2]} and cannot be '
          'stacked; take the base as it is, without scan')
  for key in ('rank_pattern', 'alpha_pattern'):
    said = {}
    for path in part.theta:
      said.setdefault(scanned(path), set()).add(
          at(part.spec.get(key, ()), path, None))
    for path, found in said.items():
      if len(found) > 1:
        raise ValueError(
            f'{path!r}: the layers differ in {key} and cannot be stacked; take '
            'the base as it is, without scan')
  return part._replace(spec=rename(dict(part.spec)),
                       theta=names.restack(part.theta))


def build(parts, source):
  """(methods, theta) of parts, checked against what `init` would make.

  Raises:
    ValueError: sites that are chosen but have no numbers, or numbers of another
      shape.
  """
  if source.names.scan:
    parts = [_stacked(p, source.names) for p in parts]
  methods = tuple(load(**p.spec) for p in parts)
  theta = {}
  for name, part in zip(as_methods(methods), parts):
    theta[name] = dict(part.theta)
    if part.shared:
      theta[name][SHARED] = dict(part.shared)
  make = lambda p: theta_lib.init(methods, jax.random.key(0), source.sites, p)
  want = jax.eval_shape(make, source.base.params)
  lacking = False
  for name, method in as_methods(methods).items():
    for path in {*want[name], *theta[name]}:
      new, old = want[name].get(path, {}), theta[name].get(path, {})
      for leaf in {*new, *old}:
        if leaf in new and leaf not in old and leaf in method.frozen:
          lacking = True
          continue
        if leaf not in new or leaf not in old:
          raise ValueError(
              f'{name} at {path!r}: the leaf {leaf!r} is '
              f'{"not in the adapter" if leaf in new else "not of the method"}')
        # Shapes of a later phase follow from what was trained before.
        if not method.spec.get('phase') and (
            tuple(new[leaf].shape) != tuple(np.shape(old[leaf]))):
          raise ValueError(
              f'{name} at {path!r}: {leaf} of {list(np.shape(old[leaf]))}, the '
              f'base needs {list(new[leaf].shape)}; the adapter is of another '
              'base')
  if lacking:  # data that the method makes from the base
    made = make(source.base.params)
    theta = {n: {p: {**made[n].get(p, {}), **by_path.get(p, {})}
                 for p in {**made[n], **by_path}}
             for n, by_path in theta.items()}
  return methods, jax.tree.map(np.asarray, theta)
