"""Texts from texts: instruction tuning, generation from records, summaries.

A decoder reads prompt and answer in one row and is trained on the answer alone:
batches as in lm.py. An encoder-decoder reads them apart: ids, mask [B, T] and
targets_in, targets_out [B, S], target_weights float32 [B, S].

What the model writes for the held-out prompts, greedily, is compared with all
references: BLEU, NIST, ROUGE-L; and its short answer with the example's
`answer`, where it has one.
"""

import numpy as np

from peftjax import bases
from peftjax import measures
from peftjax.data import chat, packing, text
from peftjax.generate import generate
from peftjax.method import nearest
from peftjax.tasks import base as base_lib
from peftjax.tasks import lm
from peftjax.tasks.base import Task

KINDS, HEAD, CALL = ('seq2seq',), 'lm', 'ids'
WRITTEN = ('bleu', 'rouge_l', 'nist', 'exact_match')


def outputs(source):
  """None: the head's outputs are the vocabulary."""
  del source


def reads_apart(model):
  """Whether a model is an encoder-decoder."""
  return 'targets' in base_lib.takes(model)


def task(spec, source, classes, base):
  """The `Task`; arguments as of `classification.task`.

  The first metric is 'exact_match' where examples have an answer, else 'bleu';
  conversations are not written to, so that theirs is 'perplexity'.
  """
  del classes
  chats = 'messages' in source.examples[0]
  known = lm.METRICS if chats else (*lm.METRICS, *WRITTEN)
  default = 'perplexity' if chats else (
      'exact_match' if source.examples[0].get('answer') else 'bleu')
  main = base_lib.main_metric(spec.metric, default, known)
  if not reads_apart(base.model):
    return Task('seq2seq', main, lm.inputs, lm.loss, lm.measure, lm.metrics)
  if chats:
    raise ValueError(f'{source.name} holds conversations, which an '
                     'encoder-decoder does not read; choose a decoder')

  def inputs(batch):
    return (batch['ids'], batch['targets_in']), dict(mask=batch['mask'])

  def loss(out, batch, smoothing=None):
    return base_lib.token_loss(
        out, batch['targets_out'], batch['target_weights'], smoothing)

  def measure(out, batch):
    return lm.measured(out, batch['targets_out'], batch['target_weights'])

  return Task('seq2seq', main, inputs, loss, measure, lm.metrics)


def _start(base, tokenizer):
  """Id that a decoder of an encoder-decoder begins with."""
  start = base.config.get('decoder_start_token_id')
  return tokenizer.pad if start is None else start


def encoder(spec, source, base, tokenizer, classes):
  """Examples -> (arrays, Report); see `classification.encoder`.

  A conversation of which no answer is left stays, with weights 0.
  """
  del classes
  if reads_apart(base.model):
    return lambda examples: text.encode_seq2seq(
        examples, tokenizer, spec.length, 'encdec', spec.target_length or None,
        start=_start(base, tokenizer))
  if 'messages' in source.examples[0]:
    return lambda examples: chat.encode_messages(
        examples, tokenizer, spec.length, _template(spec, tokenizer), keep=True)
  return lambda examples: text.encode_seq2seq(
      examples, tokenizer, spec.length, prompt=spec.prompt)


def _template(spec, tokenizer):
  """The template of conversations; None: the tokenizer's own."""
  own = tokenizer.template and spec.prompt == 'plain'
  return None if own else spec.prompt


def arrays(spec, source, base, tokenizer, classes, train):
  """Arrays as above; arguments as of `classification.arrays`.

  `task.prompt` is the template around a source, or of conversations; with
  `task.packed`, rows that a decoder is trained on hold several examples.
  """
  encode = encoder(spec, source, base, tokenizer, classes)
  if reads_apart(base.model):
    found, _ = encode(source.examples)
    targets = {k: v for k, v in found.items() if k not in ('ids', 'mask')}
    targets['mask'] = targets['target_weights'] > 0
    cut = base_lib.trimmed(targets)
    del cut['mask']
    return base_lib.trimmed({k: found[k] for k in ('ids', 'mask')}) | cut
  if 'messages' in source.examples[0]:
    found, _ = chat.encode_messages(
        source.examples, tokenizer, spec.length, _template(spec, tokenizer))
  else:
    found, _ = encode(source.examples)
  if spec.packed and train:
    found, _ = packing.pack(found, spec.length, tokenizer.pad)
  return base_lib.trimmed(found)


