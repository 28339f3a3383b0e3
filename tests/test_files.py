"""ort_train.files: whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ort_train.files import new_folder, replacing, temporary_beside


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


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as staged:
        (staged / "model").write_text("whole")
        assert not out.exists()
    assert os.listdir(tmp_path) == ["out"]

    def fail() -> None:
        with new_folder(tmp_path / "other") as staged:
            (staged / "model").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert os.listdir(tmp_path) == ["out"]


def test_of_two_that_write_one_folder_the_first_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second() -> None:
        with new_folder(out) as slow:
            (slow / "model").write_text("second")
            with new_folder(out) as fast:
                (fast / "model").write_text("first")
            assert (slow / "model").is_file()  # a folder of a live process isn't left over

    with pytest.raises(FileExistsError, match="another process has written there meanwhile"):
        second()
    assert (out / "model").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ort_train.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as staged:\n"
        "    (staged / 'model').write_text('half'); print('ready', flush=True); time.sleep(600)"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with temporary_beside(out, "other"):
            assert len(os.listdir(tmp_path)) == 2  # one is alive
        process.send_signal(signal.SIGKILL)
    assert len(os.listdir(tmp_path)) == 1
    with temporary_beside(tmp_path / "ou", "other"):
        assert len(os.listdir(tmp_path)) == 2  # not of this name
    with new_folder(out):
        pass
    assert os.listdir(tmp_path) == ["out"]
