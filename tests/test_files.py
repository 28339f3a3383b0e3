"""ort_train.files: whole or not there."""

from __future__ import annotations

import os

import pytest

from ort_train.files import replacing


def test_replacing_keeps_the_old_file_on_an_error(tmp_path):
    path = tmp_path / "chart.svg"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            assert temporary.suffix == ".svg"
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["chart.svg"]
