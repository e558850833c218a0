"""fusion.sources: what a person writes to name a model."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.errors import CheckpointError
from fusion.sources import open_checkpoint
from tests.conftest import save_checkpoint

TENSORS = {"model.embed_tokens.weight": np.arange(6, dtype=np.float32).reshape(3, 2)}


def test_a_folder_is_opened_under_the_name_given(tmp_path):
    folder = save_checkpoint(tmp_path / "m", TENSORS)
    assert (open_checkpoint(folder).name, open_checkpoint(str(folder), "mine").name) == ("m", "mine")


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        open_checkpoint(tmp_path / "gone")


def test_a_folder_with_a_plus_in_its_name_wins(tmp_path):
    folder = save_checkpoint(tmp_path / "a+b", TENSORS)
    assert open_checkpoint(folder).name == "a+b"
    with pytest.raises(CheckpointError, match="there is no such folder"):
        open_checkpoint(f"{tmp_path / 'gone'}+{folder}")
