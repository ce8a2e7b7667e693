"""Prompts and chat templates: what a model reads before it answers.

  arrays, report = encode_messages(examples, tokenizer, length=512)

A chat template is the Jinja source that a checkpoint brings along. It is
rendered in Jinja's sandbox, and what the assistant said is found in the text,
so that the loss falls on answers alone.
"""

import datetime
import functools
import json

import jinja2
from jinja2 import ext
from jinja2 import nodes
from jinja2 import sandbox
import numpy as np

from peftjax.data import encoding
from peftjax.method import nearest

# '{source}' stands for the example's source.
PROMPTS = {
    'plain': '{source}\n',
    # The variant without input of "Alpaca: A Strong, Replicable
    # Instruction-Following Model" (Taori et al. 2023).
    'alpaca': ('Below is an instruction that describes a task. Write a '
               'response that appropriately completes the request.\n\n'
               '### Instruction:\n{source}\n\n### Response:\n'),
}

# For models without a template; a chat of one question reads as its prompt.
_TURNS = ("{{% for m in messages %}}{{% if m.role == 'assistant' %}}"
          "{{{{ m.content + (eos_token or '\\n') }}}}"
          "{{% else %}}{{{{ {question} }}}}{{% endif %}}{{% endfor %}}")
TEMPLATES = {
    'plain': _TURNS.format(question=r"m.content + '\n'"),
    'alpaca': (
        "{% if messages[0].role != 'system' %}{{ '"
        + PROMPTS['alpaca'].split('###', 1)[0].replace('\n', '\\n')
        + "' }}{% endif %}" + _TURNS.format(question=(
            r"m.content + '\n\n' if m.role == 'system' else "
            r"'### Instruction:\n' + m.content + '\n\n### Response:\n'"))),
}

# Around {% generation %} blocks while rendering: two code points that Unicode
# sets aside for a program's own use and that text must not have.
_OPEN, _CLOSE = '\ufdd0', '\ufdd1'


def prompt_format(prompt):
  """Source -> prompt, by a name of PROMPTS or a text with '{source}' in it."""
  text = PROMPTS.get(prompt, prompt)
  if '{source}' not in text:
    raise ValueError(f"prompt {prompt!r}{nearest(prompt, PROMPTS)}, or a text "
                     "with '{source}' in it")
  before, after = text.split('{source}', 1)
  return lambda source: before + source + after


def render(messages, template, names=None, answer_next=False, **variables):
  """Messages -> the text that the model reads.

  Args:
    messages: list of {'role', 'content'}.
    template: Jinja source.
    names: {'bos_token': '<s>', ...} that the template may use.
    answer_next: end with what introduces an answer, for generation; the
      template sees it as add_generation_prompt.
    **variables: more that the template may use, such as date_string: a
      template that writes today's date gives other text every day.

  Raises:
    ValueError: messages that the template refuses, or a template that is no
      Jinja.
  """
  return _render(messages, template, names, answer_next, variables)[0]


def answers(messages, template, names=None, **variables):
  """The text of a conversation, and where in it the assistant speaks.

  The answers are what rendering one more message adds to the text; for a
  template that writes earlier messages otherwise once there are later ones,
  what it marks itself by {% generation %}.

  Args:
    as `render`.

  Returns:
    (text, [(start, end), ...]) in characters: an answer and what the template
    puts behind it.

  Raises:
    ValueError: no answer, or a template from which answers cannot be told.
  """
  draw = functools.partial(
      _render, template=template, names=names, variables=variables)
  _check_messages(messages)
  text, marked = draw(messages, answer_next=False)
  places = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
  if not places:
    raise ValueError('no message of the assistant; expected 1 or more')
  spans = []
  for i in places:
    try:
      before, _ = draw(messages[:i], answer_next=True)
      upto, _ = draw(messages[:i + 1], answer_next=False)
    except ValueError:
      break  # some templates refuse a conversation that is not complete
    if not (text.startswith(upto) and upto.startswith(before)):
      break
    spans.append((len(before), len(upto)))
  if len(spans) == len(places):
    return text, spans
  if marked:
    return text, marked
  raise ValueError(
      'the chat template writes a message otherwise once others follow and '
      'has no {% generation %} block, so that answers cannot be told from the '
      'rest; expected a template with the block, or one of '
      f'{", ".join(TEMPLATES)}')


