"""The scaling law: recovery, the rival, units, critical sizes, intervals."""

import math

import numpy as np
from peftjax.analysis import scaling_law as lib
import pytest

D = np.array([8e3, 2e4, 4e4, 6e4, 9e4, 1e5])
X = dict(model=[1e9, 2e9, 4e9, 8e9, 16e9],
         pretraining=[84e9, 126e9, 167e9, 209e9, 283e9],
         trained=[4., 8, 16, 32, 64, 128])
LAWS = dict(
    multiplicative=dict(
        model=lib.Law(math.log(300), .22, .06, math.log(1.1)),
        pretraining=lib.Law(math.log(9), .08, .06, math.log(1.1)),
        trained=lib.Law(math.log(2), -.003, .06, math.log(1.1))),
    additive=dict(
        model=lib.Law(math.log(90), .2, .3, math.log(1.1), math.log(20)),
        pretraining=lib.Law(math.log(15), .08, .3, math.log(1.1), math.log(20)),
        trained=lib.Law(math.log(2), -.003, .3, math.log(1.1), math.log(20))))


def points(laws, noise=0.0, seed=0):
  """Every X with every D of each factor."""
  rng, out = np.random.default_rng(seed), {}
  for name, law in laws.items():
    x, d = (v.ravel() for v in np.meshgrid(X[name], D, indexing='ij'))
    out[name] = x, d, law(x, d) + noise * rng.normal(size=x.size)
  return out


def numbers(laws):
  return {n: [v for v in law if v is not None] for n, law in laws.items()}


def close(got, want, atol=1e-3):
  assert set(got) == set(want)
  for name, values in numbers(want).items():
    np.testing.assert_allclose(numbers(got)[name], values, atol=atol,
                               err_msg=name)


# -------------------------------------------------------------------- recovery
@pytest.mark.parametrize('form', lib.FORMS)
def test_constants_come_back(form):
  got = lib.fit(points(LAWS[form]), form=form)
  close(got, LAWS[form])
  gaps = lib.deviation(got, points(LAWS[form]))
  assert set(gaps) == {'', 'model', 'pretraining', 'trained'}
  assert max(gaps.values()) < 1e-6


def test_the_law_by_hand():
  one = lib.Law(math.log(3), 0.5, 1.0, math.log(2))
  np.testing.assert_allclose(one(4.0, 6.0), 3 / 2 / 6 + 2)
  two = one._replace(b=math.log(5))
  np.testing.assert_allclose(
      two(np.array([4.0, 9.0]), 10.0), [3 / 2 + 5 / 10 + 2, 3 / 3 + .5 + 2])


def test_the_law_of_data_alone():
  law = lib.Law(math.log(40), 0.0, .3, math.log(1.5))
  got = lib.fit_data(D, law(1, D))
  close(dict(data=got), dict(data=law))
  assert got.alpha == 0


def test_a_bad_point_hardly_moves_the_fit():
  """Huber's loss is linear beyond 0.001, so half of the points decide."""
  p = points(LAWS['multiplicative'])
  p['model'][2][3] += 0.5
  close(lib.fit(p), LAWS['multiplicative'], atol=5e-3)


def test_weak_factors_are_left_out_of_the_joint_step():
  """beta and E do not follow a factor that is not in `joint`."""
  laws = LAWS['multiplicative']
  p = points(laws)
  other = points(dict(trained=lib.Law(math.log(2), .1, .4, math.log(1.4))))
  got = lib.fit({**p, **other})
  both = ('model', 'pretraining')
  close({n: got[n] for n in both}, {n: laws[n] for n in both})
  assert got['trained'].beta == got['model'].beta
  assert got['trained'].e == got['model'].e
  moved = lib.fit({**p, **other}, joint=('model', 'trained'))
  assert abs(moved['model'].beta - .06) > 5e-3
  alone = lib.fit({n: p[n] for n in both})
  close({n: got[n] for n in both}, alone, atol=1e-6)


def test_units_of_x_and_d_change_a_alone():
  p = points(LAWS['multiplicative'], noise=0.01)
  want = lib.fit(p)
  scaled = {n: (x / 1e9, d / 1e3, loss) for n, (x, d, loss) in p.items()}
  got = lib.fit(scaled)
  for name, law in got.items():
    a = want[name].a - want[name].alpha * math.log(1e9) - (
        want[name].beta * math.log(1e3))
    close({name: law}, {name: want[name]._replace(a=a)}, atol=1e-4)


# ------------------------------------------------------------------- the rival
@pytest.mark.parametrize('form', lib.FORMS)
def test_the_form_that_made_the_points_says_more_of_larger_scales(form):
  kept, held = lib.hold_out(points(LAWS[form], noise=1e-3))
  gap = {}
  for other in lib.FORMS:
    laws = lib.fit(kept, form=other)
    gap[other] = lib.deviation(laws, held)['']
    assert lib.deviation(laws, kept)[''] < 0.1
  rival = next(f for f in lib.FORMS if f != form)
  assert gap[form] < 3e-3 < gap[rival], gap


