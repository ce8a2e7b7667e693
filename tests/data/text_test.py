"""Text to arrays, with tokenizers made here and the checkpoints' own."""

import json
import os
import pathlib

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors

from peftjax.data import text
from peftjax.data.tokenizer import check_fits
from peftjax.data.tokenizer import load_tokenizer

DATA = pathlib.Path(os.environ.get(
    'PEFTJAX_DATA', pathlib.Path(__file__).parents[3] / 'shared' / 'data'))
CHECKPOINTS = DATA / 'checkpoints'
PIECES = ('[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on mat ##s ##ter a b c d '
          'ber ##lin paris').split()


def save_wordpiece(folder, **config):
  """A WordPiece folder whose tokenizer.json truncates and pads to 4."""
  core = tokenizers.Tokenizer(models.WordPiece(
      {p: i for i, p in enumerate(PIECES)}, unk_token='[UNK]'))
  core.add_special_tokens(PIECES[:5])
  core.pre_tokenizer = pre_tokenizers.Whitespace()
  core.post_processor = processors.TemplateProcessing(
      single='[CLS] $A [SEP]', pair='[CLS] $A [SEP] $B:1 [SEP]:1',
      special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
  core.enable_truncation(4)
  core.enable_padding(length=4)
  core.save(str(folder / 'tokenizer.json'))
  if config:
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


def save_bytes(folder, **config):
  """A byte-level folder: one token a byte, as GPT-2 but for merges."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {c: i for i, c in enumerate(alphabet + ['<|endoftext|>'])}
  core = tokenizers.Tokenizer(models.BPE(vocab, []))
  core.add_special_tokens(['<|endoftext|>'])
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  core.post_processor = processors.ByteLevel()
  core.save(str(folder / 'tokenizer.json'))
  (folder / 'config.json').write_text(json.dumps(
      dict(bos_token_id=256, eos_token_id=256, **config)))
  return folder


@pytest.fixture(scope='module')
def wordpiece(tmp_path_factory):
  return load_tokenizer(save_wordpiece(tmp_path_factory.mktemp('wordpiece')))


@pytest.fixture(scope='module')
def gpt(tmp_path_factory):
  return load_tokenizer(save_bytes(tmp_path_factory.mktemp('bytes')))


def pieces(tokenizer, ids, mask):
  return [tokenizer.core.id_to_token(i) for i in ids[mask]]


def spoken(tokenizer, arrays, row, name='ids', weights='weights'):
  """Text of the tokens of one row that are trained on."""
  return tokenizer.decode(
      arrays[name][row][arrays[weights][row] > 0], special=True)


# --------------------------------------------------------------- tokenizers


def test_a_tokenizer_neither_truncates_nor_pads(wordpiece):
  ids, short = wordpiece.encode(['the cat sat on the mat', 'a'])
  assert len(ids) == 8 and len(short) == 3
  assert wordpiece.decode(ids).split() == 'the cat sat on the mat'.split()


def test_special_ids_from_well_known_names(wordpiece):
  assert (wordpiece.pad, wordpiece.unk, wordpiece.cls, wordpiece.sep,
          wordpiece.mask) == (0, 1, 2, 3, 4)
  assert wordpiece.bos is None and wordpiece.eos is None
  assert wordpiece.vocab == len(PIECES)


def test_special_ids_from_the_config(tmp_path):
  save_wordpiece(tmp_path, pad_token=dict(content='[MASK]'), bos_token='[CLS]')
  tokenizer = load_tokenizer(tmp_path)
  assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (4, 2, None)
  # The file itself takes the files beside it along.
  beside = load_tokenizer(tmp_path / 'tokenizer.json')
  assert beside[1:] == tokenizer[1:]


def test_special_ids_from_a_special_tokens_map(tmp_path):
  save_wordpiece(tmp_path)
  (tmp_path / 'special_tokens_map.json').write_text('{"eos_token": "[SEP]"}')
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.eos == 3
  assert tokenizer.pad == 3  # no padding token is named: eos


def test_texts_begin_and_end_as_tokenizer_json_says(tmp_path):
  transformers = pytest.importorskip('transformers')
  save_wordpiece(tmp_path, tokenizer_class='PreTrainedTokenizerFast',
                 bos_token='[CLS]', eos_token='[MASK]', pad_token='[PAD]',
                 add_bos_token=False, add_eos_token=True)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  want = theirs(['the cat'], truncation=False, padding=False)['input_ids']
  assert load_tokenizer(tmp_path).encode(['the cat']) == want == [[2, 5, 6, 3]]


def test_ids_of_config_json_where_no_name_is_given(gpt):
  assert (gpt.bos, gpt.eos, gpt.pad, gpt.vocab) == (256, 256, 256, 257)
  assert gpt.decode(gpt.encode(['Größe 1'])[0]) == 'Größe 1'


def test_a_tokenizer_without_any_special_token_pads_with_0(tmp_path):
  file = tmp_path / 'words.json'
  core = tokenizers.Tokenizer(models.WordLevel({'a': 0, 'b': 1}, 'a'))
  core.save(str(file))
  assert load_tokenizer(file).pad == 0


@pytest.mark.parametrize('make, error, words', [
    (lambda f: f / 'none', FileNotFoundError, 'holds: nothing'),
    (lambda f: (f / 'tokenizer.model').write_text('x') and f,
     FileNotFoundError, r'holds: tokenizer\.model'),
    (lambda f: (f / 'tokenizer.json').write_text('{') and f, ValueError,
     'not JSON'),
    (lambda f: (f / 'tokenizer.json').write_text('[1]') and f, ValueError,
     'holds a list'),
    (lambda f: (f / 'tokenizer.json').write_text('{"model": 3}') and f,
     ValueError, 'is not a tokenizer'),
    (lambda f: save_wordpiece(f, pad_token='<none>'), ValueError,
     "pad_token '<none>' is not in the vocabulary")])
def test_files_that_are_no_tokenizer(tmp_path, make, error, words):
  with pytest.raises(error, match=words):
    load_tokenizer(make(tmp_path))


def test_check_fits(wordpiece):
  check_fits(wordpiece, len(PIECES), 8, length=8)
  check_fits(wordpiece, 100, None, length=10_000)
  with pytest.raises(ValueError, match='ids up to 18, the embedding table 18'):
    check_fits(wordpiece, 18)
  with pytest.raises(ValueError, match='length 9 .* 8 positions'):
    check_fits(wordpiece, 19, 8, length=9)


# ----------------------------------------------------------- classification


def test_classification_pads_masks_and_reports(wordpiece):
  examples = [dict(text='the cat', label=1), dict(text='a b c d a', label=0)]
  arrays, report = text.encode_classification(
      examples, wordpiece, 5, classes=2)
  assert set(arrays) == {'ids', 'mask', 'label'}
  np.testing.assert_array_equal(
      arrays['ids'], [[2, 5, 6, 3, 0], [2, 12, 13, 14, 3]])
  np.testing.assert_array_equal(
      arrays['mask'], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
  assert arrays['ids'].dtype == np.int32 and arrays['mask'].dtype == bool
  assert arrays['label'].dtype == np.int32
  assert report == text.Report(examples=2, truncated=1, longest=7)


def test_pairs_have_types_and_lose_the_longer_text_first(wordpiece):
  examples = [dict(text='a b c d a b', text_b='the cat'),
              dict(text='a', text_b='the cat sat on')]
  arrays, report = text.encode_classification(examples, wordpiece, 7)
  assert 'label' not in arrays
  assert pieces(wordpiece, arrays['ids'][0], arrays['mask'][0]) == (
      '[CLS] a b [SEP] the cat [SEP]'.split())
  assert pieces(wordpiece, arrays['ids'][1], arrays['mask'][1]) == (
      '[CLS] a [SEP] the cat sat [SEP]'.split())
  np.testing.assert_array_equal(
      arrays['types'], [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
  assert report == text.Report(2, 2, 11)


def test_regression_labels_are_floats(wordpiece):
  arrays, _ = text.encode_classification(
      [dict(text='a', label=1.5), dict(text='b', label=2)], wordpiece, 4)
  assert arrays['label'].dtype == np.float32
  np.testing.assert_array_equal(arrays['label'], [1.5, 2])


@pytest.mark.parametrize('examples, words', [
    ([], 'no examples'),
    ([dict(text='a'), dict(texts='b')], "example 1 has no 'text'.*'texts'"),
    ([dict(text=3)], "'text' of example 0 is 3; expected text"),
    ([dict(text='a', text_b='b'), dict(text='b')], "1 has no 'text_b'"),
    ([dict(text='a', label=0), dict(text='b')], 'label None of example 1'),
    ([dict(text='a', label='x')], "label 'x' of example 0"),
    ([dict(text='a', label=float('nan'))], 'label nan of example 0'),
    ([dict(text='a', label=0.5)], 'label 0.5 .* outside the label set 0 .. 1'),
    ([dict(text='a', label=5)], 'label 5 .* 0 .. 1; nearest: 1')])
def test_examples_that_are_wrong(wordpiece, examples, words):
  with pytest.raises(ValueError, match=words):
    text.encode_classification(examples, wordpiece, 8, classes=2)


def test_a_length_that_holds_no_text(wordpiece):
  text.encode_classification([dict(text='a')], wordpiece, 3)
  with pytest.raises(ValueError, match='length 2; choose 3 or more'):
    text.encode_classification([dict(text='a')], wordpiece, 2)


# ------------------------------------------------------------------ tagging


def test_tagging_labels_the_first_token_of_a_word(wordpiece):
  examples = [dict(tokens=['cats', 'sat', 'berlin'], tags=['A', 'O', 'B'])]
  arrays, report = text.encode_tagging(examples, wordpiece, 8, 'OAB')
  assert pieces(wordpiece, arrays['ids'][0], arrays['mask'][0]) == (
      '[CLS] cat ##s sat ber ##lin [SEP]'.split())
  np.testing.assert_array_equal(
      arrays['labels'], [[-1, 1, -1, 0, 2, -1, -1, -1]])
  assert report == text.Report(1, 0, 7, unlabelled=0)


def test_words_cut_off_are_counted(wordpiece):
  examples = [dict(tokens=['cats', 'sat', 'berlin'], tags=['A', 'O', 'B'])]
  arrays, report = text.encode_tagging(examples, wordpiece, 5, 'OAB')
  np.testing.assert_array_equal(arrays['ids'], [[2, 6, 10, 7, 3]])
  np.testing.assert_array_equal(arrays['labels'], [[-1, 1, -1, 0, -1]])
  assert report == text.Report(1, 1, 7, unlabelled=1)
  # A word that the tokenizer cleans away carries no label either.
  _, report = text.encode_tagging(
      [dict(tokens=['cat', ' ', 'sat'], tags='OAB')
       | dict(tags=['O', 'A', 'B'])], wordpiece, 8, 'OAB')
  assert report == text.Report(1, 0, 4, unlabelled=1)


def test_byte_level_words_keep_the_space_before_them(gpt):
  arrays, _ = text.encode_tagging(
      [dict(tokens=['ab', 'c'], tags=['O', 'A'])], gpt, 8, ['O', 'A'])
  assert gpt.decode(arrays['ids'][0][arrays['mask'][0]]) == ' ab c'
  np.testing.assert_array_equal(
      arrays['labels'], [[0, -1, -1, 1, -1, -1, -1, -1]])


@pytest.mark.parametrize('example, words', [
    (dict(tokens=['a'], tags=['X']), "tag 'X'; choose from A, O"),
    (dict(tokens=['a', 'b'], tags=['O']), '2 words and 1 tags'),
    (dict(tokens='a b', tags=['O']), "'tokens' .* expected a list")])
def test_tagging_that_is_wrong(wordpiece, example, words):
  with pytest.raises(ValueError, match=words):
    text.encode_tagging([example], wordpiece, 8, ['O', 'A'])


# ---------------------------------------------------------- language models


def test_chunks_predict_every_token_once(gpt):
  texts = ['abcdefg', 'hi', 'klmnopq']
  arrays, report = text.encode_lm([dict(text=t) for t in texts], gpt, 5)
  stream = [t for i in gpt.encode(texts) for t in i + [256]]
  predicted = arrays['ids'][arrays['weights'] > 0]
  np.testing.assert_array_equal(predicted, stream[1:])
  np.testing.assert_array_equal(arrays['weights'][:, 0], 0)
  # Every row begins with the token before its first predicted one.
  np.testing.assert_array_equal(arrays['ids'][1:, 0], arrays['ids'][:-1, -1])
  assert arrays['weights'].dtype == np.float32
  assert report == text.Report(3, 0, 8)


def test_chunks_that_end_with_a_row_leave_no_empty_one(gpt):
  arrays, _ = text.encode_lm([dict(text='abcdefgh')], gpt, 5)
  assert arrays['ids'].shape == (2, 5) and arrays['mask'].all()


def test_one_text_a_row(gpt):
  arrays, report = text.encode_lm(
      [dict(text='abc'), dict(text='abcdef')], gpt, 5, rows='texts')
  assert spoken(gpt, arrays, 0) == 'bc<|endoftext|>'
  assert spoken(gpt, arrays, 1) == 'bcde'
  np.testing.assert_array_equal(arrays['mask'].sum(1), [4, 5])
  assert report == text.Report(2, 1, 7)
  with pytest.raises(ValueError, match="rows 'text'; did you mean 'texts'"):
    text.encode_lm([dict(text='abc')], gpt, 5, rows='text')


def test_loss_only_on_the_answer(gpt):
  examples = [dict(source='ask', target='yes'), dict(source='', target='n')]
  arrays, report = text.encode_seq2seq(examples, gpt, 10)
  assert gpt.decode(arrays['ids'][0][arrays['mask'][0]]) == 'ask\nyes'
  assert spoken(gpt, arrays, 0) == 'yes<|endoftext|>'
  assert spoken(gpt, arrays, 1) == 'n<|endoftext|>'
  assert report == text.Report(2, 0, 8)
  alpaca, _ = text.encode_seq2seq(examples, gpt, 300, prompt='alpaca')
  assert spoken(gpt, alpaca, 0) == 'yes<|endoftext|>'
  assert gpt.decode(alpaca['ids'][0]).count('### Instruction:\nask\n') == 1


def test_a_long_prompt_loses_its_beginning(gpt):
  arrays, report = text.encode_seq2seq(
      [dict(source='0123456789', target='yes')], gpt, 8)
  assert gpt.decode(arrays['ids'][0]) == '789\nyes'
  assert spoken(gpt, arrays, 0) == 'yes<|endoftext|>'
  assert report == text.Report(1, 1, 15)


def test_a_long_answer_keeps_half_of_the_row_and_has_no_end(gpt):
  arrays, report = text.encode_seq2seq(
      [dict(source='0123456789', target='abcdefghi')], gpt, 8)
  assert gpt.decode(arrays['ids'][0], special=True) == '789\nabcd'
  assert spoken(gpt, arrays, 0) == 'abcd'
  assert report == text.Report(1, 1, 21)


def test_the_first_token_is_never_predicted(gpt):
  arrays, _ = text.encode_seq2seq(
      [dict(source='', target='yes')], gpt, 8, prompt='{source}')
  assert spoken(gpt, arrays, 0) == 'es<|endoftext|>'


def test_prompts_are_what_training_put_before_the_answer(gpt):
  examples = [dict(source='ask', target='yes'),
              dict(source='0123456789', target='n')]
  arrays, report = text.encode_prompts(examples, gpt, 8)
  assert gpt.decode(arrays['ids'][0][arrays['mask'][0]]) == 'ask\n'
  assert gpt.decode(arrays['ids'][1][arrays['mask'][1]]) == '3456789\n'
  assert report == text.Report(2, 1, 11)


def test_encoder_decoder_arrays(wordpiece):
  eos = wordpiece._replace(eos=3)  # which the tokenizer itself appends
  examples = [dict(source='the cat', target='sat'),
              dict(source='a', target='a b c')]
  arrays, report = text.encode_seq2seq(
      examples, eos, 5, layout='encdec', target_length=4, start=1)
  np.testing.assert_array_equal(
      arrays['ids'], [[2, 5, 6, 3, 0], [2, 12, 3, 0, 0]])
  np.testing.assert_array_equal(
      arrays['targets_out'], [[2, 7, 3, 0], [2, 12, 13, 14]])
  np.testing.assert_array_equal(
      arrays['targets_in'], [[1, 2, 7, 3], [1, 2, 12, 13]])
  np.testing.assert_array_equal(
      arrays['target_weights'], [[1, 1, 1, 0], [1, 1, 1, 1]])
  assert report == text.Report(2, 1, 5)


@pytest.mark.parametrize('options, words', [
    (dict(layout='encoder'), "layout 'encoder'; did you mean"),
    (dict(prompt='plane'), "prompt 'plane'; did you mean 'plain'"),
    (dict(length=1), 'length 1; choose 2 or more')])
def test_seq2seq_options_that_are_wrong(gpt, options, words):
  with pytest.raises(ValueError, match=words):
    text.encode_seq2seq([dict(source='a', target='b')], gpt,
                        **(dict(length=8) | options))


def test_an_answer_without_tokens(gpt):
  with pytest.raises(ValueError, match="'target' of example 0 has no tokens"):
    text.encode_seq2seq([dict(source='a', target='')], gpt._replace(eos=None),
                        8)


def test_pairs_for_retrieval(wordpiece):
  arrays, report = text.encode_pairs(
      [dict(text='the cat', text_b='a b c d')], wordpiece, 5)
  np.testing.assert_array_equal(arrays['ids'], [[2, 5, 6, 3, 0]])
  np.testing.assert_array_equal(arrays['ids_b'], [[2, 12, 13, 14, 3]])
  np.testing.assert_array_equal(arrays['mask_b'].sum(1), [5])
  assert report == text.Report(2, 1, 6)


def test_cutting_is_logged(wordpiece, caplog):
  with caplog.at_level('WARNING', logger='absl'):
    text.encode_classification([dict(text='a')], wordpiece, 4)
    assert not caplog.messages
    text.encode_classification([dict(text='a b c')], wordpiece, 4)
  assert caplog.messages == [
      'classification: 1 of 1 examples cut to 4 tokens, the longest had 5']


# -------------------------------------------------------------- checkpoints


def checkpoint(name):
  if not (CHECKPOINTS / name).exists():
    pytest.skip(f'{CHECKPOINTS / name} is not there')
  return CHECKPOINTS / name


@pytest.mark.parametrize('length', [64, 12])
def test_minilm_encodes_as_transformers_does(length):
  transformers = pytest.importorskip('transformers')
  path = checkpoint('all-MiniLM-L6-v2')
  first = ['A plane takes off.', 'Ünbelievably naïve! 世界', '', 'x ' * 40]
  second = ['An air plane ' * 9, 'the other', 'y', 'short']
  theirs = transformers.AutoTokenizer.from_pretrained(path)(
      first, second, padding='max_length', truncation=True, max_length=length,
      return_tensors='np')
  ours, report = text.encode_classification(
      [dict(text=a, text_b=b) for a, b in zip(first, second)],
      load_tokenizer(path), length)
  np.testing.assert_array_equal(ours['ids'], theirs['input_ids'])
  np.testing.assert_array_equal(ours['types'], theirs['token_type_ids'])
  np.testing.assert_array_equal(ours['mask'], theirs['attention_mask'])
  assert report.truncated == (0 if length == 64 else 3)


def test_stories_tokenizer_merges_as_llama2c():
  path = checkpoint('stories260k_tokenizer.json')
  data = json.loads(path.read_text())
  pieces = [p.encode('latin-1') for p in data['pieces']]
  place = {p: i for i, p in enumerate(pieces)}
  tokenizer = load_tokenizer(path)
  assert (tokenizer.vocab, tokenizer.bos, tokenizer.eos) == (512, 1, 2)

  def merged(line):
    """run.c: merge the pair of the best score until there is none."""
    ids = [1]
    for c in ' ' + line:
      b = c.encode()
      ids += [place[b]] if b in place else [v + 3 for v in b]
    while True:
      found = [(data['scores'][j], -i, j) for i in range(len(ids) - 1)
               if (j := place.get(pieces[ids[i]] + pieces[ids[i + 1]]))]
      if not found:
        return ids
      _, i, j = max(found)
      ids[-i:-i + 2] = [j]

  for line in ('Once upon a time, there was a little girl named Lily.',
               'Sara said: "Do you believe?"  Two spaces, é and 世界!\n'):
    ids = tokenizer.encode([line])[0]
    assert ids == merged(line)
    assert tokenizer.decode(ids) == line
