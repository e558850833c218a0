"""The summary charts: the right numbers in the right bars and lines, for odd models too."""

import json

import numpy as np
import pytest

from components.figures import plain, ratio_by_depth, share_per_module
from components.heatmap import Grid
from components.state import COLORS, INKS


def grid(tensors, shapes, ratio, targets=("Maths", "Code")):
    ratio = np.array(ratio, dtype=float)
    return Grid(targets, tuple(tensors), tuple(shapes), ratio, ratio * 1e-6, ratio, np.zeros(ratio.shape, bool),
                np.zeros(len(tensors), bool))


@pytest.fixture
def two_layers():
    inside = ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.mlp.up_proj", "1.self_attn.q_proj", "1.input_layernorm")
    tensors = ["model.embed_tokens.weight", *(f"model.layers.{name}.weight" for name in inside), "lm_head.weight"]
    shapes = [(8, 2), (3, 1), (1, 1), (2, 2), (3, 1), (2,), (8, 2)]
    first = [0.5, 0.2, 0.6, 0.9, 0.4, 0.1, 1.0]
    return grid(tensors, shapes, [[a, 1 - a] for a in first])


def lines(figure):
    return [trace for trace in figure.data if trace.x[0] is not None]


def test_depth_pools_by_parameters_and_draws_a_line_per_target_and_kind(two_layers):
    drawn = lines(ratio_by_depth(two_layers))
    assert [(t.line.color, t.line.dash) for t in drawn] == [
        (color, dash) for color in COLORS[:2] for dash in ("solid", "dash", "dot")]
    attention, mlp, norm = drawn[:3]
    assert list(attention.x) == [0, 1]
    assert list(attention.y) == pytest.approx([(3 * 0.2 + 1 * 0.6) / 4, 0.4])
    assert (list(mlp.x), list(mlp.y)) == ([0], [0.9]) and (list(norm.x), list(norm.y)) == ([1], [0.1])
    assert list(drawn[3].y) == pytest.approx([0.7, 0.6])


def test_depth_names_a_target_once_and_a_kind_once(two_layers):
    figure = ratio_by_depth(two_layers)
    named = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert named == ["A · Maths", "B · Code", "attention", "mlp", "norm"]


def test_depth_of_two_stacks_keeps_them_apart():
    tensors = [f"{side}.layers.0.self_attn.q_proj.weight" for side in ("encoder", "decoder")]
    drawn = lines(ratio_by_depth(grid(tensors, [(2, 2)] * 2, [[0.1], [0.7]], ("Only",))))
    assert [list(trace.y) for trace in drawn] == [[0.7], [0.1]]
    assert "decoder.layers" in drawn[0].hovertemplate and "encoder.layers" in drawn[1].hovertemplate


def test_no_layers_says_so():
    figure = ratio_by_depth(grid(["weight"], [(2, 2)], [[0.5, 0.5]]))
    assert "no numbered layers" in figure.layout.annotations[0].text and not figure.data


def test_what_is_not_there_is_no_number(two_layers):
    two_layers.ratio[4, 0] = np.nan
    assert list(lines(ratio_by_depth(two_layers))[0].y) == [pytest.approx(0.3), None]


def test_shares_per_module_with_embedding_and_head(two_layers):
    figure = share_per_module(two_layers)
    assert list(figure.layout.yaxis.ticktext) == ["embed_tokens", "self_attn", "mlp", "norms", "lm_head"]
    first, second = figure.data
    attention = (3 * 0.2 + 1 * 0.6 + 3 * 0.4) / 7
    assert list(first.x) == pytest.approx([0.5, attention, 0.9, 0.1, 1.0])
    assert [a + b for a, b in zip(first.x, second.x, strict=True)] == pytest.approx([1] * 5)
    assert first.text[2] == "A 90%" and first.orientation == "h" and figure.layout.barmode == "stack"
    assert "7 parameters in 3 matrices" in first.customdata[1][1]


def test_no_tensors_is_a_sentence():
    empty = grid([], [], np.zeros((0, 2)))
    assert share_per_module(empty).layout.annotations and ratio_by_depth(empty).layout.annotations


def test_eighty_layers_stay_light():
    tensors = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(80)]
    figure = ratio_by_depth(grid(tensors, [(2, 2)] * 80, np.full((80, 1), 1.0), ("Only",)))
    assert lines(figure)[0].mode == "lines" and len(figure.to_json()) < 20_000


def test_figures_are_plain_json_without_ground_or_template(two_layers):
    for figure in (ratio_by_depth(two_layers), share_per_module(two_layers)):
        told = json.loads(figure.to_json())
        assert told["layout"]["paper_bgcolor"] == told["layout"]["plot_bgcolor"] == "rgba(0,0,0,0)"
        assert told["layout"]["height"] > 0 and "bdata" not in figure.to_json()


def test_names_cannot_become_tags_or_hover_fields(two_layers):
    assert plain("<b>%{y}</b>") == "&lt;b&gt;% {y}&lt;/b&gt;" and plain("x" * 50, 10) == "x" * 9 + "…"
    hostile = Grid(**{**two_layers.__dict__, "targets": ("<b>%{y}", "B")})
    for figure in (ratio_by_depth(hostile), share_per_module(hostile)):
        assert "<b>" not in figure.data[0].name and "<b>%{y}" not in figure.data[0].hovertemplate


@pytest.mark.parametrize(("color", "ink"), zip(COLORS, INKS, strict=True))
def test_ink_is_readable_on_every_target_colour(color, ink):
    linear = [((v / 255 + 0.055) / 1.055) ** 2.4 for v in bytes.fromhex(color[1:])]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    contrast = 1.05 / (luminance + 0.05) if ink == "#fff" else (luminance + 0.05) / 0.05
    assert contrast >= 4.5  # WCAG 2 AA
