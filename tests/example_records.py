"""Made-up benchmark records for tests."""

from __future__ import annotations

from ort_train.reports import provenance
from ort_train.reports import record as records


def spread(value: float) -> dict[str, float]:
    return {"median": value, "p20": value * 0.95, "p80": value * 1.05}


def result(backend: str, speed: float, **changes) -> dict:
    made = {
        "backend": backend,
        "precision": "fp32",
        "micro_batch_size": 2,
        "block_size": 128,
        "status": "ok",
        "it_per_s": spread(10 * speed),
        "step_ms": spread(100 / speed),
        "forward_backward_ms": 80 / speed,
        "optimizer_ms": 20 / speed,
        "tokens_per_s": 2560 * speed,
        "first_step_s": 1.5,
        "peak_gib": 0.9,
        "loss": [6.5, 6.4, 6.3],
        "parity": {
            "first_loss_abs": 1e-7,
            "loss_max_abs": 2e-6,
            "grad_max_rel": 3e-6,
            "grad_worst": "model.embed_tokens.weight",
        },
        "speedup_vs_eager": speed,
        "speedup_vs_eager_range": [speed * 0.97, speed * 1.02],
        "speedup_vs_compile": speed / 1.3,
        "speedup_vs_compile_range": [speed / 1.35, speed / 1.25],
    }
    return made | changes


def broken(backend: str, status: str, reason: str, **changes) -> dict:
    """A result without measurements."""
    kept = ("backend", "precision", "micro_batch_size", "block_size")
    made = result(backend, 1.0)
    empty = {name: None for name in made if name not in kept}
    return made | empty | {"status": status, "reason": reason, "loss": []} | changes


def example(*results: dict) -> dict:
    """A valid record."""
    return records.validate(
        {
            "schema": 1,
            "command": "ort-train bench quickstart --backends eager,compile,ort",
            "started_at": "2025-01-01T00:00:00+00:00",
            "machine": provenance.machine(threads=2),
            "versions": {"python": "3.11.2", "torch": "2.13.0", "onnxruntime": "1.19.2"},
            "git_sha": "0123456789abcdef",
            "git_dirty": False,
            "recipe": "quickstart",
            "model": {
                "architecture": "llama",
                "name": None,
                "num_parameters": 3_560_000,
                "num_trainable": 3_560_000,
                "adapter": "none",
            },
            "data": "offline text",
            "protocol": {
                "steps": 10,
                "rounds": 3,
                "warmup_steps": 3,
                "dropout": "off",
                "optimizer": "torch.optim.AdamW(fused=True)",
            },
            "results": list(results)
            or [result("eager", 1.0), result("compile", 1.3), result("ort", 2.2)],
        }
    )
