"""One case of a benchmark of images in a fresh process: a pipeline's call, timed.

Answers what `bench.process.Worker` asks:
    prepare  load the pipeline; one batch, whose pixels are written to a file
    round    a batch from prompts to pixels, timed
    finish   peak memory; the process ends after it
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from ort_train.bench.serve import peak_resident_gib, serve

PROMPT = "a lighthouse on a cliff"
_SEED = 0


class ImageSession:
    """A pipeline, diffusers' or an exported one.

    Args:
        engine: eager, compile or ort.
        folder: the pipeline's; of ort, the exported one.
        batch_size, steps, height, width, guidance_scale: of each batch.
        threads: None: one a core.
        images: .npy file to write the first batch's pixels to, (B, H, W, 3) from 0 to 1.
    """

    def __init__(
        self,
        engine: str,
        folder: str,
        batch_size: int,
        steps: int,
        height: int,
        width: int,
        guidance_scale: float,
        threads: int | None,
        images: str,
    ):
        import torch

        self.began = time.perf_counter()
        if threads is not None:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self.images = images
        self.options = {
            "prompt": [PROMPT] * batch_size,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "output_type": "np",
        }
        self.pipeline = self._load(engine, folder, threads)
        self.pipeline.set_progress_bar_config(disable=True)

    def _load(self, engine: str, folder: str, threads: int | None) -> Any:
        import torch

        if engine == "ort":
            from ort_train.inference.diffusion.pipeline import load_pipeline

            return load_pipeline(folder, threads)
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        if engine == "compile":
            from ort_train.backends import available
            from ort_train.errors import BackendUnavailableError

            can_run, reason = available("compile")
            if not can_run:
                raise BackendUnavailableError(reason)
            pipeline.unet.compile()
            pipeline.vae.decoder.compile()
        return pipeline

    def start(self) -> dict[str, Any]:
        np.save(self.images, self._draw())
        return {"load_s": time.perf_counter() - self.began, "threads": self.threads}

    def round(self) -> dict[str, Any]:
        began = time.perf_counter()
        self._draw()
        return {"batch_s": [time.perf_counter() - began]}

    def finish(self) -> dict[str, Any]:
        return {"peak_gib": peak_resident_gib()}

    def _draw(self) -> np.ndarray:
        import torch

        generator = torch.Generator().manual_seed(_SEED)
        return self.pipeline(**self.options, generator=generator).images


if __name__ == "__main__":
    sys.exit(serve(ImageSession))
