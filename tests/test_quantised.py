"""fusion.quantised: FP8 weights read as the numbers they stand for; every other quantisation refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError
from fusion.quantised import TABLES
from tests.conftest import CONFIG

NAME = "model.layers.0.mlp.up_proj.weight"
NORM = {"model.norm.weight": torch.ones(4, dtype=torch.bfloat16)}
DEEPSEEK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
PACKED = {"quant_method": "compressed-tensors"}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def save(folder: Path, tensors: dict[str, torch.Tensor], method: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**NORM, **tensors}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **({"quantization_config": method} if method else {})}))
    return folder


def numbers(*shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)


def spread(scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> torch.Tensor:
    """The scale of every element."""
    for axis, (size, step) in enumerate(zip(shape, block, strict=True)):
        scale = scale.repeat_interleave(step, axis).narrow(axis, 0, size)
    return scale


@pytest.mark.parametrize(("code", "dtype"), [("F8_E4M3", E4M3), ("F8_E5M2", E5M2), ("F8_E8M0", torch.float8_e8m0fnu)])
def test_every_byte_is_the_number_torch_says(code, dtype):
    wanted = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    assert np.array_equal(TABLES[code].view(np.uint32)[~np.isnan(wanted)], wanted.view(np.uint32)[~np.isnan(wanted)])
    assert np.array_equal(np.isnan(TABLES[code]), np.isnan(wanted))


def test_plain_fp8_is_read_as_it_stands(tmp_path):
    model = Checkpoint(save(tmp_path, {NAME: torch.tensor([[1.5, -448.0], [0.0, 2.0**-9]]).to(E4M3)}))
    assert model[NAME].tolist() == [[1.5, -448.0], [0.0, 2.0**-9]]


@pytest.mark.parametrize(("shape", "scale", "block", "method"), [
    ((200, 300), (2, 3), (128, 128), DEEPSEEK),
    ((200, 300), (2, 3), (128, 128), PACKED),  # 128 is what everybody uses
    ((6, 10), (3, 3), (2, 4), {**DEEPSEEK, "weight_block_size": [2, 4]}),
    ((6, 10), (3, 3), (2, 4), {**PACKED, "config_groups": {"group_0": {"weights": {"block_structure": [2, 4]}}}}),
    ((6, 10), (6, 1), (1, 10), PACKED),
    ((6, 10), (1, 1), (6, 10), PACKED),
    ((5, 6, 10), (5, 3, 3), (1, 2, 4), {**DEEPSEEK, "weight_block_size": [2, 4]}),  # experts in one tensor
    ((5, 6, 10), (5, 1, 1), (1, 6, 10), PACKED),
], ids=str)
@pytest.mark.parametrize("tail", ["_scale_inv", "_scale"])
def test_a_scaled_weight_is_its_number_times_the_scale_of_its_block(tmp_path, shape, scale, block, method, tail):
    weight, scales = numbers(*shape), torch.rand(scale) + 0.1
    folder = save(tmp_path, {NAME: weight, NAME + tail: scales}, method)
    model, wanted = Checkpoint(folder), (weight.float() * spread(scales, shape, block)).numpy()
    assert np.array_equal(model[NAME], wanted)
    assert set(model) == {NAME, *NORM} and model.info[NAME].dtype == model.dtype == "BF16"
    assert not model.plain(NAME) and model.plain("model.norm.weight")
    assert "quantization_config" not in model.config


@pytest.mark.parametrize(("scale", "wanted"), [(torch.tensor(0.5), 0.5), (torch.tensor([0.5]), 0.5),
                                               (torch.tensor([0.5], dtype=torch.bfloat16), 0.5),
                                               (torch.tensor([[126]], dtype=torch.uint8).view(torch.float8_e8m0fnu), 0.5)])
def test_one_scale_serves_a_whole_tensor(tmp_path, scale, wanted):
    weight = numbers(6, 10)
    model = Checkpoint(save(tmp_path, {NAME: weight, NAME + "_scale": scale}, PACKED))
    assert np.array_equal(model[NAME], weight.float().numpy() * wanted)


def test_a_row_of_scales_without_second_axis_is_one_per_row(tmp_path):
    weight, scale = numbers(6, 10, dtype=E5M2), torch.arange(1.0, 7.0)
    model = Checkpoint(save(tmp_path, {NAME: weight, NAME + "_scale": scale}, {"quant_method": "fbgemm_fp8"}))
    assert np.array_equal(model[NAME], weight.float().numpy() * np.arange(1, 7, dtype=np.float32)[:, None])


@given(span=st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted))
def test_any_part_equals_the_part_of_the_whole(tmp_path_factory, span):
    folder = tmp_path_factory.getbasetemp() / "fp8-parts"
    if not folder.exists():
        save(folder, {NAME: numbers(6, 10), NAME + "_scale_inv": torch.rand(3, 3)}, {**DEEPSEEK, "weight_block_size": [2, 4]})
    model = Checkpoint(folder)
    assert np.array_equal(model.read(NAME, *span, np.empty(61, np.float32)), model[NAME].reshape(-1)[slice(*span)])


def test_scales_of_activations_vanish_too(tmp_path):
    names = ("mlp.up_proj.input_scale", "self_attn.k_scale", "self_attn.v_scale", "mlp.experts.down_proj_activation_scale")
    extra = {f"model.layers.0.{name}": torch.ones(1) for name in names}
    model = Checkpoint(save(tmp_path, {NAME: numbers(2, 2), NAME + "_scale": torch.ones(1), **extra}, PACKED))
    assert set(model) == {NAME, *NORM}
    assert set(Checkpoint(save(tmp_path / "plain", extra))) == {*extra, *NORM}  # without FP8 they are weights like others


def test_the_fingerprint_sees_a_scale_change(tmp_path):
    one, two = (Checkpoint(save(tmp_path / str(value), {NAME: numbers(2, 2), NAME + "_scale": torch.tensor([value])}, PACKED))
                for value in (1.0, 2.0))
    assert one.fingerprint != two.fingerprint


BYTES = torch.ones(2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(("tensors", "method", "words"), [
    ({NAME: numbers(6, 10), NAME + "_scale": torch.ones(4, 3)}, DEEPSEEK,
     f"the scale {NAME}_scale of shape [4, 3] does not fit a weight of shape [6, 10]"),
    ({NAME: numbers(6, 10), NAME + "_scale": torch.ones(1, 2, 3)}, DEEPSEEK, "does not fit a weight"),
    ({NAME: numbers(6, 10), NAME + "_scale": torch.ones(0)}, DEEPSEEK, "does not fit a weight"),
    ({NAME: numbers(6, 10), NAME + "_scale": BYTES}, DEEPSEEK, f"the scale {NAME}_scale is U8"),
    ({NAME: numbers(6, 10), NAME + "_scale": torch.ones(1), "b.weight": numbers(2, 2)}, DEEPSEEK,
     "b.weight is F8_E4M3 but has no scale"),
    ({NAME: BYTES, NAME + "_scale": numbers(2, 1)}, {"quant_method": "modelopt"}, f"(modelopt, {NAME} is U8)"),  # NVFP4
    ({NAME: BYTES, NAME + "_scale": torch.ones(1)}, None, f"quantised ({NAME} is U8)"),
    ({NAME: numbers(2, 2), NAME + "_scale": torch.ones(1), "b.weight_packed": BYTES}, PACKED, "b.weight_packed is U8"),
])
def test_what_is_not_fp8_with_a_fitting_scale_is_refused(tmp_path, tensors, method, words):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(save(tmp_path, tensors, method))
    assert words in str(caught.value) and caught.value.todo
