"""Exported pipelines draw diffusers' own images; what can't be exported is refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ort_train.cli import main
from ort_train.errors import ExportError, GenerationError

pytest.importorskip("diffusers", reason="diffusers is of the extra `diffusion`")

import torch
from tiny_pipelines import save_pipeline

from ort_train.inference.diffusion import trace
from ort_train.inference.diffusion.export import export_pipeline
from ort_train.inference.diffusion.folder import read_exported
from ort_train.inference.diffusion.pipeline import load_pipeline

# Images are numbers from 0 to 1 that eye and file round to 1/255. The models differ by 1e-6 of
# their largest values, and each step feeds its own to the next: 6e-7 was seen after four.
IMAGE_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A pipeline's folder, and that of its export."""
    base = tmp_path_factory.mktemp(request.param)
    source = save_pipeline(base / "source", xl=request.param == "sdxl")
    export_pipeline(source, base / "exported", progress=False)
    return source, base / "exported"


@pytest.fixture(scope="module")
def pipelines(exported: tuple[Path, Path]):
    from diffusers import DiffusionPipeline

    theirs, ours = DiffusionPipeline.from_pretrained(exported[0]), load_pipeline(exported[1])
    for pipeline in (theirs, ours):
        pipeline.set_progress_bar_config(disable=True)
    return theirs, ours


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("sd") / "source")


@pytest.fixture
def damaged(source: Path, tmp_path: Path) -> Path:
    """A copy of a pipeline, to be damaged."""
    return Path(shutil.copytree(source, tmp_path / "damaged"))


def draw(pipeline: Any, prompt: list[str], **options: Any) -> np.ndarray:
    settings = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": 64, "width": 64}
    generator = torch.Generator().manual_seed(1)
    settings |= {"output_type": "np", "generator": generator, **options}
    return pipeline(prompt=prompt, **settings).images


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (["a cat"], {}),
        (["a cat"], {"num_inference_steps": 4}),
        (["a cat", "some dogs", "x"], {"num_inference_steps": 4, "height": 64, "width": 96}),
        # 5 x 9 latents, which the UNet can't halve evenly.
        (["a cat"], {"height": 40, "width": 72}),
        # With guidance the batch is doubled, and the empty prompt is encoded too.
        (["a cat"], {"guidance_scale": 5.0, "num_inference_steps": 2}),
    ],
)
def test_images_are_those_of_diffusers(pipelines, prompt, options):
    theirs, ours = (draw(pipeline, prompt, **options) for pipeline in pipelines)
    assert theirs.shape == ours.shape == (len(prompt), *theirs.shape[1:])
    assert theirs.std() > 0.01, "an image of one colour would say nothing"
    assert np.abs(theirs - ours).max() < IMAGE_TOLERANCE


def test_the_pipeline_is_diffusers_own(exported, pipelines):
    theirs, ours = pipelines
    assert type(ours) is type(theirs)
    assert type(ours.scheduler) is type(theirs.scheduler)
    assert ours.unet.config.sample_size == theirs.unet.config.sample_size
    assert not list(ours.unet.parameters())
    _, info = read_exported(exported[1])
    assert info.pipeline == type(theirs).__name__
    models = {"text_encoder", "text_encoder_2", "unet", "vae"}
    assert set(info.parts) == models & set(theirs.components)
    assert all(part.max_rel < 1e-5 for part in info.parts.values())


def test_weights_lie_beside_the_graph_once(exported):
    import onnx

    folder = exported[1]
    for part in ("unet", "text_encoder", "vae_decoder"):
        assert (folder / part / "model.onnx").stat().st_size < 1_000_000
        model = onnx.load(folder / part / "model.onnx", load_external_data=False)
        batch = model.graph.input[0].type.tensor_type.shape.dim[0]
        assert batch.dim_param == "batch"
    graph = onnx.load(folder / "unet" / "model.onnx", load_external_data=False).graph
    assert any(node.op_type == "MultiHeadAttention" for node in graph.node)
    assert not any(node.op_type == "Softmax" for node in graph.node)
    source = exported[0] / "unet" / "diffusion_pytorch_model.safetensors"
    written = (folder / "unet" / "model.onnx.data").stat().st_size
    # Each weight starts a page of 4096 bytes; a second copy would double it.
    assert written < source.stat().st_size + 4096 * len(graph.initializer)


def test_a_scheduler_may_be_changed(pipelines):
    from diffusers import DDIMScheduler

    theirs, ours = pipelines
    kept = theirs.scheduler, ours.scheduler
    try:
        for pipeline in pipelines:
            pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        images = [draw(p, ["a cat"], num_inference_steps=3) for p in pipelines]
    finally:
        theirs.scheduler, ours.scheduler = kept
    assert np.abs(images[0] - images[1]).max() < IMAGE_TOLERANCE


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs"),
        ({"clip_skip": 1}, "clip_skip"),
    ],
)
def test_an_option_that_the_graph_lacks_is_refused(pipelines, options, named):
    ours = pipelines[1]
    if named == "clip_skip" and hasattr(ours, "tokenizer_2"):
        images = [draw(pipeline, ["a cat"], **options) for pipeline in pipelines]
        assert np.abs(images[0] - images[1]).max() < IMAGE_TOLERANCE
        return
    with pytest.raises(GenerationError, match=named):
        draw(ours, ["a cat"], **options)


