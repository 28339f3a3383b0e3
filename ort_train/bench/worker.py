"""One benchmark case in a fresh process: training steps of one backend, timed.

Started by `process.Worker`, which sends one JSON request a line and reads one JSON reply:
    prepare  build data, model and optimizer; first step; warm-up steps
    round    some training steps, timed
    finish   peak memory; the process ends after it
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ort_train.bench.serve import peak_resident_gib, serve
from ort_train.errors import BackendUnavailableError
from ort_train.reports.provenance import scrub

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ort_train.config import RunConfig
    from ort_train.distillation import Distiller


def main() -> int:
    """Answer requests until `finish` or the end of stdin."""
    from ort_train.quantization import hush_kernel_notice

    hush_kernel_notice()
    return serve(Session)


class Session:
    """Training steps of one backend on one model.

    Args:
        config: a RunConfig as plain data; its train section names backend and precision.
        num_batches: how many different batches the whole benchmark takes.
        warmup_steps: training steps before the first round.
        threads: of torch's operators, None for torch's own choice.
        gradients: file that the first step's gradients are written to.
        profile_steps: after all rounds, this many more are profiled where the backend is ort.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        num_batches: int,
        warmup_steps: int,
        threads: int | None,
        gradients: str,
        profile_steps: int = 0,
    ):
        import torch

        from ort_train.backends import available
        from ort_train.config import parse

        if threads is not None:
            torch.set_num_threads(threads)
        self.threads = threads
        self.config = parse(config)
        self.warmup_steps = warmup_steps
        self.gradients = gradients
        self.profile_steps = profile_steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        train = self.config.train
        # Asked before the model is built, which can take minutes.
        can_run, reason = available(train.backend, train.precision, self.device.type)
        if not can_run:
            raise BackendUnavailableError(reason)
        self.model, self.batches, self.data, self.distiller = build(self.config, num_batches)
        self.model.to(self.device).train()
        if self.distiller is not None:
            self.distiller.teacher.to(self.device)
        self.step = 0

    def start(self) -> dict[str, Any]:
        """Wrap the model; first forward and backward; warm-up steps."""
        import torch

        from ort_train.backends import wrap
        from ort_train.ortmodule import OrtOptions

        train = self.config.train
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        num_parameters = sum(p.numel() for p in self.model.parameters())
        # ORT has a pool of its own: given a number of threads, every backend gets that number.
        threads = {} if self.threads is None else {"num_threads": self.threads}
        self.options = OrtOptions(**{**train.ort, **threads})
        self.module = wrap(
            self.model, backend=train.backend, precision=train.precision, options=self.options
        )
        self.optimizer = torch.optim.AdamW(
            [parameter for _, parameter in named],
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            fused=True,
        )
        # fp16's smallest number is 6e-8: without scaling, small gradients become 0. The scale is
        # below GradScaler's own first one (65536), whose overflowing steps would be skipped.
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=1024.0, enabled=train.precision == "fp16"
        )
        began = time.perf_counter()
        loss = self._forward_backward(self.batches[0])
        self._synchronize()
        first_step_s = time.perf_counter() - began
        self._save_gradients(named)
        return {
            "first_step_s": first_step_s,
            "first_loss": loss.item(),
            "warmup_loss": self.round(self.warmup_steps)["loss"],
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if self.device.type == "cuda" else None,
            "batches": _digest(self.batches),
            "data": scrub(self.data),
            "model": {
                "architecture": self.model.config.model_type,
                "name": _model_name(self.config.model.name_or_path),
                "num_parameters": num_parameters,
                "num_trainable": sum(parameter.numel() for _, parameter in named),
                "adapter": self.config.adapter.method,
            },
        }

    def round(self, steps: int) -> dict[str, Any]:
        """Training steps over the next batches, each timed.

        Returns:
            step_s, forward_backward_s, optimizer_s and loss, `steps` of each.
        """
        times: dict[str, list[float]] = {"step_s": [], "forward_backward_s": [], "optimizer_s": []}
        losses = []
        for _ in range(steps):
            batch = self.batches[self.step % len(self.batches)]
            began = time.perf_counter()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(self._forward_backward(batch))
            self._synchronize()
            halfway = time.perf_counter()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._synchronize()
            ended = time.perf_counter()
            times["step_s"].append(ended - began)
            times["forward_backward_s"].append(halfway - began)
            times["optimizer_s"].append(ended - halfway)
            self.step += 1
        return {**times, "loss": [loss.item() for loss in losses]}

    def finish(self) -> dict[str, Any]:
        """Peak memory in GiB: the allocator's on CUDA, else the resident set of the process; and
        the profile, if one was asked for."""
        import torch

        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            peak = peak_resident_gib()
        is_profiled = self.profile_steps and self.config.train.backend == "ort"
        return {"peak_gib": peak, "profile": self._profile() if is_profiled else None}

    def _profile(self) -> dict[str, Any]:
        """Where forward and backward spend their time, on a graph of its own that is profiled."""
        from ort_train.backends import unwrap, wrap
        from ort_train.ortmodule import profiling

        train, steps = self.config.train, self.profile_steps
        with tempfile.TemporaryDirectory(prefix="ort_train-profile-") as folder:
            options = replace(self.options, profile_prefix=str(Path(folder) / "profile"))
            self.module = wrap(unwrap(self.model), "ort", train.precision, options)
            self.round(max(self.warmup_steps, 1))
            peak_before = self._peak_gflops()
            forward_backward_s = statistics.median(self.round(steps)["forward_backward_s"])
            peak_after = self._peak_gflops()
            kernels = profiling.end(self.module, steps)
        found = {
            "steps": steps,
            "forward_backward_ms": forward_backward_s * 1e3,
            "shares": profiling.shares(kernels, forward_backward_s),
        }
        reached = profiling.products_gflops(kernels)
        if peak_before is not None and peak_after is not None and reached is not None:
            # The better, for a shared machine's speed changes within seconds.
            peak = max(peak_before, peak_after)
            found |= {
                "products_gflops": reached,
                "peak_gflops": peak,
                "products_share_of_peak": reached / peak,
            }
        return found

    def _peak_gflops(self) -> float | None:
        """None on a GPU, which goes on after a kernel of the profile has returned, and of bf16 on a
        CPU that doesn't multiply in it, where one product takes a minute."""
        from ort_train.ortmodule.kernels import onednn
        from ort_train.ortmodule.kernels.peak import peak_gflops

        precision = self.config.train.precision
        has_peak = self.device.type == "cpu" and (precision == "fp32" or onednn.has_bf16())
        return peak_gflops(precision) if has_peak else None

    def _forward_backward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if self.distiller is None:
            loss = self.module(**inputs).loss
        else:
            loss = self.distiller.step_loss(self.module, inputs)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def _save_gradients(self, named: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
        from safetensors.torch import save_file

        scale = self.scaler.get_scale()
        # float32, because numpy, which reads the file, has no bfloat16.
        save_file(
            {
                name: (parameter.grad.float() / scale).contiguous().cpu()
                for name, parameter in named
                if parameter.grad is not None
            },
            self.gradients,
        )


def build(
    config: RunConfig, num_batches: int
) -> tuple[PreTrainedModel, list[dict[str, torch.Tensor]], str, Distiller | None]:
    """The run's model, from its seed, without dropout, and its first batches.

    Returns:
        The model on the CPU; up to `num_batches` batches of column -> tensor of
        (micro_batch_size, tokens); the data's source in words; the teacher, if there is one.
    """
    import torch

    from ort_train import quantization
    from ort_train.adapters import apply_adapter
    from ort_train.data.packing import check_models
    from ort_train.data.samples import make_samples
    from ort_train.distillation import load_distiller
    from ort_train.models import load_model

    train = config.train
    size = train.micro_batch_size
    samples = make_samples(config.data, config.model, num_batches * size, False, train.seed)
    model = load_model(
        config.model,
        samples.tokenizer,
        train.seed,
        config.data.block_size,
        quantization.of_run_here(config),
    )
    torch.manual_seed(train.seed)  # for the adapter's first weights
    model = apply_adapter(model, config.adapter, config.model.task)
    disable_dropout(model)
    fill_zero_weights(model)
    model.config.use_cache = False  # as transformers' Trainer does: a cache only costs here
    rows = samples.train
    # At least one full batch, from the start again where the text is shorter than that.
    batches = []
    for start in range(0, max(len(rows) - size + 1, 1), size):
        indices = [index % len(rows) for index in range(start, start + size)]
        batches.append(samples.collate([rows[index] for index in indices]))
    distiller = None
    if config.distill.teacher is not None:
        distiller = load_distiller(config, samples.tokenizer, model)
    check_models(config.data, samples.collate, model, distiller and distiller.teacher)
    return model, batches, samples.source, distiller


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch every dropout off, in modules, attributes and config.

    Each backend draws its own random numbers, so with dropout no two could be compared.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Attention modules keep theirs as a number: `attention_dropout` and the like.
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if isinstance(value, float) and ("drop" in name or name.endswith("_pdrop")):
                    setattr(holder, name, 0.0)


def fill_zero_weights(model: torch.nn.Module) -> None:
    """Give trained matrices that are all zero small random values, from torch's current seed.

    LoRA starts with B = 0, which makes the gradient of A zero: a wrong one would pass the gate.
    """
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)


def _digest(batches: Sequence[Mapping[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(batch[name].numpy().tobytes())
    return digest.hexdigest()


def _model_name(name_or_path: str | None) -> str | None:
    if name_or_path is not None and Path(name_or_path).exists():
        return Path(name_or_path).name  # a folder of this machine
    return name_or_path


if __name__ == "__main__":
    sys.exit(main())
