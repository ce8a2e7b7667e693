"""Chat templates against transformers, and where the loss falls."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors

from peftjax.data import chat
from peftjax.data import text
from peftjax.data.tokenizer import load_tokenizer

CHAT = [dict(role='system', content='Be brief.'),
        dict(role='user', content='Hi <b>'),
        dict(role='assistant', content='Hello!'),
        dict(role='user', content='Bye'),
        dict(role='assistant', content='Ciao\n')]
NAMES = dict(bos_token='<s>', eos_token='</s>')

CHATML = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content }}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
# Refuses, strips, and begins a text itself.
INSTRUCT = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{% set rest = messages[1:] %}{% set system = messages[0].content + '\\n' %}\
{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}\
{% for m in rest %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{% if m['role'] == 'user' %}\
{{ '[INST] ' + (system if loop.first else '') + m['content'].strip() \
+ ' [/INST]' }}\
{% else %}{{ ' ' + m['content'].strip() + eos_token }}{% endif %}{% endfor %}"""
# Writes all but the last answer in short, so that prefixes do not agree.
SHORTENS = """{% for m in messages %}{% if m.role == 'assistant' %}A: \
{% generation %}{{ m.content if loop.last else m.content[:1] }}#\
{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}{% endif %}
{% endfor %}"""
TOOLS = """{{ {'a': '<&>', 'b': 'é'} | tojson }}{% for m in messages %}\
{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}\
{{ strftime_now('%Y') }}{% endfor %}{{ date_string }}"""


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  """One token a byte, and ChatML's two; <s> begins a text."""
  path = tmp_path_factory.mktemp('bytes') / 'tokenizer.json'
  special = ['<s>', '</s>', '<|im_start|>', '<|im_end|>']
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  core = tokenizers.Tokenizer(models.BPE(
      {c: i for i, c in enumerate(special + alphabet)}, []))
  core.add_special_tokens(special)
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  core.post_processor = processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 0)])
  core.save(str(path))
  (path.parent / 'chat_template.jinja').write_text(CHATML)
  return load_tokenizer(path)


def spoken(tokenizer, arrays, row=0):
  return tokenizer.decode(
      arrays['ids'][row][arrays['weights'][row] > 0], special=True)


@pytest.fixture(scope='module')
def theirs(tokenizer):
  """Rendering by transformers."""
  transformers = pytest.importorskip('transformers')
  fast = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer.core, **NAMES)
  return lambda messages, template, **options: fast.apply_chat_template(
      messages, chat_template=template, tokenize=False, **options)


@pytest.mark.parametrize('template', [CHATML, INSTRUCT, SHORTENS, TOOLS])
@pytest.mark.parametrize('count', [2, 5])
@pytest.mark.parametrize('answer_next', [False, True])
def test_renders_as_transformers_does(theirs, template, count, answer_next):
  want = theirs(CHAT[:count], template, add_generation_prompt=answer_next,
                date_string='May')
  assert chat.render(CHAT[:count], template, NAMES, answer_next,
                     date_string='May') == want


def test_answers_are_what_rendering_one_more_message_adds():
  said, spans = chat.answers(CHAT, CHATML, NAMES)
  assert [said[a:b] for a, b in spans] == [
      'Hello!<|im_end|>\n', 'Ciao\n<|im_end|>\n']
  said, spans = chat.answers(CHAT, INSTRUCT, NAMES)
  assert [said[a:b] for a, b in spans] == [' Hello!</s>', ' Ciao</s>']


def test_generation_blocks_where_prefixes_do_not_agree():
  said, spans = chat.answers(CHAT, SHORTENS, NAMES)
  assert [said[a:b] for a, b in spans] == ['H#', 'Ciao\n#']


def test_generation_blocks_mark_what_transformers_marks(tokenizer):
  transformers = pytest.importorskip('transformers')
  fast = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer.core, **NAMES)
  want = fast.apply_chat_template(
      CHAT, chat_template=SHORTENS, return_dict=True,
      return_assistant_tokens_mask=True)
  ours, _ = chat.encode_messages(
      [dict(messages=CHAT)], tokenizer, 200, SHORTENS)
  n = len(want['input_ids'])
  np.testing.assert_array_equal(ours['ids'][0, :n], want['input_ids'])
  np.testing.assert_array_equal(
      ours['weights'][0, :n], want['assistant_masks'])
  assert ours['mask'].sum() == n