def test_it_stays_on_the_cpu_in_float32(pipelines):
    ours = pipelines[1]
    assert ours.to("cpu").to(torch.float32) is ours
    for place in ("cuda", torch.float16):
        with pytest.raises(GenerationError, match="runs on the CPU in float32"):
            ours.unet.to(place)


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no pipeline of diffusers"),
        (lambda f: (f / "model_index.json").write_text("{"), "is damaged"),
        (
            lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"),
            "is a FluxPipeline, and StableDiffusionPipeline or",
        ),
        (lambda f: edit(f / "model_index.json", unet=[None, None]), "has no unet"),
        (
            lambda f: edit(f / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
            "only a AutoencoderKL",
        ),
        (lambda f: shutil.rmtree(f / "scheduler"), "lacks scheduler"),
        (lambda f: shutil.rmtree(f / "vae"), "vae' can't be read"),
        (lambda f: edit(f / "unet/config.json", time_cond_proj_dim=8), "time_cond_proj_dim 8"),
        (
            lambda f: edit(f / "unet/config.json", addition_embed_type="image"),
            "addition_embed_type 'image'",
        ),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"1234"),
            "is damaged",
        ),
    ],
)
def test_a_bad_folder_is_refused_and_nothing_is_written(damaged, tmp_path, damage, message):
    damage(damaged)
    with pytest.raises(ExportError, match=message):
        export_pipeline(damaged, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_nothing_is_overwritten(source, tmp_path):
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(ExportError, match="not an empty folder"):
        export_pipeline(source, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_graph_that_computes_other_numbers_is_not_kept(source, tmp_path, monkeypatch):
    def wrong(g: Any, query: Any, *others: Any) -> Any:
        return g.op("Identity", query)

    monkeypatch.setattr(trace._Attention, "symbolic", staticmethod(wrong))
    with pytest.raises(ExportError, match="the graph of unet differs from PyTorch"):
        export_pipeline(source, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("exported")
def test_torch_is_left_as_it_was():
    assert (
        torch.nn.functional.scaled_dot_product_attention
        is torch._C._nn.scaled_dot_product_attention
    )


def test_command_line(source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(["export-diffusion", str(source), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "unet: 985,444 parameters, differs from PyTorch by" in printed.out
    assert f"wrote {out}" in printed.out
    assert main(["export-diffusion", str(source), "--out", str(out)]) == 2
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "ort_train_export.json").unlink(), "is no exported pipeline"),
        (lambda f: edit(f / "ort_train_export.json", schema=2), "describes no exported pipeline"),
        (lambda f: (f / "unet/model.onnx").unlink(), "lacks unet/model.onnx"),
        (lambda f: (f / "unet/model.onnx.data").write_bytes(b"1234"), "can't load"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "lacks tokenizer"),
    ],
)
def test_a_damaged_export_is_refused(exported, tmp_path, damage, message):
    folder = Path(shutil.copytree(exported[1], tmp_path / "damaged"))
    damage(folder)
    with pytest.raises(ExportError, match=message):
        load_pipeline(folder)


def test_benchmark_of_images(exported, tmp_path, capsys):
    from ort_train.reports import record as records
    from ort_train.reports import report

    out = tmp_path / "record.json"
    words = ["bench-diffusion", str(exported[0]), "--exported", str(exported[1]), "--steps", "2"]
    words += ["--batch-sizes", "2", "--height", "64", "--width", "64", "--rounds", "2"]
    assert main([*words, "--threads", "1", "--json", str(out)]) == 0
    record = records.load(out)
    ort = next(result for result in record["results"] if result["engine"] == "ort")
    assert ort["status"] == "ok"
    assert ort["parity"]["image_max_abs"] < IMAGE_TOLERANCE
    assert ort["speedups"]["eager"]["images"]["median"] > 0
    assert ort["batch_s"]["median"] == pytest.approx(2 / ort["images_per_s"]["median"], rel=0.5)
    assert "ort 2x2: images" in capsys.readouterr().out
    report.plot(record, tmp_path / "chart.svg")
    report.html(record, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<tr>") == 3


def test_other_images_have_no_speedup(tmp_path):
    from ort_train.inference.diffusion.bench import Case, Run

    runs = []
    for name, value in (("eager", 0.5), ("ort", 0.52)):
        run = Run(Case(name, 1, 1), {}, files=tmp_path / name)
        run.files.mkdir()
        np.save(run.images, np.full((1, 8, 8, 3), value, np.float32))
        runs.append(run)
    runs[1].judge(reference=runs[0])
    assert runs[1].status == "mismatch"
    assert "pixels differ by 0.02 (allowed 0.001)" in runs[1].reason


def test_problems_of_the_benchmark_are_told_at_once(source, tmp_path, capsys):
    words = ["bench-diffusion", str(source), "--steps", "0", "--engines", "ort,onnx"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "'0' must be whole numbers" in err
    assert "'onnx' is unknown" in err
    assert main(["bench-diffusion", str(source), "--height", "60", "--rounds", "0"]) == 2
    err = capsys.readouterr().err
    assert "height 60 must be a multiple of 8" in err
    assert "rounds 0" in err
    assert main(["bench-diffusion", str(source), "--width", "0", "--guidance-scale", "nan"]) == 2
    err = capsys.readouterr().err
    assert "width 0 must be a multiple of 8" in err
    assert "guidance scale nan must be" in err
    assert not source.with_name("source-exports").exists()