def test_the_largest_scale_is_held_out():
  p = points(LAWS['multiplicative'])
  kept, held = lib.hold_out(p)
  assert kept['model'][0].max() == 8e9 and kept['model'][1].max() == 9e4
  x, d, _ = held['model']
  assert ((x == 16e9) | (d == 1e5)).all() and len(x) == 6 + 5 - 1
  assert len(kept['model'][0]) + len(x) == 30
  kept, held = lib.hold_out(p, x=dict(pretraining=209e9))  # as the paper
  assert kept['pretraining'][0].max() == 283e9
  assert 209e9 not in kept['pretraining'][0]
  assert 16e9 not in kept['model'][0]


# --------------------------------------------------------------- critical size
def test_closed_form_and_numbers_agree():
  one = lib.Law(math.log(300), .22, .06, math.log(1.1))
  two = lib.Law(math.log(1200), .24, .14, math.log(1.1))
  for x in (1e9, 16e9):
    want = (300 / 1200 * x ** (.24 - .22)) ** (1 / (.06 - .14))
    np.testing.assert_allclose(lib.critical_size(one, two, x), want)
    np.testing.assert_allclose(lib.critical_sizes(one, two, x), [want],
                               rtol=1e-9)
    assert one(x, want / 2) < two(x, want / 2)  # the steeper one wins with data
    assert one(x, want * 2) > two(x, want * 2)


def test_numbers_where_there_is_no_closed_form():
  one = lib.Law(math.log(3), 0.0, 0.2, math.log(1.0))
  two = lib.Law(math.log(30), 0.0, 0.5, math.log(1.1))
  found = lib.critical_sizes(one, two, 1.0)
  assert len(found) == 2  # the second wins between them
  np.testing.assert_allclose(one(1.0, found), two(1.0, found), rtol=1e-9)
  middle = math.sqrt(found[0] * found[1])
  assert two(1.0, middle) < one(1.0, middle)
  assert not len(lib.critical_sizes(one, one._replace(e=1.0), 1.0))


# ------------------------------------------------------------------- intervals
def test_intervals_hold_the_constants_and_follow_the_noise():
  wide = {}
  for noise in (1e-4, 1e-2):
    p = points(LAWS['multiplicative'], noise)
    law = lib.fit(p)
    found = lib.bootstrap(p, samples=10, level=0.9, seed=1)
    assert set(found['model']) == {'a', 'alpha', 'beta', 'e'}
    for name, by_constant in found.items():
      for constant, (low, high) in by_constant.items():
        assert low <= high
        wide.setdefault((name, constant), []).append(high - low)
    low, high = found['model']['alpha']
    margin = high - low
    assert low - margin < law['model'].alpha < high + margin
    assert low - margin < .22 < high + margin
  assert all(small < large for small, large in wide.values())
  few = lambda: lib.bootstrap(p, samples=2, level=0.9, seed=1)
  assert few() == few()


# --------------------------------------------------------------------- refusals
P = dict(model=([1e9, 2e9], [1e3, 2e3], [2., 3.]))


@pytest.mark.parametrize('run, match', [
    (lambda: lib.fit({}), 'no points'),
    (lambda: lib.fit(P), '2 points of model for 4 constants'),
    (lambda: lib.fit(P, form='additiv'), "unknown form 'additiv'.*'additive'"),
    (lambda: lib.fit(P, joint=('modle',)), "unknown factor 'modle'.*'model'"),
    (lambda: lib.fit(dict(P, trained=([4.], [1e4], [2.]))),
     'trained: all points have x=4; expected two values'),
    (lambda: lib.fit(dict(rank=P['model'])), r"joint: expected.*\['rank'\]"),
    (lambda: lib.fit(dict(model=([1, 2], [1, 2], [1]))), 'of one length'),
    (lambda: lib.fit(dict(model=([1, 0], [1, 2], [1, 2]))), 'x holds .0'),
    (lambda: lib.fit(dict(model=([1, 2], [1, 2], [1, np.nan]))), 'loss holds'),
    (lambda: lib.hold_out(P, x=dict(model=3e9)),
     'no point has x=3.*nearest is 2e.09'),
    (lambda: lib.hold_out(P, d=dict(model=1e3)), 'all 2 points are held out'),
    (lambda: lib.bootstrap(P, samples=0), 'samples=0'),
    (lambda: lib.critical_size(lib.Law(0, 0, .1, 0), lib.Law(0, 0, .2, 1), 1.),
     'E is 1 and 2.7.*use critical_sizes'),
    (lambda: lib.critical_size(*[lib.Law(0, 0, .1, 0)] * 2, 1.), 'beta=0.1 of'),
    (lambda: lib.critical_size(
        *[lib.Law(0, 0, .1, 0, 1.)] * 2, 1.), 'additive laws have no closed')])
def test_what_is_refused(run, match):
  with pytest.raises(ValueError, match=match):
    run()
