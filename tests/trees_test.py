"""Trees by paths: flattening, rules, stacking, fingerprints, differences."""

import jax
import jax.numpy as jnp
import numpy as np
from peftjax import trees
import pytest

TREE = {'a': {'w': np.ones((2, 3)), 'b': np.zeros(3)},
        'layers': [{'w': np.ones(1)}, {'w': np.zeros(2)}],
        'n': {0: np.ones(4), 10: np.ones(5)}}


def test_flatten_names_mappings_lists_and_other_keys():
  flat = trees.flatten(TREE)
  assert {p: v.shape for p, v in flat.items()} == {
      'a/w': (2, 3), 'a/b': (3,), 'layers/0/w': (1,), 'layers/1/w': (2,),
      'n/0': (4,), 'n/10': (5,)}
  assert trees.flatten(np.ones(2)) == trees.flatten({'a': {}}) == {}
  # Tuples are leaves: what rules report comes in tuples.
  assert trees.flatten({'a': (1, 2)}) == {'a': (1, 2)}


def test_refill_is_the_inverse_of_flatten():
  new = trees.refill(TREE, {p: 2 * v for p, v in trees.flatten(TREE).items()})
  assert isinstance(new['layers'], list) and set(new['n']) == {0, 10}
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(2 * x, y), TREE, new)


def test_unflatten_nests():
  assert trees.unflatten({'a/b/c': 1, 'a/d': 2}) == {'a': {'b': {'c': 1},
                                                          'd': 2}}


def test_the_first_rule_that_matches_wins():
  rules = ((r'^a', 1), ('b$', 2), ('', 3))
  assert [trees.first_match(rules, p, 0) for p in ('ab', 'cb', 'c')] == [
      1, 2, 3]
  assert trees.first_match(rules[:2], 'c', 0) == 0
  with pytest.raises(ValueError, match=r"'\[' is not a regular expression"):
    trees.first_match((('[', 1),), 'c', 0)


def test_rules_are_a_mapping_of_what_they_match():
  rules = trees.Rules((r'^alpha\.', 'gate'), (r'kernel$', 'slow'))
  assert rules['alpha.kernel'] == 'gate' and rules['w.kernel'] == 'slow'
  assert 'w.bias' not in rules and rules.get('w.bias', '') == ''
  assert list(rules) == [r'^alpha\.', r'kernel$'] and len(rules) == 2


def test_count_and_size():
  tree = dict(a=jnp.ones((2, 3), jnp.bfloat16), b=jnp.ones(()),
              c=jnp.zeros((0, 4)))
  assert trees.count(tree) == 7
  assert trees.size(tree) == 2 * 6 + 4


def test_nonfinite_names_the_leaves():
  tree = dict(a=dict(b=np.array([1.0, np.nan])), c=[jnp.array(np.inf)],
              d=jnp.arange(3), e=jnp.ones(2))
  assert trees.nonfinite(tree) == ['a/b', 'c/0']
  assert trees.nonfinite(jnp.array(np.nan)) == ['']
  shapes = jax.eval_shape(lambda: dict(a=jnp.ones(2)))
  assert trees.nonfinite(shapes) == []


def test_stack_and_unstack_are_inverse():
  rng = np.random.RandomState(0)
  tree = {f'block_{i}': dict(w=rng.normal(size=(2, 3)), n=dict(b=rng.normal(
      size=3))) for i in (1, 0, 10, 2, 3, 4, 5, 6, 7, 8, 9)}
  tree = dict(enc=tree, head=dict(w=np.ones(2)))
  stacked = trees.stack(tree)
  assert stacked['enc']['blocks']['n']['b'].shape == (11, 3)
  for i in (2, 10):  # by number, not by name
    np.testing.assert_allclose(
        stacked['enc']['blocks']['w'][i], tree['enc'][f'block_{i}']['w'],
        rtol=1e-6)
  back = trees.unstack(stacked)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), tree,
               back)
  del tree['enc']['block_3']
  with pytest.raises(ValueError, match=r'enc/blocks/.*: layers \[0, 1, 2, 4'):
    trees.stack(tree)


def test_fingerprint_sees_every_change_and_nothing_else():
  base = dict(a=dict(w=jnp.ones((2, 3)), b=jnp.zeros(3)))
  one = trees.fingerprint(base)
  same = dict(a=dict(b=np.zeros(3, np.float32), w=np.ones((2, 3), np.float32)))
  assert trees.fingerprint(same) == one and len(one) == 64
  others = [
      dict(a=dict(w=base['a']['w'].at[1, 2].add(1e-7), b=base['a']['b'])),
      dict(a=dict(w=base['a']['w'].T, b=base['a']['b'])),
      dict(a=dict(w=base['a']['w'], b=-base['a']['b'])),  # minus zero
      dict(a=dict(w=base['a']['w'], c=base['a']['b'])),
      dict(b=base['a']), dict(a=dict(w=base['a']['w'])),
      jax.tree.map(lambda v: v.astype(jnp.bfloat16), base)]
  prints = [trees.fingerprint(t) for t in others]
  assert len({one, *prints}) == 1 + len(others)


def test_difference_in_units_of_the_last_place():
  ulp = 2.0 ** -23
  a = dict(x=np.array([1.0, 1.5], np.float32), y=np.zeros(3, np.float32))
  b = dict(x=a['x'] + np.float32([0, 3 * ulp]), y=a['y'])
  assert trees.difference(a, b) == (3 * ulp, 3)
  assert trees.difference(a, a) == (0, 0)
  # One unit for the whole tree: that of the largest magnitude on either side.
  assert trees.difference([np.float32(0)], [np.float32(-8)]) == (
      8, 2.0 ** 23)
  c = dict(a, y=np.float32([0, 0, ulp]))
  assert trees.difference(a, c) == (ulp, 1)
  assert np.isnan(trees.difference([np.float32([1, np.nan])],
                                   [np.float32([1, 2])])[0])
  with pytest.raises(ValueError):
    trees.difference([1.0], [1.0, 2.0])
