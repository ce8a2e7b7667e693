"""What results are measured with, on numpy arrays and strings.

Every measure is a fraction, 1 for a perfect result (correlations go from -1 to
1), but for those in `PLAIN`. What scikit-learn, scipy, sacrebleu and
rouge-score have is theirs; entities, NIST and calibration are written out here.
"""

import collections
import math
import re
import warnings

import numpy as np

from peftjax.method import nearest

# Not fractions: tables show them as they are, the others times 100.
PLAIN = ('loss', 'mse', 'nist', 'perplexity')
# The smaller the better.
LOWER = ('ece', 'loss', 'mse', 'perplexity')


def better(name):
  """1 for a measure that is to be large, -1 for one that is to be small."""
  return -1 if name in LOWER else 1


def scale(name):
  """What a table multiplies a measure by: 100, or 1 for those in `PLAIN`."""
  return 1 if name in PLAIN else 100


def _pair(a, b, what):
  a, b = np.asarray(a), np.asarray(b)
  if a.shape != b.shape or not a.size:
    raise ValueError(f'{what}: shapes {a.shape} and {b.shape}; expected two '
                     'equal ones with at least one entry')
  return a, b


# -------------------------------------------------------------- classification
def accuracy(labels, predictions):
  """Share of equal entries of two arrays of one shape."""
  labels, predictions = _pair(labels, predictions, 'accuracy')
  return float(np.mean(labels == predictions))


def f1(labels, predictions, average='binary'):
  """F1, the harmonic mean of precision and recall; 0 where both are 0.

  average: 'binary', of class 1; 'macro', the mean over the classes that occur
    in either; 'micro'.
  """
  from sklearn import metrics  # slow to import
  labels, predictions = _pair(labels, predictions, 'f1')
  return float(metrics.f1_score(labels, predictions, average=average,
                                zero_division=0.0))


def matthews(labels, predictions):
  """Matthews correlation coefficient, 0 where one side is constant."""
  from sklearn import metrics
  labels, predictions = _pair(labels, predictions, 'matthews')
  return float(metrics.matthews_corrcoef(labels, predictions))


def calibration_error(confidence, right, bins=15):
  """Expected calibration error of first choices.

  sum over bins of |mean confidence - accuracy| times the bin's share; bins of
  equal width over (0, 1].

  Args:
    confidence: [N], probability of the class that was chosen.
    right: [N], whether it was right.
    bins: Number of bins.

  Source: "On Calibration of Modern Neural Networks" (arXiv 1706.04599).
  """
  confidence, right = _pair(confidence, right, 'calibration_error')
  if not np.isfinite(confidence).all():
    return math.nan
  place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
  gaps = np.bincount(place, np.asarray(confidence, float) - right, bins)
  return float(np.abs(gaps).sum() / len(confidence))


# ------------------------------------------------------------------ regression
def pearson(labels, predictions):
  """Pearson correlation; 0 where a side is constant, NaN where one is NaN."""
  return _correlation(labels, predictions, 'pearsonr')


def spearman(labels, predictions):
  """Spearman rank correlation; ties get their mean rank; else as `pearson`."""
  return _correlation(labels, predictions, 'spearmanr')


def _correlation(labels, predictions, name):
  from scipy import stats
  labels, predictions = _pair(labels, predictions, name)
  if not (np.isfinite(labels).all() and np.isfinite(predictions).all()):
    return math.nan
  if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
    return 0.0
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # inputs that are nearly constant
    return float(getattr(stats, name)(labels, predictions).statistic)


# --------------------------------------------------------------------- tagging
def entities(tags):
  """{(type, first, last)} of BIO tags, read as conlleval reads them.

  An entity starts at B-x, or at I-x after O or after another type; it ends
  before O, B, or another type.

  Raises:
    ValueError: a tag that is neither 'O' nor 'B-x' nor 'I-x'.
  """
  found, kind, start = set(), None, 0
  for i, tag in enumerate([*tags, 'O']):
    mark, _, now = tag.partition('-')
    if tag != 'O' and (mark not in ('B', 'I') or not now):
      raise ValueError(f"tag {tag!r}: expected 'O', 'B-type' or 'I-type'")
    now = now or None
    if kind is not None and (mark != 'I' or now != kind):
      found.add((kind, start, i - 1))
      kind = None
    if now is not None and kind is None:
      kind, start = now, i
  return found


def entity_f1(labels, predictions):
  """Precision, recall and F1 of whole entities over all sentences.

  Args:
    labels, predictions: Lists of sentences, each a list of BIO tags.

  Returns:
    dict(precision, recall, f1); 0 where nothing is there to divide by.
  """
  right = said = there = 0
  for true, guess in zip(labels, predictions, strict=True):
    if len(true) != len(guess):
      raise ValueError(
          f'entity_f1: {len(true)} tags and {len(guess)} predicted')
    a, b = entities(true), entities(guess)
    right, said, there = right + len(a & b), said + len(b), there + len(a)
  return dict(precision=right / said if said else 0.0,
              recall=right / there if there else 0.0,
              f1=2 * right / (said + there) if said + there else 0.0)


