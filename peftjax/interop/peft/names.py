"""Names of torch modules <-> paths of our sites, for every backbone family.

A family's table of stored tensors (`interop.families`) says which torch
parameter each of our leaves is; the module that holds it is the parameter's
name without its last part. The names are those inside the transformers class
that the checkpoint's config names, such as BertForSequenceClassification:

  bert.encoder.layer.0.attention.self.query   <->  block_0/attn/query
  transformer.h.0.attn.c_attn                 <->  block_0/attn/qkv and its
                                                   parts block_0/attn/qkv[0:64]

Since version 5 of transformers the modules of ViT, DeiT and DINOv2 are called
otherwise than the tensors in their checkpoints. Both generations are
read; `transformers=4` writes the older names.
"""

import re
from typing import NamedTuple

import jax
import numpy as np

from peftjax import trees
from peftjax import views as views_lib
from peftjax.interop import families
from peftjax.interop.tensors import stored_shape, to_ours, to_stored
from peftjax.method import nearest

# Last parts of names that say so little that other modules of a transformers
# class, which our models leave out (poolers), may end in them too.
_VAGUE = ('dense', 'projection', 'convolution', 'proj', '0', '1', 'weight')

# model_type -> ordered (regex, replacement): a stored name in version 5.
_ATTENTION = (
    (r'attention\.attention\.(query|key|value)$',
     lambda m: f'attention.{m[1][0]}_proj'),
    (r'attention\.output\.dense$', 'attention.o_proj'))
_VIT = (*_ATTENTION, (r'encoder\.layer\.', 'layers.'),
        (r'intermediate\.dense$', 'mlp.fc1'), (r'output\.dense$', 'mlp.fc2'))
_DINO = (*_ATTENTION, (r'mlp\.weights_out$', 'mlp.down_proj'))
_VERSION_5 = {'vit': _VIT, 'deit': _VIT, 'dinov2': _DINO,
              'dinov2_with_registers': _DINO}
# Modules that version 5 keeps in parts: stored name -> the parts' in order.
_SPLIT = {'mlp.weights_in': ('mlp.gate_proj', 'mlp.up_proj')}


def scanned(path):
  """A path of an unrolled model as the scanned one has it."""
  return re.sub(r'(^|(?<=/))block_\d+(?=/)', 'blocks', path)


class Module(NamedTuple):
  """One torch module with parameters of its own.

  kind: 'linear' (weight [out, in]), 'conv1d' (GPT-2's, weight [in, out]),
    'conv' (weight [out, in, kh, kw]), 'embedding' or 'norm'.
  """

  name: str
  path: str  # of our site, unrolled; with columns where it is a part of a layer
  kind: str
  leaves: tuple  # of (our stored leaf, the torch parameter's last name)
  shape: tuple = ()  # of our stored kernel


