"""Writes a page for every method, from its docstrings and what was measured.

  python -m peftjax.docs              # docs/methods/*.md
"""

import importlib
import inspect
import os
import re
import textwrap

from absl import app
from absl import flags
import jax

from peftjax import capabilities
from peftjax import method as method_lib
from peftjax import sites as sites_lib

OUT = flags.DEFINE_string('out', 'docs/methods', 'Folder of the pages.')

NOTE = '<!-- Written by `python -m peftjax.docs`; edit the docstrings. -->'
HEAD = "dict(name='selective.full', sites=dict(roles='head'), group='head')"


def escape(text):
  """Text in which Markdown sees no markup but `code`."""
  mark = r'[\\*<]|\b_|_\b|\](?=\()'
  parts = re.split(r'(`[^`]*`)', text)
  parts[::2] = (re.sub(mark, r'\\\g<0>', part) for part in parts[::2])
  return ''.join(parts)


def prose(doc):
  """A docstring as Markdown.

  Indented paragraphs are equations and become code; indented lines below a line
  that is not become a list; the rest is text.
  """
  out = []
  for part in re.split(r'\n\s*\n', inspect.cleandoc(doc)):
    lines = part.split('\n')
    indented = [line.startswith(' ') for line in lines]
    if all(indented):
      out.append(f'```\n{textwrap.dedent(part)}\n```')
    elif any(indented):
      out.append('\n'.join(_list(lines)))
    else:
      out.append(escape(part))
  return '\n\n'.join(out)


def _list(lines):
  """Text, and items indented by two; deeper lines continue an item."""
  out, text = [], True
  for line in lines:
    depth = len(line) - len(line.lstrip())
    words = escape(line.strip().removeprefix('* '))
    if depth == 0:
      out += [words] if text else ['', words]
    elif depth == 2 and not (line.strip()[0].islower() and not text):
      out += ['', f'- {words}'] if text else [f'- {words}']
    else:
      out.append(f'  {words}')
    text = depth == 0
  return out


def _sections(doc):
  """{'Args': text, 'Raises': text} of a function's docstring."""
  parts = re.split(
      r'^(Args|Returns|Raises):\n', inspect.cleandoc(doc), flags=re.M)
  return {k: textwrap.dedent(v) for k, v in zip(parts[1::2], parts[2::2])}


def arguments(factory):
  """The factory's keywords: a Markdown list of defaults and meanings."""
  text = _sections(factory.__doc__).get('Args', '')
  entries = dict(re.findall(r'^(\w+): (.*(?:\n .*)*)', text, re.M))
  lines = []
  for name, p in inspect.signature(factory).parameters.items():
    default = getattr(p.default, '__name__', None) or repr(p.default)
    default = '' if p.default is p.empty else f'={default}'
    meaning = escape(' '.join(entries.get(name, '').split()))
    lines.append(f'- `{name}{default}`: {meaning}')
  return '\n'.join(_fill(line, '  ') for line in lines)


def _fill(text, indent=''):
  return textwrap.fill(text, 80, subsequent_indent=indent,
                       break_long_words=False, break_on_hyphens=False)


def example(name):
  """A config's `method` with the defaults spelt out."""
  factory = method_lib.factory(name)
  known = inspect.signature(factory).parameters.items()
  given = capabilities.required(name)
  words = given | {n: p.default for n, p in known
                   if n not in ('sites', *given)
                   and p.default not in (None, (), '')}
  entries = [f'dict({_keywords(dict(name=name, **words))})']
  method = method_lib.load(name, **given)
  if capabilities.measure(name).int8 is None:  # a base for other methods
    entries.append("dict(name='lowrank.lora', rank=8)")
  if not method.sites(_head()):
    entries.append(HEAD)
  lines = [textwrap.fill(f'    {entry},', 80, subsequent_indent=' ' * 9)
           for entry in entries]
  text = '\n'.join(['config.method = (', *lines])
  return text + ')' if len(entries) == 1 else text.rstrip(',') + ')'


def _keywords(words):
  return ', '.join(f'{name}={value!r}' for name, value in words.items())


def _head():
  """A head as `describe` finds it."""
  shape = dict(kernel=(8, 2), bias=(2,))
  params = {n: jax.ShapeDtypeStruct(s, 'float32')
            for n, s in shape.items()}
  return sites_lib.Site('head', 'Dense', 'head', params)


def page(name):
  """The Markdown page of one method."""
  module = importlib.import_module(f'peftjax.methods.{name}')
  factory = method_lib.factory(name)
  title, _, body = inspect.cleandoc(module.__doc__).partition('\n')
  row = capabilities.measure(name)
  measured = [f'- {column}: {cell}' for column, cell in zip(
      capabilities.COLUMNS[2:], row.cells()[2:]) if cell]
  raises = ' '.join(_sections(factory.__doc__).get('Raises', '').split())
  source = f'peftjax/methods/{name.replace(".", "/")}.py'
  return '\n'.join([
      NOTE, '', f'# {name}', '', escape(title), '', prose(body), '',
      '## Hyper-parameters', '', arguments(factory), '',
      _fill(f'Raises {escape(raises)}') if raises else '', '',
      '## In a config', '', '```python', example(name), '```', '',
      '## Measured', '',
      'Default hyper-parameters on the shape of `vit_s`; the rest on the small',
      'model of the conformance suite.', '', *measured, '',
      f'Source: [{source}](../../{source})', ''])


def index(table):
  """The list of all pages; `table` as of `capabilities.markdown`."""
  lines = []
  for name in method_lib.names():
    module = importlib.import_module(f'peftjax.methods.{name}')
    title = inspect.cleandoc(module.__doc__).partition('\n')[0]
    lines.append(f'- [{name}]({name.replace(".", "_")}.md): {escape(title)}')
  return '\n'.join([
      NOTE, '', '# Methods', '', *lines, '', '## What they can do', '',
      'Measured by `python -m peftjax.methods`, with default settings on the',
      'shape of `vit_s`.', '', table, ''])


def pages():
  """{file name: text} of everything that is generated."""
  texts = {f'{name.replace(".", "_")}.md': page(name)
           for name in method_lib.names()}
  return {'README.md': index(capabilities.markdown()), **texts}


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  texts = pages()
  os.makedirs(OUT.value, exist_ok=True)
  for file in sorted(os.listdir(OUT.value)):
    if file.endswith('.md') and file not in texts:
      os.remove(os.path.join(OUT.value, file))  # its method is gone
  for file, text in texts.items():
    with open(os.path.join(OUT.value, file), 'w', encoding='utf-8') as f:
      f.write(text)
  print(f'{len(texts)} pages in {OUT.value}')


if __name__ == '__main__':
  app.run(main)
