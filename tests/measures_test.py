"""Measures against numbers by hand and against other libraries."""

import math
import random

import numpy as np
import pytest

from peftjax import measures


# -------------------------------------------------------------- classification
LABELS = np.array([1, 1, 1, 0, 0, 0, 0, 1])
GUESS = np.array([1, 1, 0, 0, 0, 1, 0, 0])  # tp 2, fp 1, fn 2, tn 3


def test_classification_by_hand():
  assert measures.accuracy(LABELS, GUESS) == 5 / 8
  one = 2 * 2 / (2 * 2 + 1 + 2)
  zero = 2 * 3 / (2 * 3 + 2 + 1)
  assert measures.f1(LABELS, GUESS) == pytest.approx(one)
  assert measures.f1(LABELS, GUESS, 'macro') == pytest.approx((one + zero) / 2)
  phi = (2 * 3 - 1 * 2) / math.sqrt((2 + 1) * (2 + 2) * (3 + 1) * (3 + 2))
  assert measures.matthews(LABELS, GUESS) == pytest.approx(phi)
  assert measures.matthews(LABELS, np.zeros(8, int)) == 0
  assert measures.f1(LABELS, np.zeros(8, int)) == 0


def test_calibration_error_by_hand():
  confidence = np.array([0.95, 0.85, 0.65, 0.55])
  right = np.array([1, 0, 1, 1])
  # Two bins, (0, 0.5] empty: |mean 0.75 - 3/4| = 0; four of width 1/4:
  assert measures.calibration_error(confidence, right, 1) == pytest.approx(0)
  upper = abs((0.95 + 0.85) / 2 - 0.5) * 2 / 4
  lower = abs((0.65 + 0.55) / 2 - 1.0) * 2 / 4
  assert measures.calibration_error(
      confidence, right, 4) == pytest.approx(upper + lower)
  # A bin holds its upper edge, as in the paper.
  assert measures.calibration_error(
      np.array([0.5, 0.6]), np.array([1, 0]), 2) == pytest.approx(
          (0.5 + 0.6) / 2)
  assert math.isnan(measures.calibration_error(
      np.array([np.nan, 0.5]), right[:2]))


# ------------------------------------------------------------------ regression
def test_correlations_by_hand():
  x, y = np.array([1., 2., 3., 4.]), np.array([1., 3., 2., 9.])
  dx, dy = x - 2.5, y - y.mean()
  assert measures.pearson(x, y) == pytest.approx(
      (dx * dy).sum() / math.sqrt((dx ** 2).sum() * (dy ** 2).sum()))
  assert measures.spearman(x, y) == pytest.approx(
      1 - 6 * (0 + 1 + 1 + 0) / (4 * 15))
  # Ties get mean ranks: ranks (1.5, 1.5, 3) against (1, 2, 3).
  assert measures.spearman([1., 2., 3.], [5., 5., 7.]) == pytest.approx(
      1.5 / math.sqrt(2 * 1.5))
  assert measures.pearson(x, np.ones(4)) == 0
  assert math.isnan(measures.spearman(x, [1, 2, np.nan, 3]))


@pytest.mark.parametrize('measure', (
    measures.accuracy, measures.f1, measures.matthews, measures.pearson,
    measures.spearman, measures.calibration_error))
def test_shapes_that_do_not_fit_are_refused(measure):
  with pytest.raises(ValueError, match='expected two equal ones'):
    measure(np.zeros(3), np.zeros(4))
  with pytest.raises(ValueError, match='at least one entry'):
    measure(np.zeros(0), np.zeros(0))


# --------------------------------------------------------------------- tagging
@pytest.mark.parametrize('tags, found', [
    ('O B-A I-A O', {('A', 1, 2)}),
    ('B-A B-A', {('A', 0, 0), ('A', 1, 1)}),
    ('I-A I-A', {('A', 0, 1)}),  # I after nothing starts an entity
    ('O I-A I-B', {('A', 1, 1), ('B', 2, 2)}),  # as does one of another type
    ('B-A I-B I-B', {('A', 0, 0), ('B', 1, 2)}),
    ('B-x-y I-x-y', {('x-y', 0, 1)}),
    ('O O', set())])
def test_entities(tags, found):
  assert measures.entities(tags.split()) == found


def test_entity_f1_by_hand():
  true = [['B-A', 'I-A', 'O', 'B-B'], ['O', 'B-A']]
  guess = [['B-A', 'I-A', 'O', 'O'], ['B-A', 'B-A']]
  found = measures.entity_f1(true, guess)  # 2 right of 3 said, of 3 there
  assert found == dict(precision=2 / 3, recall=2 / 3, f1=pytest.approx(2 / 3))
  assert measures.entity_f1([['O']], [['O']]) == dict(
      precision=0, recall=0, f1=0)
  # A longer entity is another one.
  assert measures.entity_f1([['B-A', 'O']], [['B-A', 'I-A']])['f1'] == 0