class Names:
  """Both directions, for one model.

  Args:
    model: One of peftjax.models, scanned or not.
    config: config.json of its checkpoint; its model_type is read.
    head: 'keep'; or 'drop' to name the body alone, as the class without a head
      has it.
    transformers: 4 or 5, whose names `written` gives.

  Raises:
    ValueError: a model_type that is not known, or a head that no transformers
      class has.
  """

  def __init__(self, model, config, head='keep', transformers=5):
    if head not in ('keep', 'drop'):
      raise ValueError(f"head={head!r}: expected 'keep' or 'drop'")
    if transformers not in (4, 5):
      raise ValueError(f'transformers={transformers!r}: expected 4 or 5, the '
                       'major version whose module names are written')
    self.version, self.older = transformers, {}
    self.model_type = config.get('model_type')
    family = families.family(self.model_type)
    self.scan = bool(getattr(model, 'scan', False))
    self.model = model.clone(scan=False) if self.scan else model
    self.own = self.model
    self.dropped = head == 'drop' and getattr(model, 'head', None) is not None
    if self.dropped:
      self.own = self.model.clone(head=None)
    self.architecture = _architecture(family, self.own, self.model_type, config)
    headed = getattr(self.own, 'head', None) not in (None, 'pool')
    self.prefix = family.prefix(self.model_type) if headed else ''
    self.modules, self.other = {}, set()
    shapes = trees.flatten(jax.eval_shape(
        lambda *a: self.own.init(jax.random.key(0), *a)['params'],
        *families.example(self.own, config)))
    parts = {}
    self.tensors = family.names(self.own, self.model_type)
    for path, tensor in self.tensors.items():
      site, _, leaf = path.rpartition('/')
      # A router is no linear layer in transformers.
      if tensor.stacked or tensor.kind == 'reshape' or site.endswith('/router'):
        self.other.add(site)
        continue
      module, _, last = self.full(tensor.name).rpartition('.')
      parts.setdefault((site, module), {})[leaf] = (last, tensor.kind)
    for (site, module), leaves in parts.items():
      kind = _kind(leaves, self.model_type)
      if kind is None:
        self.other.add(site)
        continue
      leaves = tuple((leaf, last) for leaf, (last, _) in leaves.items())
      shape = shapes.get(f'{site}/kernel' if site else 'kernel')
      for name, path in self._renamed(module, site):
        self.modules[name] = Module(
            name, path, kind, leaves, tuple(shape.shape) if shape else ())
        if name != module:
          self.older[name] = module
    self.by_path = {}
    for module in self.modules.values():
      self.by_path.setdefault(module.path, module)

  def _renamed(self, module, site):
    """[(name in version 5, our path)] of a module by its stored name."""
    for stored, parts in _SPLIT.items():
      if module.endswith(stored) and self.model_type in _VERSION_5:
        width = self.own.mlp_dim
        return [(f'{module.removesuffix(stored)}{part}',
                 f'{site}[{i * width}:{(i + 1) * width}]')
                for i, part in enumerate(parts)]
    for pattern, new in _VERSION_5.get(self.model_type, ()):
      module = re.sub(pattern, new, module)
    return [(module, site)]

  def written(self, module):
    """A module's name in the chosen version of transformers."""
    if self.version == 5 or module not in self.older:
      return module
    old = self.older[module]
    if list(self.older.values()).count(old) > 1:
      raise ValueError(f'{module!r} is a part of {old!r} in transformers 4; an '
                       'adapter of the parts has names of version 5 alone')
    return old

  def full(self, name):
    """A name of the family's table as the transformers class has it."""
    return name[1:] if name.startswith('/') else self.prefix + name

  def module(self, path):
    """(module, columns or None) of one of our unrolled paths.

    Raises:
      ValueError: a site that has no torch module of its own.
    """
    base, span = views_lib.split_path(path)
    if path in self.by_path:
      return self.by_path[path], None
    if base in self.by_path:
      return self.by_path[base], span
    parts = [p for p in self.by_path if p.startswith(f'{path}[')]
    if parts:
      raise ValueError(f'{path!r} is {len(parts)} modules in '
                       f'{self.architecture}: adapt its parts {parts}')
    if base in self.other:
      raise ValueError(
          f'{path!r} has no torch module of its own in {self.architecture}: '
          'experts and single parameters cannot carry a PEFT adapter; leave '
          "it out, or write the folded model (format 'merged')")
    raise ValueError(f'{self.architecture} has no counterpart of the site '
                     f'{path!r}{nearest(base, self.by_path)}')

  def stored(self, module, leaf, value):
    """(torch parameter's whole name, value laid out as torch has it)."""
    last = dict(module.leaves)[leaf]
    tensor = self.tensors[f'{views_lib.split_path(module.path)[0]}/{leaf}']
    return f'{module.name}.{last}', to_stored(tensor.kind, np.asarray(value))

  def ours(self, module, leaf, value, shape):
    """Inverse of `stored`, with the shape that our leaf has."""
    tensor = self.tensors[f'{views_lib.split_path(module.path)[0]}/{leaf}']
    want = stored_shape(tensor, shape)
    if tuple(value.shape) != want:
      raise ValueError(
          f'{module.name}: a tensor of {list(value.shape)}, the base has '
          f'{list(want)}; the adapter is of another base')
    return to_ours(tensor.kind, value, shape)

  def path(self, module):
    """`Module` of a torch module's name; errors list the nearest names."""
    if module not in self.modules:
      now = [new for new, old in self.older.items() if old == module]
      if len(now) == 1:
        return self.modules[now[0]]
      raise ValueError(f'{self.architecture} has no module {module!r}'
                       f'{nearest(module, self.modules)}')
    return self.modules[module]

  def tied(self, path):
    """The torch module that decodes with the table at `path`, or None.

    Raises:
      ValueError: a tied table whose transformers class copies it in ways that
        an adapter of one module cannot follow.
    """
    model, head = self.own, getattr(self.own, 'head', None)
    kind = type(model).__module__.rsplit('.', 1)[-1]
    if kind == 'encdec':
      raise ValueError(
          f'{path!r}: {self.architecture} reads its table through copies '
          "(encoder.embed_tokens, decoder.embed_tokens); an adapter of it "
          "cannot be carried over; write the folded model (format 'merged')")
    if kind == 'decoder' and head == 'lm' and model.tied:
      return 'lm_head'
    if kind == 'encoder' and head == 'mlm' and path == 'word_embed':
      raise ValueError(
          f'{path!r}: the masked-LM head of {self.architecture} decodes with '
          'this table; PEFT would adapt one of the two alone')
    return None

  def table_of(self, decoder):
    """`Module` of the table that a torch module decodes with, if it is tied."""
    if decoder in self.modules or decoder != 'lm_head':
      return None
    for module in self.modules.values():
      if module.kind == 'embedding' and self.tied(module.path) == decoder:
        return module
    return None

  def targets(self, chosen):
    """`target_modules` that match exactly the modules named in `chosen`.

    Ends of names, as short as they can be; PEFT compares them with the ends of
    all module names.
    """
    chosen = {self.written(n) for n in chosen}
    rest = sorted({self.written(n) for n in self.modules} - chosen)
    out = set()
    for name in chosen:
      parts = name.split('.')
      for n in range(1, len(parts) + 1):
        end = '.'.join(parts[-n:])
        vague = n == 1 and n < len(parts) and parts[-1] in _VAGUE
        if not vague and not any(
            r == end or r.endswith(f'.{end}') for r in rest):
          break
      out.add(end)
    return sorted(out)

  def given(self, path):
    """An unrolled path as the model has it, which patterns are written for."""
    return scanned(path) if self.scan else path

  def unroll(self, theta):
    """{path: leaves} of a scanned model -> of the unrolled one."""
    if not self.scan:
      return theta
    return _regroup(trees.flatten(trees.unstack(_nest(theta))))

  def restack(self, theta):
    """Inverse of `unroll`."""
    if not self.scan:
      return theta
    return _regroup(trees.flatten(trees.stack(_nest(theta))))


