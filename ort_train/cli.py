"""The `ort-train` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ort_train import __version__, distributed
from ort_train.errors import ConfigError, OrtTrainError, StoppedBySignal


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ort-train`.

    Returns:
        Exit code: 0 done, 1 something was found wrong (doctor, bench), 2 an error in what was
        asked for, 85 ended by SIGTERM or SIGUSR1 with a checkpoint saved, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(arguments[0] if arguments else "")
    args, others = parser.parse_known_args(arguments)
    # argparse takes positional words in one piece only: overrides may stand behind options, too.
    if hasattr(args, "overrides") and all(_is_override(word) for word in others):
        args.overrides = [*args.overrides, *others]
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    from ort_train.quantization import hush_kernel_notice

    hush_kernel_notice()
    try:
        return args.run(args)
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


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def make_parser(command: str = "") -> argparse.ArgumentParser:
    """The parser; only the named subcommand's own options are filled in, for a quick start."""
    parser = argparse.ArgumentParser(
        prog="ort-train",
        description="Train Hugging Face models through ONNX Runtime, measured against eager "
        "PyTorch and torch.compile.",
        epilog="ORT_TRAIN_TRACEBACK=1 shows whole tracebacks; ORT_TRAIN_DATA names a folder of "
        "text; ORT_TRAIN_CACHE names the cache folder.",
    )
    parser.add_argument("--version", action="version", version=f"ort_train {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="run a recipe: train, measure, evaluate, save, report",
        description="Run a recipe. Every key of it can be changed: train.max_steps=50 "
        "train.backend=compile data.folder=texts output.dir=runs/mine",
    )
    train.add_argument("--recipe", required=True, metavar="NAME_OR_PATH")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument("--tiny", action="store_true", help="shrink all sizes, download nothing")
    # What the deepspeed launcher adds; the rank itself is in the environment.
    train.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    train.set_defaults(run=_train)

    bench = commands.add_parser("bench", help="measure a recipe over several backends")
    if command == "bench":
        from ort_train.bench import benchmark

        benchmark.add_arguments(bench)
        bench.set_defaults(run=benchmark.main)

    inference = commands.add_parser(
        "bench-inference",
        help="measure prompts and generation by ONNX Runtime, PyTorch and llama.cpp",
        description="Measure prompts and greedy generation of a language model by several "
        "engines, each in a process of its own, in turns, held against eager PyTorch. ONNX exports "
        "and GGUF files that are missing are made beside DIR first.",
    )
    if command == "bench-inference":
        from ort_train.inference.benchmark import generation as bench_generation

        bench_generation.add_arguments(inference)
        inference.set_defaults(run=bench_generation.main)

    images = commands.add_parser(
        "bench-diffusion",
        help="measure a text-to-image pipeline by ONNX Runtime and PyTorch",
        description="Draw the same images by ONNX Runtime and by PyTorch, in turns, over batch "
        "sizes and steps. An export that is missing is made beside DIR first.",
    )
    if command == "bench-diffusion":
        from ort_train.inference.diffusion import bench as image_benchmark

        image_benchmark.add_arguments(images)
        images.set_defaults(run=image_benchmark.main)

    doctor = commands.add_parser("doctor", help="what is installed, what is wrong, how to mend it")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)

    merge = commands.add_parser(
        "merge",
        help="write a run's adapter and its base as one plain transformers model",
        description="Write a LoRA or QLoRA run's adapter and its base as one plain transformers "
        "model. The base itself is left as it is.",
    )
    merge.add_argument("folder", metavar="RUN", help="the run's folder")
    merge.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    merge.add_argument(
        "--base",
        choices=("dequantized", "original"),
        help="of a QLoRA run: the weights that it trained beside (default), or those before "
        "quantization",
    )
    merge.set_defaults(run=_merge)

    export = commands.add_parser(
        "export",
        help="write a trained run or a transformers model as an ONNX decoder",
        description="Write a run (an adapter is merged first) or the folder of a transformers "
        "model as an ONNX decoder with KV cache. Its logits are compared with PyTorch's; where "
        "they differ, nothing is kept.",
    )
    export.add_argument("source", metavar="RUN_OR_MODEL_DIR")
    export.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    export.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8", "int4"),
        default="fp32",
        help="of weights, computation and cache; int8 and int4: of the weights, as ort-train "
        "quantize does by default (default fp32)",
    )
    export.add_argument(
        "--graph",
        choices=("auto", "fused", "traced"),
        default="auto",
        help="fused operators, torch.onnx, or the first that the model can have (default auto)",
    )
    export.set_defaults(run=_export)

    generate = commands.add_parser(
        "generate",
        help="continue prompts with an exported model",
        description="Continue prompts with an exported model. Options that aren't given are those "
        "of the folder's generation_config.json. One prompt's text is printed as it is made.",
    )
    _add_generate_arguments(generate)
    generate.set_defaults(run=_generate)

    plan = commands.add_parser(
        "plan",
        help="whether a recipe fits on given GPUs, without loading its weights",
        description="Memory of each rank under DDP and ZeRO, with and without recomputed "
        "activations, and the micro batch that fits. Ends with 1 where nothing does.",
    )
    plan.add_argument("recipe", metavar="NAME_OR_PATH")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value")
    plan.add_argument("--gpus", type=int, default=1, help="GPUs of a node (default 1)")
    plan.add_argument("--nodes", type=int, default=1, help="nodes (default 1)")
    plan.add_argument("--gpu-mem-gib", type=float, required=True, help="GiB of each GPU")
    plan.set_defaults(run=_plan)

    prune = commands.add_parser(
        "prune",
        help="zero a transformers model's smallest weights, and train on with them at zero",
        description="Magnitude pruning of the linear layers, 2 of each 4 weights or a share of "
        "all, with perplexity and speed before and after; --steps trains on with the zeros kept.",
    )
    if command == "prune":
        from ort_train import prune as prune_command

        prune_command.add_arguments(prune)
        prune.set_defaults(run=prune_command.main)

    optimize = commands.add_parser(
        "optimize",
        help="apply graph passes to an ONNX model, with a report of what they changed",
        description="Apply onnxoptimizer's passes to an ONNX model of any size. Each is also "
        "applied alone, and its effect told; the outputs on random inputs must stay the same.",
    )
    if command == "optimize":
        from ort_train.inference.optimization import optimize as optimize_command

        optimize_command.add_arguments(optimize)
        optimize.set_defaults(run=optimize_command.main)

    diffusion = commands.add_parser(
        "export-diffusion",
        help="write a text-to-image pipeline's models as ONNX graphs",
        description="Write the models of a StableDiffusionPipeline or StableDiffusionXLPipeline "
        "(SD-Turbo, SDXL-Turbo) as ONNX graphs, each compared with PyTorch, and copy the rest.",
    )
    diffusion.add_argument("source", metavar="DIR", help="a folder of diffusers', or a hub name")
    diffusion.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    diffusion.set_defaults(run=_export_diffusion)

    passes_bench = commands.add_parser(
        "passes-bench",
        help="measure what graph passes bring, against noise, eager and torch.compile",
        description="Measure small models before and after each graph pass, with ONNX Runtime's "
        "optimizations off and on, against eager PyTorch and torch.compile, in turns. The original "
        "graph runs twice: below its distance from itself a difference means nothing.",
    )
    if command == "passes-bench":
        from ort_train.inference.optimization import bench as passes_bench_command

        passes_bench_command.add_arguments(passes_bench)
        passes_bench.set_defaults(run=passes_bench_command.main)

    quantize = commands.add_parser(
        "quantize",
        help="narrow an exported model's weights to 4, 8 or 16 bits, checked against fp32",
        description="Write an exported model with narrower weights, tensor by tensor, and compare "
        "it with the original: perplexity, agreement, size, speed, error of each layer. What "
        "differs by more than --max-kl isn't kept.",
    )
    if command == "quantize":
        from ort_train.inference.quantization import command as quantize_command

        quantize_command.add_arguments(quantize)
        quantize.set_defaults(run=quantize_command.main)

    recipes = commands.add_parser("recipes", help="list the recipes")
    recipes.add_argument("name", nargs="?", help="show this recipe, resolved")
    recipes.set_defaults(run=_recipes)
    return parser