# ------------------------------------------------------------------- retrieval
def recall_at(scores, k=1):
  """Share of rows whose own column is among the k highest: scores [N, N].

  A column that ties with the own one counts as higher.
  """
  scores = np.asarray(scores)
  own = np.diagonal(scores)[:, None]
  above = (scores >= own).sum(1) - 1
  return float(np.mean((above < k) & np.isfinite(own[:, 0])))


# ------------------------------------------------------------------- generation
def perplexity(loss):
  """exp of a mean of nats; infinity where that is too large."""
  return math.exp(loss) if loss < 700 else (
      math.nan if math.isnan(loss) else math.inf)


def _texts(predictions, references, what):
  if not predictions or len(predictions) != len(references):
    raise ValueError(f'{what}: {len(predictions)} texts and {len(references)} '
                     'references; expected as many, and at least one')
  refs = [[r] if isinstance(r, str) else list(r) for r in references]
  if not all(refs):
    raise ValueError(f'{what}: text {refs.index([])} has no reference')
  return refs


def bleu(predictions, references):
  """Corpus BLEU of sacrebleu (13a tokens, exponential smoothing), 0 to 1.

  references: for each prediction a string or a list of them.
  """
  import sacrebleu
  refs = _texts(predictions, references, 'bleu')
  most = max(map(len, refs))
  streams = [[r[i] if i < len(r) else None for r in refs] for i in range(most)]
  return sacrebleu.corpus_bleu(predictions, streams).score / 100


def nist(predictions, references, n=5):
  """NIST score as mteval computes it, of 13a tokens; not bounded.

  sum over orders of (information of matched n-grams / n-grams said), times
  exp(beta log^2 min(1, said / mean reference length)), where an n-gram's
  information is log2(count of its first n-1 words / its count) in all
  references and beta makes the factor 1/2 at 2/3 of the length.

  Source: Doddington, "Automatic Evaluation of Machine Translation Quality Using
  N-gram Co-Occurrence Statistics" (HLT 2002).
  """
  from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
  cut = Tokenizer13a()
  words = lambda text: cut(text).split()
  refs = [[words(r) for r in rs]
          for rs in _texts(predictions, references, 'nist')]
  counts = collections.Counter()
  for rs in refs:
    for r in rs:
      counts.update(_ngrams(r, n))
  total = sum(len(r) for rs in refs for r in rs)
  gain, said = [0.0] * n, [0] * n
  length = mean = 0.0
  for text, rs in zip(predictions, refs):
    mine = _ngrams(words(text), n)
    most = collections.Counter()
    for r in rs:
      most |= _ngrams(r, n)
    for gram, count in mine.items():
      said[len(gram) - 1] += count
      if gram in most:
        before = counts[gram[:-1]] if len(gram) > 1 else total
        gain[len(gram) - 1] += min(count, most[gram]) * math.log2(
            before / counts[gram])
    length += len(words(text))
    mean += sum(map(len, rs)) / len(rs)
  if not length:
    return 0.0
  beta = math.log(0.5) / math.log(1.5) ** 2
  penalty = math.exp(beta * math.log(min(1.0, length / mean)) ** 2)
  return penalty * sum(g / s for g, s in zip(gain, said) if s)


def _ngrams(words, n):
  return collections.Counter(
      tuple(words[i:i + k]) for k in range(1, n + 1)
      for i in range(len(words) - k + 1))


def rouge_l(predictions, references):
  """Mean ROUGE-L F-measure of rouge-score, the best reference of each text."""
  from rouge_score import rouge_scorer
  scorer = rouge_scorer.RougeScorer(['rougeL'], use_stemmer=False)
  refs = _texts(predictions, references, 'rouge_l')
  return float(np.mean([scorer.score_multi(rs, p)['rougeL'].fmeasure
                        for p, rs in zip(predictions, refs)]))


# Kinds of short answers.
ANSWERS = ('text', 'number', 'line', 'last', 'option')
_NUMBER = re.compile(r'-?\d[\d,]*(?:\.\d+)?|-?\.\d+')


def answer(text, kind='text'):
  """The short answer in a text, in a form that can be compared.

  kind: 'text', all of it, without case, articles, punctuation at its ends and
    double spaces; 'number', the last number; 'line', the first line, as 'text';
    'last', the last word, as 'text'; 'option', the first letter A to E that
    stands alone.

  Returns:
    A string; '' where there is none.
  """
  if kind not in ANSWERS:
    raise ValueError(
        f'unknown kind of answer {kind!r}{nearest(kind, ANSWERS)}')
  if kind == 'number':
    found = _NUMBER.findall(text)
    return f'{float(found[-1].replace(",", "")):.10g}' if found else ''
  if kind == 'option':
    found = re.search(r'\b([A-E])\b', text)
    return found[1] if found else ''
  if kind == 'line':
    text = text.strip().split('\n', 1)[0]
  if kind == 'last':
    text = (text.split() or [''])[-1]
  words = text.lower().strip(' \t\n.,;:!?"\'()[]').split()
  return ' '.join(w for w in words if w not in ('a', 'an', 'the'))


def exact_match(predictions, references, kind='text'):
  """Share of texts whose `answer` equals that of one of their references."""
  refs = _texts(predictions, references, 'exact_match')
  return float(np.mean([
      bool(answer(p, kind)) and answer(p, kind) in {answer(r, kind) for r in rs}
      for p, rs in zip(predictions, refs)]))
