"""fusion.settings: a value, a curve over the depth or a table of patterns becomes one value per tensor."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import RecipeError
from fusion.settings import Curve, Table, count_layers, depth, matching, resolve

LLAMA = ("model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(5)), "model.norm.weight",
         "lm_head.weight")
UP = LLAMA[1:6]


def test_a_plain_value_is_the_same_everywhere():
    for value in (0.5, True, "paper", 3):
        assert resolve(value, LLAMA) == [value] * 8


def test_a_curve_goes_through_its_points_from_embedding_to_head():
    assert resolve(Curve((0, 1)), LLAMA) == [0, 0, .25, .5, .75, 1, 1, 1]
    assert resolve(Curve((1, 0, 4)), LLAMA) == [1, 1, .5, 0, 2, 4, 4, 4]
    assert resolve(Curve((0, 1), outside=.3), LLAMA) == [.3, 0, .25, .5, .75, 1, .3, .3]


@pytest.mark.parametrize(("name", "layers", "where"), [
    ("model.layers.0.mlp.up_proj.weight", 3, 0), ("model.layers.1.mlp.up_proj.weight", 3, .5), ("h.2.attn.c_attn.weight", 3, 1),
    ("model.layers.0.mlp.up_proj.weight", 1, .5), ("model.embed_tokens.weight", 3, 0), ("transformer.wpe.weight", 3, 0),
    ("word_embeddings_layernorm.weight", 3, 0), ("model.norm.weight", 3, 1), ("transformer.ln_f.bias", 3, 1),
    ("lm_head.weight", 3, 1), ("embed_out.weight", 3, 1), ("visual.blocks.9.mlp.fc1.weight", 3, 1),
    ("model.layers.1.block_sparse_moe.experts.7.w1.weight", 3, .5)])
def test_depth_is_read_off_the_name(name, layers, where):
    assert depth(name, layers) == where


def test_the_largest_stack_counts_the_layers():
    assert count_layers(LLAMA) == 5 and count_layers(("lm_head.weight",)) == 0
    assert count_layers(("h.1.mlp.weight", "h.3.mlp.weight", "visual.blocks.9.mlp.weight")) == 4
    towers = [*(f"visual.blocks.{i}.mlp.weight" for i in range(3)), *LLAMA]
    assert count_layers(towers) == 5
    assert resolve(Curve((0, 4)), towers)[:3] == [0, 1, 2]


def test_the_last_row_that_matches_gives_the_value():
    table = Table((("*", .1), ("*.mlp.*", Curve((0, 1))), ("model.layers.2.*", .9)))
    assert resolve(table, LLAMA) == [.1, 0, .25, .9, .75, 1, .1, .1]
    assert resolve(Table((("*", True), ("lm_head.weight", False))), LLAMA) == [True] * 7 + [False]
    assert resolve(Table((("lm_head.weight", .2), ("*", .1))), LLAMA) == [.1] * 8


def test_a_tensor_without_a_row_is_refused_with_the_row_to_add():
    with pytest.raises(RecipeError) as caught:
        resolve(Table((("*.mlp.*", .5),)), LLAMA, "options: density")
    assert str(caught.value) == ("options: density: no row of the table matches model.embed_tokens.weight. "
                                 "Give a first row for all the others: {tensors: '*', value: …}.")


def test_a_row_without_a_tensor_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError) as caught:
        resolve(Table((("*", 1), ("lm_haed.weight", .5))), LLAMA, "weights: a")
    assert str(caught.value) == "weights: a: no tensor matches 'lm_haed.weight'. Did you mean 'lm_head.weight'?"


@given(points=st.lists(st.floats(-9, 9), min_size=2, max_size=6), layers=st.integers(1, 12))
def test_a_curve_stays_between_its_points_and_does_not_depend_on_the_order_of_names(points, layers):
    names = ["embed_tokens.weight", *(f"layers.{i}.mlp.weight" for i in range(layers)), "lm_head.weight"]
    values = resolve(Curve(points), names)
    assert all(min(points) - 1e-9 <= value <= max(points) + 1e-9 for value in values)
    assert resolve(Curve(points), names[::-1]) == values[::-1]
    assert (values[0], values[-1]) == (points[0], points[-1])


def test_a_table_of_many_names_takes_no_time():
    names = [f"model.layers.{i}.mlp.experts.{j}.weight" for i in range(60) for j in range(60)]
    started = time.perf_counter()
    assert resolve(Table(tuple((name, i) for i, name in enumerate(names))), names) == list(range(3600))
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(("pattern", "found"), [
    ("*", LLAMA), ("lm_head.weight", LLAMA[-1:]), ("model.layers.?.mlp.*", UP), ("*.1.*", UP[1:2]), ("*head*", LLAMA[-1:])])
def test_patterns_match_whole_names(pattern, found):
    assert matching(pattern, LLAMA, "exclude") == list(found)


@pytest.mark.parametrize("name", ["a.b", "a[0].w", "a+b", "a\nb", "(a|b)", "ü", "a\\b", "[!a]"])
def test_names_with_odd_characters_match_themselves_only(name):
    assert matching(name, [name, "axb", "a", "b"], "exclude") == [name]
    assert matching(name[0] + "*", [name, "zzz"], "exclude") == [name]
    assert matching(name + "*", [name, "zzz"], "exclude") == [name]


@pytest.mark.parametrize(("pattern", "nearest"), [
    ("lm_head.wieght", "lm_head.weight"), ("model.layers.7.mlp.up_proj.*", "model.layers."), ("lm_head", "lm_head.weight"),
    ("", "Known: lm_head.weight")])
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(pattern, nearest):
    with pytest.raises(RecipeError, match=r"^exclude: no tensor matches") as caught:
        matching(pattern, LLAMA, "exclude")
    assert nearest in str(caught.value)


def test_no_pattern_takes_long():
    started = time.perf_counter()
    with pytest.raises(RecipeError):
        matching("*a" * 25 + "!", ["a" * 60] * 10, "exclude")
    assert time.perf_counter() - started < 2
