"""Trains several cases in one launch, each to its own file: started by tests, alone or by torchrun.

`zero_worker.py CASES.json`: a list of mappings with the fields of `Case`. All cases of a launch use
DeepSpeed, or none does: accelerate settles that once per process.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed

from ort_train import distributed, quantization
from ort_train.data import packing
from ort_train.data.batches import IGNORED_LABEL
from ort_train.trainer import ORTTrainer, ORTTrainingArguments

VOCAB, TOKENS, SAMPLES, GLOBAL_BATCH = 300, 32, 32, 8


@dataclass
class Case:
    """One training of 20 steps.

    Attributes:
        out: file for losses and parameters.
        run_dir: of the checkpoints.
        resume: a checkpoint to continue from.
        packed: on rows of several samples each.
    """

    out: str
    run_dir: str
    backend: str = "ort"
    deepspeed: str | None = None
    adapter: str = "full"
    accumulation: int = 1
    max_grad_norm: float = 0.0
    dropout: float = 0.0
    steps: int = 20
    save_steps: int = 0
    resume: str | None = None
    packed: bool = False


def packed_rows() -> Any:
    """Samples of 4 to 20 tokens in rows, of which ranks get unequal numbers of labels."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for length in [draw(4, 21) for _ in range(3 * SAMPLES)]:
        ids = [draw(0, VOCAB) for _ in range(length)]
        num_prompt = draw(0, length)
        columns["input_ids"].append(ids)
        columns["attention_mask"].append([1] * length)
        columns["labels"].append([IGNORED_LABEL] * num_prompt + ids[num_prompt:])
    rows = packing.pack(Dataset.from_dict(columns), TOKENS, pad_id=0, seed=0)
    return rows.select(range(SAMPLES))  # whole batches


class Samples(torch.utils.data.Dataset):
    """The same random tokens everywhere."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, VOCAB, (SAMPLES, TOKENS), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class WrapOrder(TrainerCallback):
    """What a training call goes through, outermost first."""

    def __init__(self, trainer: ORTTrainer) -> None:
        self.trainer = trainer
        self.names: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        outer = self.trainer.model_wrapped
        inner = getattr(outer, "module", outer)
        self.names = [type(outer).__name__, type(inner.forward).__name__, type(inner).__name__]


def make_model(case: Case) -> Any:
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            max_position_embeddings=TOKENS,
            # The graph's attention has no dropout under sdpa on CPU; eager's has.
            attention_dropout=case.dropout,
            attn_implementation="eager" if case.dropout else "sdpa",
        )
    )
    if case.adapter == "qlora":
        nf4 = quantization.Quantization()
        quantization.quantize(model, nf4)
        quantization.prepare(model, nf4)
    if case.adapter != "full":
        config = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=case.dropout, target_modules=["q_proj", "v_proj"]
        )
        model = get_peft_model(model, config)
    return model


def run(case: Case) -> dict[str, Any]:
    ranks = distributed.world_size()
    args = ORTTrainingArguments(
        output_dir=case.run_dir,
        backend=case.backend,
        deepspeed=case.deepspeed,
        per_device_train_batch_size=GLOBAL_BATCH // ranks // case.accumulation,
        gradient_accumulation_steps=case.accumulation,
        max_grad_norm=case.max_grad_norm,
        max_steps=case.steps,
        learning_rate=1e-3,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="steps" if case.save_steps else "no",
        save_steps=case.save_steps or 500,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
        ddp_find_unused_parameters=False,
    )
    model = make_model(case)
    data: dict[str, Any] = {"train_dataset": Samples()}
    if case.packed:
        collate = functools.partial(packing.packed_batch, attention="sdpa")
        data = {"train_dataset": packed_rows(), "data_collator": collate}
    trainer = ORTTrainer(model=model, args=args, **data)
    trainer.remove_callback(PrinterCallback)
    order = WrapOrder(trainer)
    trainer.add_callback(order)
    trainer.train(resume_from_checkpoint=case.resume)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "parameters": {
            name: value.detach().clone()
            for name, value in model.named_parameters()
            if value.requires_grad
        },
        "wrap_order": order.names,
        "optimizer": type(trainer.optimizer).__name__,
        "world_size": args.world_size,
    }


def main() -> None:
    torch.set_num_threads(1)
    # The last argument: DeepSpeed's launcher puts --local_rank before it.
    for fields in json.loads(Path(sys.argv[-1]).read_text()):
        case = Case(**fields)
        result = run(case)
        if distributed.is_main_process():
            torch.save(result, case.out)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    distributed.leave()


if __name__ == "__main__":
    main()
