"""Describe and select: roles, fused kernels, and what matches nothing."""

import flax.linen as nn
import numpy as np
import peftjax
from peftjax import sites as sites_lib
import pytest

X = np.ones((2, 4), np.float32)


class Named(nn.Module):
  """Dense layers by path; the last is the output."""

  paths: tuple
  width: int = 4

  @nn.compact
  def __call__(self, x):
    for i, path in enumerate(self.paths):
      head, *rest = path.split('/')
      if rest:
        x = Named(('/'.join(rest), 'tail'), self.width, name=head)(x)
      else:
        x = nn.Dense(self.width, name=path)(x)
    return x


@pytest.mark.parametrize('path, role', [
    ('query', 'q'), ('q_proj', 'q'), ('to_k', 'k'), ('wv', 'v'),
    ('attn/out', 'o'), ('self_attention/dense', 'o'), ('o_proj', 'o'),
    ('attn/c_proj', 'o'), ('mlp/c_proj', 'down'), ('wi_0', 'gate'),
    ('wi_1', 'up'), ('wo', 'down'), ('fc1', 'up'), ('w2', 'down'),
    ('classifier', 'head'), ('lm_head', 'head'), ('qkv', ''), ('querying', ''),
    ('Dense_0', '')])
def test_roles_follow_from_paths(path, role):
  sites = peftjax.describe(Named((path, 'last')), X, fused=())
  assert sites[path].role == role
  assert sites['last'].role == 'head'  # its output is the model's


def test_roles_can_be_given():
  model = Named(('mystery', 'query', 'last'))
  sites = peftjax.describe(model, X, roles=(('mystery', 'up'), ('query', 'k')))
  assert [sites[p].role for p in ('mystery', 'query')] == ['up', 'k']
  with pytest.raises(ValueError, match="unknown role 'upp'; did you mean 'up'"):
    peftjax.describe(model, X, roles=(('mystery', 'upp'),))
  with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
    peftjax.describe(model, X, roles=(('(', 'up'),))


