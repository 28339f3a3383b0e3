"""The report: every result and its reason reach the table, the chart and the page."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

import pytest
from example_records import broken, example, result
from rich.console import Console

from ort_train.reports import report
from ort_train.reports.record import RecordError


def printed(record, width=200, terminal=True) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None)
    report.show(record, console)
    return stream.getvalue()


UNAVAILABLE = broken("compile", "unavailable", "no C++ compiler: install g++")
MISMATCH = broken(
    "ort",
    "mismatch",
    "gradient of q_proj differs by 1.8",
    it_per_s={"median": 99.0, "p20": 98.0, "p80": 100.0},
    parity={
        "first_loss_abs": 0.0,
        "loss_max_abs": 0.5,
        "grad_max_rel": 1.8,
        "grad_worst": "q_proj",
    },
)


def test_table_has_units_and_values():
    text = printed(example())
    for head in ("it/s", "tokens/s", "ms", "GiB", "median (p20..p80)", "x eager", "x compile"):
        assert head in text
    row = next(line for line in text.splitlines() if line.strip().startswith("ort "))
    for cell in ("fp32", "128", "22 (20.9..23.1)", "5,632", "2.20 (2.13..2.24)", "1.69", "2.0e-06"):
        assert cell in row
    assert "quickstart: llama, 3.56M parameters" in text
    assert "ort fp32 2x128: 2.20 x eager, 1.69 x compile" in text
    assert "torch 2.13.0" in text


def test_reasons_stand_below_and_a_mismatch_has_no_speedup():
    text = printed(example(result("eager", 1.0), UNAVAILABLE, MISMATCH))
    assert "compile fp32 2x128 can't run here: no C++ compiler: install g++" in text
    assert (
        "ort fp32 2x128 computes other numbers, so it has no speed-up: gradient of q_proj" in text
    )
    row = next(line for line in text.splitlines() if line.strip().startswith("ort "))
    assert row.split()[-3:] == ["-", "-", "mismatch"]


def test_the_reference_alone_is_left_out_but_its_failure_is_told():
    reference = broken("eager", "failed", "SIGKILL", reference_only=True)
    record = example(reference, result("ort", 2.0))
    assert [r["backend"] for r in report.results(record)] == ["ort"]
    assert "eager fp32 2x128 failed: SIGKILL" in printed(record)


def test_a_narrow_terminal_gets_an_upright_table():
    text = printed(example(), width=100)
    lines = text.splitlines()
    assert any(line.split()[:4] == ["backend", "eager", "compile", "ort"] for line in lines)
    assert any("first step, s" in line for line in lines)
    assert "…" not in text


def test_a_log_file_gets_the_wide_table():
    assert "x compile" in printed(example(), width=80, terminal=False)


def test_brackets_in_a_reason_are_no_markup():
    record = example(broken("ort", "failed", "IndexError: [bold] list[0]"))
    assert "IndexError: [bold] list[0]" in printed(record)


SEVERAL = [
    result(backend, speed, micro_batch_size=size)
    for size in (1, 2, 4)
    for backend, speed in (("eager", 1.0), ("compile", 1.2), ("ort", 2.0 + size / 10))
]
RECORDS = {
    "one shape": example(),
    "several shapes": example(*SEVERAL),
    "broken": example(result("eager", 1.0), UNAVAILABLE, MISMATCH),
    "no eager": example(
        result("ort", 2.0, speedup_vs_eager=None, speedup_vs_eager_range=None),
    ),
    "nothing ran": example(UNAVAILABLE),
    "precisions": example(
        *(
            result(backend, 2.0, precision=precision)
            for backend in ("eager", "ort")
            for precision in ("fp32", "bf16", "fp16")
        )
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_plot_and_page_of_every_kind_of_record(tmp_path, name):
    record = RECORDS[name]
    report.plot(record, tmp_path / "chart.png")
    report.plot(record, tmp_path / "chart.svg")
    report.html(record, tmp_path / "page.html")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(tmp_path / "chart.svg").getroot().tag.endswith("svg")
    assert len(list(tmp_path.iterdir())) == 3
    page = (tmp_path / "page.html").read_text()
    assert page.count("<tr>") == 1 + len(report.results(record))
    assert "<svg" in page
    assert not re.search(r'(src|href)="(?!#)', page), "the page must need nothing beside it"
    assert re.search(r'<svg role="img" aria-label="Bars of [^"]+"', page)
    assert "<metadata>" not in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<td") % page.count('<th scope="col"') == 0


def test_page_tells_command_machine_and_escapes(tmp_path):
    record = example(broken("ort", "failed", "<script>alert(1)</script>"))
    report.html(record, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "ort-train bench quickstart" in page
    assert "2025-01-01" in page
    assert record["machine"]["cpu"] in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_plot_refuses_another_format(tmp_path):
    with pytest.raises(RecordError, match=r"chart.jpg must end in .png or .svg"):
        report.plot(example(), tmp_path / "chart.jpg")