def test_loss_on_answers_alone_with_the_checkpoints_template(tokenizer):
  arrays, report = chat.encode_messages(
      [dict(messages=CHAT), dict(messages=CHAT[1:3])], tokenizer, 200)
  said, _ = chat.answers(CHAT, CHATML)
  # The template begins the text: no <s>.
  assert arrays['ids'][0, 0] == 2
  assert tokenizer.decode(
      arrays['ids'][0][arrays['mask'][0]], special=True) == said
  assert spoken(tokenizer, arrays) == 'Hello!<|im_end|>\nCiao\n<|im_end|>\n'
  assert spoken(tokenizer, arrays, 1) == 'Hello!<|im_end|>\n'
  assert report.examples == 2 and report.truncated == report.dropped == 0
  assert arrays['weights'].dtype == np.float32


@pytest.mark.parametrize('name', chat.TEMPLATES)
def test_a_chat_of_one_question_is_its_prompt(tokenizer, name):
  source, target = 'What is 1 {%?', ' Two'
  chats, _ = chat.encode_messages([dict(messages=[
      dict(role='user', content=source),
      dict(role='assistant', content=target)])], tokenizer, 200, name)
  plain, _ = text.encode_seq2seq(
      [dict(source=source, target=target)], tokenizer, 200, prompt=name)
  assert chats['ids'][0, 0] == tokenizer.bos
  for key in ('ids', 'mask', 'weights'):
    np.testing.assert_array_equal(chats[key], plain[key])


def test_built_in_templates_take_several_turns():
  said, spans = chat.answers(CHAT, chat.TEMPLATES['alpaca'], NAMES)
  assert said.startswith('Be brief.\n\n### Instruction:\nHi <b>\n\n### Resp')
  assert said.count('### Instruction:') == 2
  assert [said[a:b] for a, b in spans] == ['Hello!</s>', 'Ciao\n</s>']
  assert chat.render(CHAT[1:3], chat.TEMPLATES['plain']) == 'Hi <b>\nHello!\n'


def test_chats_whose_answer_is_cut_off_are_dropped(tokenizer):
  examples = [dict(messages=[dict(role='user', content='x' * n),
                             dict(role='assistant', content='yes')])
              for n in (3, 40, 6)]
  arrays, report = chat.encode_messages(examples, tokenizer, 10, 'plain')
  assert spoken(tokenizer, arrays) == 'yes</s>'
  assert spoken(tokenizer, arrays, 1) == 'ye'
  assert arrays['ids'].shape == (2, 10)
  assert report == text.Report(3, truncated=2, longest=46, dropped=1)
  with pytest.raises(ValueError, match='none of the 1 conversations .* 46'):
    chat.encode_messages(examples[1:2], tokenizer, 10, 'plain')


@pytest.mark.parametrize('messages, template, words', [
    (CHAT, SHORTENS.replace('{% generation %}', '').replace(
        '{% endgeneration %}', ''), 'answers cannot be told'),
    (CHAT[:2], CHATML, 'no message of the assistant'),
    (CHAT[2:], INSTRUCT, 'refuses: roles must alternate'),
    (CHAT, '{% if %}', 'refuses'),
    (CHAT, '{{ "".__class__.__mro__[1] }}', 'refuses: access'),
    ([dict(role='user')], CHATML, "message {'role': 'user'}; expected"),
    ([dict(role='user', content='\ufdd0')], CHATML, 'is no character')])
def test_chats_that_are_wrong(messages, template, words):
  with pytest.raises(ValueError, match=words):
    chat.answers(messages, template, NAMES)


def test_messages_that_are_wrong(tokenizer):
  with pytest.raises(ValueError, match="'alpacas'; did you mean 'alpaca'"):
    chat.encode_messages([dict(messages=CHAT)], tokenizer, 99, 'alpacas')
  with pytest.raises(ValueError, match='example 1: no message of the assis'):
    chat.encode_messages(
        [dict(messages=CHAT), dict(messages=CHAT[:2])], tokenizer, 99)
  with pytest.raises(ValueError, match='has no chat template; choose one of'):
    chat.encode_messages(
        [dict(messages=CHAT)], tokenizer._replace(template=None), 99)
