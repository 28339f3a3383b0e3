"""The `ort-train` command: its subcommands, each imported when it is the one that runs."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ort_train import __version__, distributed
from ort_train.errors import ConfigError, OrtTrainError, StoppedBySignal
from ort_train.overrides import is_override

EXIT_CODES = """\
exit codes:
  0    done
  1    something was found wrong: by doctor, by a benchmark, or a plan that fits nowhere
  2    an error in what was asked for
  85   ended by SIGTERM or SIGUSR1, with a checkpoint saved
  130  interrupted
  141  nobody reads the output any more"""
VARIABLES = """\
variables:
  ORT_TRAIN_TRACEBACK=1  show whole tracebacks
  ORT_TRAIN_DATA         a folder of text to train on
  ORT_TRAIN_CACHE        the cache folder"""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        module: has `add_arguments(parser)` and `main(args)`, which returns the exit code.
        summary: its line in the list of commands.
        description: above its options.
        example: below them.
    """

    module: str
    summary: str
    description: str
    example: str


COMMANDS = {
    "train": Command(
        "ort_train.commands.train",
        "run a recipe: train, measure, evaluate, save, report",
        "Run a recipe: train its model, measured against eager PyTorch and torch.compile, "
        "evaluate, save and report. Every key of it can be changed by section.key=value.",
        "ort-train train --recipe quickstart train.max_steps=50 output.dir=runs/mine",
    ),
    "bench": Command(
        "ort_train.bench.benchmark",
        "measure a recipe over several backends",
        "Measure training steps of a recipe over backends, precisions, batch sizes and lengths. "
        "Each case runs in a process of its own; they take turns on the same batches and are held "
        "against eager fp32. Ends with 1 where one failed or computed other numbers.",
        "ort-train bench bench_llama_256 --batch-sizes 1,2,4 --json speed.json --html speed.html",
    ),
    "plan": Command(
        "ort_train.commands.plan",
        "whether a recipe fits on given GPUs, without loading its weights",
        "Memory of each rank under DDP and ZeRO, with and without recomputed activations, and the "
        "micro batch that fits. Ends with 1 where nothing does.",
        "ort-train plan llama2_7b_lora --gpus 8 --gpu-mem-gib 24 train.micro_batch_size=4",
    ),
    "recipes": Command(
        "ort_train.commands.recipes",
        "list the recipes, or show one",
        "List the shipped recipes, or show one as a whole, with what it inherits and all defaults.",
        "ort-train recipes quickstart_lora > mine.yaml",
    ),
    "doctor": Command(
        "ort_train.doctor",
        "what is installed, what is wrong, how to mend it",
        "Look at the installation and the machine: what is installed, which backends can run, "
        "what is wrong, and the command that mends it. Ends with 1 where there is a problem.",
        "ort-train doctor --json",
    ),
    "merge": Command(
        "ort_train.commands.merge",
        "write a run's adapter and its base as one plain transformers model",
        "Write a LoRA or QLoRA run's adapter and its base as one plain transformers model. The "
        "base itself is left as it is.",
        "ort-train merge runs/quickstart_lora --out merged",
    ),
    "prune": Command(
        "ort_train.prune",
        "zero a transformers model's smallest weights, and train on with them at zero",
        "Magnitude pruning of the linear layers, 2 of each 4 weights or a share of all, with "
        "perplexity and speed before and after; --steps trains on with the zeros kept.",
        "ort-train prune runs/quickstart/model --out pruned --pattern 2:4 --steps 50",
    ),
    "export": Command(
        "ort_train.commands.export",
        "write a trained run or a transformers model as an ONNX decoder",
        "Write a run (an adapter is merged first) or the folder of a transformers model as an ONNX "
        "decoder with KV cache. Its logits are compared with PyTorch's; where they differ, nothing "
        "is kept.",
        "ort-train export runs/quickstart --out exported",
    ),
    "generate": Command(
        "ort_train.commands.generate",
        "continue prompts with an exported model",
        "Continue prompts with an exported model. Options that aren't given are those of the "
        "folder's generation_config.json. One prompt's text is printed as it is made.",
        "ort-train generate exported --prompt 'The game' --max-new-tokens 50",
    ),
    "quantize": Command(
        "ort_train.inference.quantization.command",
        "narrow an exported model's weights to 4, 8 or 16 bits, checked against fp32",
        "Write an exported model with narrower weights, tensor by tensor, and compare it with the "
        "original: perplexity, agreement, size, speed, error of each layer. What differs by more "
        "than --max-kl isn't kept.",
        "ort-train quantize exported --out exported-int4 --scheme int4",
    ),
    "optimize": Command(
        "ort_train.inference.optimization.optimize",
        "apply graph passes to an ONNX model, with a report of what they changed",
        "Apply onnxoptimizer's passes to an ONNX model of any size. Each is also applied alone, "
        "and its effect told; the outputs on random inputs must stay the same.",
        "ort-train optimize model.onnx --passes eliminate_identity --out smaller.onnx",
    ),
    "bench-inference": Command(
        "ort_train.inference.benchmark.generation",
        "measure prompts and generation by ONNX Runtime, PyTorch and llama.cpp",
        "Measure prompts and greedy generation of a language model by several engines, each in a "
        "process of its own, in turns, held against eager PyTorch. ONNX exports and GGUF files "
        "that are missing are made beside DIR first.",
        "ort-train bench-inference runs/quickstart --batch-sizes 1 --prompt-lens 32,128",
    ),
    "export-diffusion": Command(
        "ort_train.commands.export_diffusion",
        "write a text-to-image pipeline's models as ONNX graphs",
        "Write the models of a StableDiffusionPipeline or StableDiffusionXLPipeline (SD-Turbo, "
        "SDXL-Turbo) as ONNX graphs, each compared with PyTorch, and copy the rest.",
        "ort-train export-diffusion sd-turbo --out sd-turbo-onnx",
    ),
    "bench-diffusion": Command(
        "ort_train.inference.diffusion.bench",
        "measure a text-to-image pipeline by ONNX Runtime and PyTorch",
        "Draw the same images by ONNX Runtime and by PyTorch, in turns, over batch sizes and "
        "steps. An export that is missing is made beside DIR first.",
        "ort-train bench-diffusion sd-turbo --batch-sizes 1 --steps 1,4",
    ),
    "passes-bench": Command(
        "ort_train.inference.optimization.bench",
        "measure what graph passes bring, against noise, eager and torch.compile",
        "Measure small models before and after each graph pass, with ONNX Runtime's optimizations "
        "off and on, against eager PyTorch and torch.compile, in turns. The original graph runs "
        "twice: below its distance from itself a difference means nothing.",
        "ort-train passes-bench --models llama,gpt2 --hidden 512 --heads 8 --json passes.json",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ort-train`.

    Returns:
        Exit code; see `EXIT_CODES`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(arguments[0] if arguments else "")
    args, others = parser.parse_known_args(arguments)
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    # argparse takes positional words in one piece only: overrides may stand behind options, too.
    if hasattr(args, "overrides") and all(map(is_override, others)):
        args.overrides = [*args.overrides, *others]
    elif others:
        args.parser.error(f"unrecognized arguments: {' '.join(others)}")
    from ort_train.quantization import hush_kernel_notice

    hush_kernel_notice()
    try:
        code = args.run(args)
        sys.stdout.flush()  # here, where its failure can be told
        return code
    except StoppedBySignal as stopped:
        if distributed.is_main_process():
            print(f"ort-train: {stopped}", file=sys.stderr)
        return stopped.EXIT_CODE
    except OrtTrainError as error:
        if os.environ.get("ORT_TRAIN_TRACEBACK"):
            raise
        # The ranks of one machine find the same faults in a config: once is enough.
        if not isinstance(error, ConfigError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"ort-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ort-train: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():  # `| head` has seen enough
            _drop_output()
            return 141
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        print(f"ort-train: {error}: free some space, or write elsewhere", file=sys.stderr)
        return 2


def _stdout_is_closed() -> bool:
    """Whether stdout is a pipe whose reader has gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _drop_output() -> None:
    """Let what is left of the output go nowhere: the interpreter would try once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Names every default that the help of an option doesn't tell itself."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        has_none = action.default is False or action.default in (None, "", [], argparse.SUPPRESS)
        return text if has_none or "default" in text else f"{text} (default: %(default)s)"


def make_parser(command: str = "") -> argparse.ArgumentParser:
    """The parser; only the named subcommand's own options are filled in, for a quick start."""
    parser = argparse.ArgumentParser(
        prog="ort-train",
        description="Train Hugging Face models through ONNX Runtime, measured against eager "
        "PyTorch and torch.compile.",
        epilog=f"{EXIT_CODES}\n\n{VARIABLES}\n\n`ort-train COMMAND --help` tells a command's "
        "options, with an example.",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ort_train {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, entry in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=entry.summary,
            description=entry.description,
            epilog=f"example:\n  {entry.example}",
            formatter_class=_HelpFormatter,
        )
        if name == command:
            module = importlib.import_module(entry.module)
            module.add_arguments(added)
            added.set_defaults(run=module.main, parser=added)
    return parser


if __name__ == "__main__":
    sys.exit(main())