def test_a_model_whose_output_is_no_layer_s_has_no_head():
  class Net(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(4)(x) + 1

  assert peftjax.describe(Net(), X)['Dense_0'].role == ''


def test_fused_kernels_are_sliced_as_told():
  model = Named(('qkv', 'other', 'last'), width=6)
  x = np.ones((2, 6), np.float32)
  paths = lambda **kwargs: [
      p for p in peftjax.describe(model, x, **kwargs) if p not in ('', 'last')]
  assert paths() == ['qkv[0:2]', 'qkv[2:4]', 'qkv[4:6]', 'other']
  assert paths(fused=()) == ['qkv', 'other']
  rule = ((r'other', (('q', 3), ('k', 1), ('v', 2))),)
  assert paths(fused=rule) == ['qkv', 'other[0:3]', 'other[3:4]', 'other[4:6]']
  sites = peftjax.describe(model, x, fused=rule)
  assert sites['other[3:4]'].role == 'k'
  assert sites['other[3:4]'].params['kernel'].shape == (6, 1)
  assert sites['other[3:4]'].params['bias'].shape == (1,)
  with pytest.raises(ValueError, match='do not add up to its 6 columns'):
    paths(fused=((r'other', (('q', 3), ('k', 1))),))
  with pytest.raises(ValueError, match='4 columns do not divide .*give their'):
    peftjax.describe(Named(('qkv', 'last')), X)


@pytest.fixture(scope='module')
def sites():
  class Net(nn.Module):

    @nn.compact
    def __call__(self, x):
      for i in range(2):
        x = nn.LayerNorm(name=f'norm_{i}')(x)
        for name in ('query', 'value', 'up'):
          x = nn.Dense(4, use_bias=name != 'up', name=f'layer_{i}_{name}')(x)
      return nn.Dense(4, name='head')(x)

  roles = tuple((f'_{n}$', r) for n, r in (
      ('query', 'q'), ('value', 'v'), ('up', 'up')))
  return peftjax.describe(Net(), X, roles=roles)


def chosen(sites, **kwargs):
  method = peftjax.load('selective.full', sites=peftjax.select(**kwargs))
  return list(sites_lib.matched(method, sites))


def test_select_needs_all_conditions_and_any_of_each(sites):
  assert chosen(sites, roles='qv', path='_0_') == [
      'layer_0_query', 'layer_0_value']
  assert chosen(sites, roles=('q', 'up'), path=['_1_']) == [
      'layer_1_query', 'layer_1_up']
  assert chosen(sites, roles='up') == ['layer_0_up', 'layer_1_up']
  assert chosen(sites, kind='LayerNorm') == ['norm_0', 'norm_1']
  assert chosen(sites, kind=('LayerNorm', 'Dense'), path='1') == [
      'norm_1', 'layer_1_query', 'layer_1_value', 'layer_1_up']
  assert chosen(sites, leaf='bias', kind='Dense') == [
      'layer_0_query', 'layer_0_value', 'layer_1_query', 'layer_1_value',
      'head']
  assert chosen(sites, leaf='bias', exclude=['head', 'norm', 'value']) == [
      'layer_0_query', 'layer_1_query']


def test_select_reads_and_rebuilds(sites):
  rule = peftjax.select(roles='qv', exclude='_0_')
  assert repr(rule) == "select(roles=('q', 'v'), exclude=('_0_',))"
  again = peftjax.select(**rule.keywords)
  assert [again(s) for s in sites.values()] == [rule(s) for s in sites.values()]


@pytest.mark.parametrize('kwargs, message', [
    (dict(roles='qk'), "roles='k' matches no site; choose from .*'?q"),
    (dict(roles=('q', 'gate')), "roles='gate' matches no site"),
    (dict(kind='Dens'), "select.kind=.'Dens',.. matches no site. There are:"),
    (dict(kind=('Dense', 'Dens')), "kind='Dens' matches no site; did you mean "
     "'Dense'"),
    (dict(path=('head', 'layer_0_quary')), "path='layer_0_quary' matches no "
     "site; did you mean 'layer_0_query'"),
    (dict(leaf=('bias', 'kernal')), "leaf='kernal' matches no site; did you "
     "mean 'kernel'"),
    (dict(roles='q', exclude='heat'), "exclude='heat' matches no site; did you "
     "mean 'head'"),
    (dict(roles='q', path='norm'), 'matches no site. There are:\n.*norm_0'),
])
def test_selections_that_match_nothing_name_what_exists(sites, kwargs, message):
  with pytest.raises(ValueError, match=f'(?s)full: .*{message}'):
    chosen(sites, **kwargs)


def test_bad_words_in_a_selection():
  with pytest.raises(ValueError, match="unknown role 'quary'; choose from"):
    peftjax.select(roles='quary')
  with pytest.raises(ValueError, match="unknown role 'qx'; did you mean 'q'"):
    peftjax.select(roles='qx')
  with pytest.raises(ValueError, match="unknown role 'heads'; did you mean 'h"):
    peftjax.select(roles=('heads',))
  with pytest.raises(ValueError, match=r"path '\*' is not a regular expr"):
    peftjax.select(path='*')
  with pytest.raises(ValueError, match=r"path 'a\(' is not a regular expr"):
    peftjax.select(exclude=['ok', 'a('])


def test_the_default_of_weight_methods(sites):
  assert [p for p, s in sites.items() if sites_lib.kernels(s)] == [
      f'layer_{i}_{n}' for i in range(2) for n in ('query', 'value', 'up')]


def test_the_table_has_a_line_a_site(sites):
  lines = sites_lib.table(sites).splitlines()
  assert len(lines) == len(sites)
  assert '(root)' in lines[0]
  (line,) = [l for l in lines if 'layer_1_value' in l]
  assert line.split() == ['layer_1_value', 'Dense', 'v', 'kernel[4,', '4]',
                          'bias[4]']
