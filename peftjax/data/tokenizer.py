"""A checkpoint's own tokenizer, and whether it fits the model.

  tokenizer = load_tokenizer('checkpoints/all-MiniLM-L6-v2')
  check_fits(tokenizer, vocab_size=30522, positions=512, length=128)
  tokenizer.encode(['a text'])            # [[101, 1037, 3793, 102]]

Read with the `tokenizers` library from tokenizer.json. The truncation and the
padding that such a file may carry are switched off: `peftjax.data.text` cuts
and pads, and counts what it cuts.
"""

import json
import pathlib
from typing import Any, NamedTuple, Optional

import tokenizers

# Names that a special token goes by where no file says which one it is: the
# tokenizer files of several older checkpoints leave them to the code.
WELL_KNOWN = dict(
    pad=('[PAD]', '<pad>', '<|pad|>', '<|padding|>'),
    bos=('<s>', '<bos>', '[BOS]', '<|begin_of_text|>', '<|endoftext|>'),
    eos=('</s>', '<eos>', '[EOS]', '<|end_of_text|>', '<|endoftext|>'),
    sep=('[SEP]', '</s>'),
    cls=('[CLS]', '<cls>', '<s>'),
    mask=('[MASK]', '<mask>'),
    unk=('[UNK]', '<unk>'))


class Tokenizer(NamedTuple):
  """A tokenizer and the ids of its special tokens; None where it has none."""
  core: tokenizers.Tokenizer  # neither truncates nor pads
  vocab: int                  # rows that an embedding table needs
  # Fills rows up. Its own padding token; without one the token that ends a
  # text; without that 0. Padding is masked, so that any id serves.
  pad: int
  bos: Optional[int] = None
  eos: Optional[int] = None
  sep: Optional[int] = None
  cls: Optional[int] = None
  mask: Optional[int] = None
  unk: Optional[int] = None
  # Jinja source of the chat template, and the strings that it may name.
  template: Optional[str] = None
  names: Any = {}

  def encode(self, texts, special=True):
    """Texts -> lists of ids; special: with the tokens a model expects."""
    return [e.ids for e in self.core.encode_batch_fast(
        list(texts), add_special_tokens=special)]

  def decode(self, ids, special=False):
    """Ids of one text -> str; special: special tokens stay visible."""
    return self.core.decode(
        [int(i) for i in ids], skip_special_tokens=not special)


def load_tokenizer(path):
  """Reads a tokenizer.

  Args:
    path: a folder with tokenizer.json and, if it has them,
      tokenizer_config.json, special_tokens_map.json, config.json and
      chat_template.jinja; or one such tokenizer.json, which takes the files
      beside it along; or a JSON file of any other name, alone, which may also
      hold llama2.c's `pieces` and `scores`.

  Returns:
    A Tokenizer. Its special tokens are those that the files name; where they
    name none, those of `WELL_KNOWN` that it has. What a text begins and ends
    with is what tokenizer.json says, whatever the add_bos_token and
    add_eos_token of tokenizer_config.json are: so does transformers 5.

  Raises:
    FileNotFoundError: no such file, or a folder without tokenizer.json.
    ValueError: a file that is no tokenizer, or a special token that the
      vocabulary lacks.
  """
  path = pathlib.Path(path)
  folder = path if path.is_dir() else path.parent
  file = path / 'tokenizer.json' if path.is_dir() else path
  if not file.is_file():
    held = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    raise FileNotFoundError(
        f'no tokenizer at {file}; {folder} holds: '
        f'{", ".join(held) or "nothing"}. A checkpoint with another file, such '
        'as tokenizer.model, is converted by saving it with transformers.')
  text = file.read_text(encoding='utf-8')
  data = _json(file, text)
  if 'pieces' in data and 'scores' in data:
    core, found, beside = llama2c(data['pieces'], data['scores']), {}, False
  else:
    try:
      core = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # the library raises bare Exceptions
      raise ValueError(f'{file} is not a tokenizer: {e}') from e
    beside = file.name == 'tokenizer.json'
    found = _files(folder) if beside else {}
  core.no_truncation()
  core.no_padding()
  ids = _special(core, found)
  vocab = max(core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
  pad = next(i for i in (ids.pop('pad'), ids['eos'], 0) if i is not None)
  names = {f'{role}_token': core.id_to_token(i)
           for role, i in dict(ids, pad=pad).items() if i is not None}
  template = _template(folder, found) if beside else None
  return Tokenizer(core, vocab, pad, **ids, template=template, names=names)


def llama2c(pieces, scores):
  """The tokenizer of llama2.c: BPE that merges the best-scored pair first.

  Args:
    pieces: strings, latin-1 views of UTF-8 bytes; 0 unknown, 1 begin, 2 end,
      3 to 258 single bytes '<0x00>' to '<0xFF>', then the merged ones.
    scores: one a piece; higher merges earlier.

  Returns:
    A tokenizers.Tokenizer that starts texts with '<s>', puts a space before
    them and falls back to bytes.

  Source: run.c of llama2.c (github.com/karpathy/llama2.c).
  """
  if len(pieces) != len(scores):
    raise ValueError(f'{len(pieces)} pieces and {len(scores)} scores')
  names = ['<unk>', '<s>', '</s>'] + list(pieces[3:259])
  names += [p.encode('latin-1').decode('utf-8') for p in pieces[259:]]
  vocab = {name: i for i, name in enumerate(names)}
  merges = [(-scores[i], name[:cut], name[cut:])
            for i, name in enumerate(names) if i > 258
            for cut in range(1, len(name))
            if name[:cut] in vocab and name[cut:] in vocab]
  merges.sort(key=lambda m: m[0])
  core = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab, [m[1:] for m in merges], unk_token='<unk>', byte_fallback=True))
  core.add_special_tokens(['<unk>', '<s>', '</s>'])
  core.normalizer = tokenizers.normalizers.Prepend(' ')
  core.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', 1)])
  core.decoder = tokenizers.decoders.Sequence([
      tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(' ', 1, 0)])
  return core