def encode_messages(examples, tokenizer, length, template=None, keep=False,
                    **variables):
  """Examples {'messages': [{'role', 'content'}]} -> arrays for a decoder.

  A conversation too long loses its end; one of which no answer is left is
  dropped, and counted.

  Args:
    examples: sequence of dicts.
    tokenizer: a Tokenizer.
    length: T, 2 or more.
    template: name of `TEMPLATES`, or Jinja source; None: the tokenizer's own.
    keep: whether conversations of which no answer is left have a row all the
      same, with weights 0; they are counted as dropped.
    **variables: that the template may use, see `render`.

  Returns:
    (dict(ids, mask, weights), Report), as `peftjax.data.text.encode_seq2seq`
    but with N less Report.dropped rows; weights are 1 on answers.
  """
  encoding.check_length(length, 2)
  own = template is None
  template = tokenizer.template if own else TEMPLATES.get(template, template)
  if template is None:
    raise ValueError('the tokenizer has no chat template; choose one of '
                     f'{", ".join(TEMPLATES)}, or give Jinja source')
  if '{' not in template:
    raise ValueError(f'chat template {template!r}'
                     f'{nearest(template, TEMPLATES)}')
  built_in = template in TEMPLATES.values()
  rows, weights, cut, longest, dropped = [], [], 0, 0, 0
  texts, spans = [], []
  examples = encoding.read_rows(examples)
  for i in range(len(examples)):
    messages = encoding.value_of(examples, i, 'messages', (list, tuple))
    try:
      text, places = answers(messages, template, tokenizer.names, **variables)
    except ValueError as e:
      raise ValueError(f'example {i}: {e}') from e
    texts.append(text)
    spans.append(places)
  # A checkpoint's template writes the token that begins a text itself; ours
  # leave it to the tokenizer.
  for e, places in zip(tokenizer.core.encode_batch(
      texts, add_special_tokens=built_in), spans):
    ids, offsets = np.array(e.ids, np.int32), np.array(e.offsets)
    if built_in and encoding.ends(tokenizer):
      ids, offsets = ids[:-1], offsets[:-1]
    start, end = offsets.reshape(-1, 2).T
    answer = np.zeros(len(ids), bool)
    for a, b in places:
      answer |= (start >= a) & (start < b) & (end > start)
    answer[:1] = False  # nothing comes before it
    longest = max(longest, len(ids))
    cut += len(ids) > length
    left = answer[:length].any()
    dropped += not left
    if left or keep:
      rows.append(ids[:length])
      weights.append(answer[:length])
  report = encoding.Report(
      len(examples), cut, longest, dropped=dropped)
  if not rows:
    raise ValueError(f'none of the {len(examples)} conversations has an '
                     f'answer in its first {length} tokens; the longest has '
                     f'{longest}')
  arrays = encoding.padded(rows, length, tokenizer.pad)
  arrays['weights'] = encoding.fill(weights, length, 0).astype(np.float32)
  return arrays, encoding.logged('messages', report, length)


def _check_messages(messages):
  for m in messages:
    if not isinstance(m, dict) or not all(
        isinstance(m.get(k), str) for k in ('role', 'content')):
      raise ValueError(f'message {m!r}; expected '
                       "{'role': text, 'content': text}")
    if _OPEN in m['content'] or _CLOSE in m['content']:
      raise ValueError(f'message {m!r} has a code point that is no character, '
                       f'{_OPEN!r} or {_CLOSE!r}')


class _Generation(ext.Extension):
  """{% generation %} ... {% endgeneration %}: marks what is inside."""
  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    mark = lambda c: nodes.Output([nodes.TemplateData(c)])
    # A scope of its own: what is set inside is not seen outside.
    return nodes.Scope([mark(_OPEN), *body, mark(_CLOSE)]).set_lineno(line)


@functools.lru_cache(maxsize=16)
def _compiled(source):
  # A template comes from whoever made the checkpoint: no access to Python.
  env = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True,
      extensions=[_Generation, ext.loopcontrols])
  # Jinja's own writes HTML entities.
  env.filters['tojson'] = lambda x, ensure_ascii=False, **options: json.dumps(
      x, ensure_ascii=ensure_ascii, **options)
  env.globals.update(
      raise_exception=_refuse,
      strftime_now=lambda form: datetime.datetime.now().strftime(form))
  return env.from_string(source)


def _refuse(message):
  raise jinja2.TemplateError(message)


def _render(messages, template, names, answer_next, variables):
  """-> (text, spans of {% generation %} blocks)."""
  try:
    drawn = _compiled(template).render(
        **{**(names or {}), **variables}, messages=messages,
        add_generation_prompt=answer_next)
  except jinja2.TemplateError as e:
    raise ValueError(f'the chat template refuses: {e}') from e
  text, spans = '', []
  for part in drawn.split(_OPEN):
    inside, closed, outside = part.partition(_CLOSE)
    if closed:
      spans.append((len(text), len(text) + len(inside)))
    text += inside + outside
  return text, spans