def _nest(theta):
  return trees.unflatten({
      f'{path}/{leaf}' if path else leaf: v
      for path, t in theta.items() for leaf, v in t.items()})


def _regroup(flat):
  out = {}
  for key, value in flat.items():
    path, _, leaf = key.rpartition('/')
    out.setdefault(path, {})[leaf] = value
  return out


def _architecture(family, model, model_type, config):
  """Class name in transformers of a model with this head."""
  try:
    return family.export(model, model_type)['architectures'][0]
  except ValueError as e:
    raise ValueError(
        f'{e} The head {getattr(model, "head", None)!r} is our own: give '
        "head='drop' to leave it, and what was trained of it, out") from e


def _kind(leaves, model_type):
  """Kind of a module from its leaves {ours: (theirs, kind of tensor)}."""
  if 'kernel' in leaves:
    last, kind = leaves['kernel']
    kinds = {'linear': 'linear', 'conv': 'conv', 'same': 'conv1d'}
    return kinds[kind] if last == 'weight' else None
  if 'embedding' in leaves:
    return 'embedding' if leaves['embedding'][0] == 'weight' else None
  if 'scale' in leaves and leaves['scale'][0] == 'weight':
    # The statistics of a batch norm are folded into our scale: not the same
    # number.
    return 'norm' if model_type != 'resnet' else None
  if set(leaves) == {'bias'} and leaves['bias'][0] == 'bias':
    return 'linear'
  return None