def check_fits(tokenizer, vocab_size, positions=None, length=None):
  """Raises a ValueError unless the model can read what the tokenizer writes.

  Args:
    tokenizer: a Tokenizer.
    vocab_size: rows of the model's embedding table.
    positions: how many the model has; None: no limit (relative positions).
    length: of the rows, in tokens; None: not checked.
  """
  if tokenizer.vocab > vocab_size:
    raise ValueError(
        f'the tokenizer has ids up to {tokenizer.vocab - 1}, the embedding '
        f'table {vocab_size} rows; expected a tokenizer of the same '
        f'checkpoint, or a table of {tokenizer.vocab} rows or more')
  if None not in (positions, length) and length > positions:
    raise ValueError(f'length {length} is longer than the {positions} '
                     f'positions of the model; nearest: {positions}')


def _json(file, text):
  try:
    data = json.loads(text)
  except json.JSONDecodeError as e:
    raise ValueError(f'{file} is not JSON: {e}') from e
  if not isinstance(data, dict):
    raise ValueError(f'{file} holds a {type(data).__name__}, expected an '
                     'object')
  return data


def _files(folder):
  """What the files beside tokenizer.json say, a later file over an earlier."""
  found = {}
  for name in ('config.json', 'special_tokens_map.json',
               'tokenizer_config.json'):
    file = folder / name
    if file.is_file():
      found.update(_json(file, file.read_text(encoding='utf-8')))
  return found


def _special(core, found):
  """{role: id or None} for the roles of WELL_KNOWN."""
  ids = {}
  for role, known in WELL_KNOWN.items():
    token = found.get(f'{role}_token')
    token = token.get('content') if isinstance(token, dict) else token
    ids[role] = core.token_to_id(token) if token is not None else None
    if token is not None and ids[role] is None:
      raise ValueError(f'{role}_token {token!r} is not in the vocabulary of '
                       'the tokenizer')
    named = found.get(f'{role}_token_id')  # of config.json; may be a list
    named = named[0] if isinstance(named, list) and named else named
    if (ids[role] is None and isinstance(named, int) and named >= 0
        and core.id_to_token(named) is not None):
      ids[role] = named
  if not any(f'{role}_token' in found for role in WELL_KNOWN):
    special = {t.content: i for i, t in core.get_added_tokens_decoder().items()
               if t.special}
    for role, known in WELL_KNOWN.items():
      if ids[role] is None:
        ids[role] = next((special[t] for t in known if t in special), None)
  return ids


def _template(folder, found):
  """Source of the chat template, or None."""
  file = folder / 'chat_template.jinja'
  if file.is_file():
    return file.read_text(encoding='utf-8')
  template = found.get('chat_template')
  if isinstance(template, list):  # several, by name
    template = {t['name']: t['template'] for t in template}.get('default')
  return template