def _train(args: argparse.Namespace) -> int:
    from ort_train import job
    from ort_train.recipes import load_recipe

    job.run(load_recipe(args.recipe, args.overrides, tiny=args.tiny))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from ort_train import plan
    from ort_train.recipes import load_recipe

    config = load_recipe(args.recipe, args.overrides)
    return 0 if plan.show(config, args.gpus, args.nodes, args.gpu_mem_gib) else 1


def _doctor(args: argparse.Namespace) -> int:
    from ort_train import doctor

    return doctor.main(as_json=args.json)


def _merge(args: argparse.Namespace) -> int:
    from ort_train.merge import merge

    print(merge(args.folder, args.out, args.base))
    return 0


def _export(args: argparse.Namespace) -> int:
    from ort_train.inference.decoder.export import describe, export_model

    _quiet_transformers()
    exported = export_model(
        args.source, args.out, args.precision, args.graph, show_progress=sys.stderr.isatty()
    )
    print(describe(exported))
    return 0


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="written by ort-train export")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="several make a batch; - reads stdin"
    )
    parser.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    sampling = parser.add_argument_group("sampling", "each of these turns it on")
    sampling.add_argument("--temperature", type=float)
    sampling.add_argument("--top-k", type=int, help="likeliest tokens to choose from, 0 for all")
    sampling.add_argument("--top-p", type=float, help="probability of the tokens to choose from")
    sampling.add_argument("--seed", type=int)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end after this text")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime (default: one a core)")


def _generate(args: argparse.Namespace) -> int:
    _quiet_transformers()
    from ort_train.inference.generation import console

    console.generate(args)
    return 0


def _quiet_transformers() -> None:
    """Its hints are about code, and its bars about reading files; the commands have their own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _export_diffusion(args: argparse.Namespace) -> int:
    from ort_train.inference.diffusion.export import export_pipeline

    _quiet_transformers()
    export_pipeline(args.source, args.out, on_event=print)
    print(f"wrote {args.out}")
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from ort_train.config import to_yaml
    from ort_train.recipes import list_recipes, load_recipe

    if args.name:
        print(to_yaml(load_recipe(args.name)), end="")
        return 0
    infos = list_recipes()
    width = max(len(info.name) for info in infos)
    model_width = max(len(info.architecture) for info in infos)
    for info in infos:
        method = "full" if info.method == "none" else info.method
        memory = "" if info.state_gib is None else f"{info.state_gib:.1f} GiB"
        print(
            f"{info.name:<{width}}  {info.architecture:<{model_width}}  {method:<5}  {memory:>9}  "
            f"{info.description}"
        )
    print("\nMemory is that of weights, gradients and optimizer, unsharded, without activations.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