def test_entity_f1_of_random_tags_is_seqevals():
  seqeval = pytest.importorskip('seqeval.metrics')
  rng = random.Random(0)
  tags = ['O', 'B-A', 'I-A', 'B-B', 'I-B']
  rows = [[[rng.choice(tags) for _ in range(9)] for _ in range(60)]
          for _ in range(2)]
  found = measures.entity_f1(*rows)
  assert found['precision'] == pytest.approx(seqeval.precision_score(*rows))
  assert found['recall'] == pytest.approx(seqeval.recall_score(*rows))
  assert found['f1'] == pytest.approx(seqeval.f1_score(*rows))
  assert 0.02 < found['f1'] < 0.9


def test_bad_tags_are_refused():
  with pytest.raises(ValueError, match="tag 'S-A'"):
    measures.entities(['S-A'])
  with pytest.raises(ValueError, match='2 tags and 1 predicted'):
    measures.entity_f1([['O', 'O']], [['O']])


# -------------------------------------------------------- retrieval, perplexity
def test_recall_by_hand():
  scores = [[3, 1, 0], [2, 1, 0], [0, 1, 1]]
  assert measures.recall_at(scores, 1) == pytest.approx(1 / 3)  # a tie loses
  assert measures.recall_at(scores, 2) == 1
  assert measures.recall_at([[np.nan]], 1) == 0


def test_perplexity():
  assert measures.perplexity(math.log(8)) == pytest.approx(8)
  assert measures.perplexity(1e4) == math.inf
  assert math.isnan(measures.perplexity(math.nan))


# ------------------------------------------------------------------- generation
def test_bleu_by_hand():
  same = ['the cat sat on the mat now .']
  assert measures.bleu(same, same) == pytest.approx(1)
  # 4 of 5 words, 3 of 4 pairs, 2 of 3, 1 of 2; no shorter than the reference.
  found = measures.bleu(['a b c d x'], [['a b c d e']])
  assert found == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
  # The best of several references, also where others have fewer.
  assert measures.bleu(['a b c d', 'e f g h'], [
      ['x', 'a b c d'], ['e f g h']]) == pytest.approx(1)
  short = measures.bleu(['a b c d'], ['a b c d e f g h'])
  assert short == pytest.approx(math.exp(1 - 8 / 4))


def test_nist_by_hand():
  # Words: a b c once each of 3; no pair is worth more than its first word.
  assert measures.nist(['a b c'], ['a b c']) == pytest.approx(math.log2(3))
  beta = math.log(0.5) / math.log(1.5) ** 2
  penalty = math.exp(beta * math.log(2 / 3) ** 2)
  assert penalty == pytest.approx(0.5)
  assert measures.nist(['a b'], ['a b c']) == pytest.approx(
      0.5 * math.log2(3))
  assert measures.nist([''], ['a']) == 0
  # Clipped at the most that one reference has.
  assert measures.nist(['a a a'], [['a b', 'a c']]) == pytest.approx(
      math.log2(4 / 2) / 3)


def test_nist_is_nltks_with_one_reference():
  nist = pytest.importorskip('nltk.translate.nist_score')
  rng = random.Random(1)
  line = lambda: [rng.choice('abcdef') for _ in range(rng.randint(6, 12))]
  texts, refs = [line() for _ in range(20)], [line() for _ in range(20)]
  theirs = nist.corpus_nist([[r] for r in refs], texts)
  ours = measures.nist([' '.join(t) for t in texts],
                       [' '.join(r) for r in refs])
  assert ours == pytest.approx(theirs, rel=1e-9) and ours > 1


def test_rouge_l_by_hand():
  # Longest common subsequence 'the cat mat': 3 of 4 and of 6 words.
  found = measures.rouge_l(['the cat big mat'], ['the cat sat on the mat'])
  assert found == pytest.approx(2 * 3 / (4 + 6))
  assert measures.rouge_l(['x y'], [['a', 'x y']]) == pytest.approx(1)


@pytest.mark.parametrize('text, kind, answer', [
    ('So 3 + 4 = 7. #### 1,234.50', 'number', '1234.5'),
    ('it is -0.5', 'number', '-0.5'), ('none', 'number', ''),
    ('The  Cat.', 'text', 'cat'), (' "An answer"\nmore', 'line', 'answer'),
    ('the correct answer is true.', 'last', 'true'), ('', 'last', ''),
    ('The answer is (B), not C', 'option', 'B'), ('Because', 'option', '')])
def test_answers(text, kind, answer):
  assert measures.answer(text, kind) == answer


def test_exact_match():
  assert measures.exact_match(
      ['it is 7', 'no 8', 'none'], [['7'], '9', '1'], 'number') == 1 / 3
  # No answer matches nothing, not even another missing one.
  assert measures.exact_match(['none'], ['nothing'], 'number') == 0
  with pytest.raises(ValueError, match="'numbr'.*'number'"):
    measures.exact_match(['1'], ['1'], 'numbr')
  with pytest.raises(ValueError, match='1 texts and 2 references'):
    measures.exact_match(['1'], ['1', '2'])
  with pytest.raises(ValueError, match='text 0 has no reference'):
    measures.bleu(['1'], [[]])


def test_which_way_is_better():
  assert measures.better('perplexity') == -1 and measures.scale('loss') == 1
  assert measures.better('f1') == 1 and measures.scale('bleu') == 100