def writer(spec, source, base, tokenizer, batch, stream=False):
  """`Task.generate` for a split, or None for conversations.

  Args:
    spec, source, base: As of `task`.
    tokenizer: Of the base.
    batch: Rows at a time.
    stream: Whether prompts are read and encoded a batch at a time; of the rest
      of the split, the answers that scores are made of are kept meanwhile.

  Raises:
    ValueError: no room for new tokens in the model's positions.
  """
  if 'messages' in source.examples[0]:
    return None
  n = len(source.examples)
  read = lambda *span: [source.examples[i] for i in range(*span)]
  batch = min(batch, n)
  stop = () if tokenizer.eos is None else (tokenizer.eos,)
  start = _start(base, tokenizer) if reads_apart(base.model) else None

  def texts(rows, model, methods, params, theta):
    """What the model writes, a text a row."""
    out = []
    for first in range(0, len(rows['ids']), batch):
      part = {k: v[first:first + batch] for k, v in rows.items()}
      n = len(part['ids'])
      # The last batch is filled up with its last row: one shape, one program.
      part = {k: np.concatenate([v, np.repeat(v[-1:], batch - n, 0)])
              for k, v in part.items()}
      ids = generate(
          model, params, part['ids'], part['mask'], spec.max_new_tokens,
          methods, theta, stop_tokens=stop, pad=tokenizer.pad, start=start)
      out += [tokenizer.decode(_until(row, stop)).strip()
              for row in np.asarray(ids)[:n]]
    return out

  if not stream:
    examples = read(n)
    told = _answers(spec, examples)
    rows = _prompts(spec, examples, base, tokenizer)
    return lambda *args: score(texts(rows, *args), *told)

  def write(*args):
    out, kept = [], []
    for first in range(0, n, batch):
      part = read(first, min(first + batch, n))
      out += texts(_prompts(spec, part, base, tokenizer, cut=False), *args)
      kept += [{k: e.get(k) for k in ('target', 'references', 'answer')}
               for e in part]
    return score(out, *_answers(spec, kept))

  one = read(1)  # what does not fit is said now, not after training
  _answers(spec, one)
  _prompts(spec, one, base, tokenizer)
  return write


def _answers(spec, examples):
  """(references, short answers or None, their kind) of examples."""
  references = [e.get('references') or [e['target']] for e in examples]
  short = [e.get('answer') for e in examples]
  short = [str(a) for a in short] if all(a is not None for a in short) else None
  return references, short, answer_kind(spec.answer, short, examples)


def score(texts, references, short=None, kind='text'):
  """Metrics of texts that a model wrote.

  Args:
    texts: [str].
    references: [[str]], those of each text.
    short: [str], the short answers; None: there are none.
    kind: Of the short answers; see `measures.answer`.
  """
  found = dict(bleu=measures.bleu(texts, references),
               nist=measures.nist(texts, references),
               rouge_l=measures.rouge_l(texts, references))
  found['exact_match'] = measures.exact_match(
      texts, short or references, kind if short else 'text')
  return found


def answer_kind(kind, short, examples):
  """`task.answer`, or what the examples' answers look like where it is ''."""
  if kind or not short:
    if kind and kind not in measures.ANSWERS:
      raise ValueError(f'task.answer={kind!r}{nearest(kind, measures.ANSWERS)}')
    return kind or 'text'
  if all(measures.answer(a, 'number') == _number(a) for a in short):
    return 'number'
  targets = [measures.answer(e['target'], 'last') for e in examples]
  if targets == [measures.answer(a, 'last') for a in short]:
    return 'last'
  return 'text'


def _number(text_):
  try:
    return f'{float(text_.replace(",", "")):.10g}'
  except ValueError:
    return None


def _prompts(spec, examples, base, tokenizer, cut=True):
  """{ids, mask} of what is continued, or read by an encoder.

  cut: whether columns that are padding in all rows are left out.
  """
  trimmed = base_lib.trimmed if cut else lambda arrays: arrays
  most = bases.positions(base)
  if reads_apart(base.model):
    found, _ = text.encode_seq2seq(
        [dict(source=e['source'], target=e['target']) for e in examples],
        tokenizer, spec.length, 'encdec', start=_start(base, tokenizer))
    return trimmed({k: found[k] for k in ('ids', 'mask')})
  length = spec.length if most is None else min(
      spec.length, most - spec.max_new_tokens)
  if length < 1:
    raise ValueError(
        f'task.max_new_tokens={spec.max_new_tokens} leaves no room for a '
        f'prompt in the {most} positions of the model')
  found, _ = text.encode_prompts(examples, tokenizer, length, spec.prompt)
  return trimmed(found)


def _until(row, stop):
  """Ids before the first stop token."""
  end = [i for i, t in enumerate(row) if t in stop]
  return row[:end[0]] if end else row
