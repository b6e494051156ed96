"""What a training step costs: ours beside a plain one and beside the machine's rate of matrix products, in one run.

    python benchmarks/step.py                                        # the demo's sizes: about a minute
    python benchmarks/step.py --encoder swin_base --batch 8 --rounds 3 --steps 1            # about 7 minutes
    python benchmarks/step.py --encoder swin_base --batch 8 --cases mixmae --compiled model --rounds 2 --steps 1
    python benchmarks/step.py --against PATH_OF_ANOTHER_CHECKOUT --cases mixmae       # this commit beside another
    python benchmarks/step.py --device cuda --encoder swin_base --batch 128 --precision bfloat16 --compiled blocks model

Each arm is a process of its own, which has its model ready and trains a few steps when its turn comes; all see the same
images. Arms, per number of images in a mix: plain (plain_mixmae.py, the official code's AdamW and gradient norm), ours,
and ours compiled; ours with pairing="once"; SimMIM and finetuning on the same encoder, and timm's Swin of its size.
Matrix products of a step (the layers', their gradients', and attention's) are run alone, each at its own shape and
layout, between the turns. Medians over the rounds. The last line is JSON:

    ours_per_reference  images/s of ours over those of plain, by K
    fraction_of_gemm    seconds of the matrix products alone over seconds of the step, by K
    memory_ratio        ours over plain, by K: bytes at the peak beyond those of the process without a model

Wants a quiet core: on a busy one, --clock cpu counts the seconds that the process computed. Imports neither Ray nor
pipelines, so that a machine that has only torch can run it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/step.py`

import torch

from benchmarks.step_arm import Spec

HERE = Path(__file__).parent
CASES = ("mixmae", "once", "simmim", "finetune")
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bfloat16, by a word of the card's name."""


class Process:
    """An arm's process."""

    def __init__(self, spec: Spec) -> None:
        words = [sys.executable, str(HERE / "step_arm.py"), json.dumps(asdict(spec))]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(spec.threads), "STEP_ROOT": spec.root}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.parameters = self._read()["parameters"]

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command; returns the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"an arm ended with status {self._process.wait()}: its message is above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def groups_of(options: argparse.Namespace) -> dict[str, dict[str, Spec]]:
    """The arms that are measured beside each other, by group and name."""
    base = Spec(
        root=str(HERE.parent),
        encoder=options.encoder,
        batch=options.batch,
        precision=options.precision,
        device=options.device,
        threads=options.threads,
        clock=options.clock,
        input=options.input,
    )
    groups: dict[str, dict[str, Spec]] = {}
    for images in options.images:
        ours = replace(base, images=images)
        arms = {"ours": ours}
        if not options.no_plain:
            arms["plain"] = replace(ours, code="plain")
        if options.against:
            arms["before"] = replace(ours, root=str(options.against.resolve()))
        for parts in options.compiled:
            arms[f"compiled {parts}"] = replace(ours, compiled=parts)
        if options.recompute:
            arms["recompute"] = replace(ours, recompute=tuple(options.recompute))
        if "once" in options.cases:
            arms["once"] = replace(ours, pairing="once")
        if "mixmae" in options.cases or "once" in options.cases:
            groups[f"k{images}"] = arms
    others = {}
    if "simmim" in options.cases:
        others["simmim"] = replace(base, task="simmim")
    if "finetune" in options.cases:
        others["finetune"] = replace(base, task="finetune")
        others["timm"] = replace(base, task="finetune", code="timm")
    if options.against:
        others |= {
            f"{name} before": replace(arm, root=str(options.against.resolve()))
            for name, arm in others.items()
            if arm.code == "ours"
        }
    for parts in options.compiled:
        others |= {
            f"{name} compiled {parts}": replace(arm, compiled=parts)
            for name, arm in others.items()
            if arm.code == "ours" and not arm.compiled
        }
    return {**groups, **({"others": others} if others else {})}


def measure(arms: dict[str, Spec], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train the arms in turns.   Returns: for each its medians."""
    processes = {name: Process(spec) for name, spec in arms.items()}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
    report: dict[str, dict[str, Any]] = {}
    peaks: dict[str, float] = {}
    try:
        for process in processes.values():
            process.ask(f"train {options.warmup}")
        for _ in range(options.rounds):
            for name, process in processes.items():
                answer = process.ask(f"train {options.steps}")
                if name not in peaks:  # of steps alone, after the first, in which the optimiser made its state
                    peaks[name] = process.ask("memory")["bytes"] / 1e9
                if name in ("ours", "before", "finetune"):
                    answer |= {f"products_{key}": value for key, value in process.ask("products").items()}
                for key, value in answer.items():
                    found[name].setdefault(key, []).append(value)
        if options.device == "cuda":
            for name, process in processes.items():
                found[name] |= {key: [value] for key, value in process.ask("kernels").items()}
        for name, process in processes.items():
            medians = {key: statistics.median(values) for key, values in found[name].items()}
            seconds = medians[f"{options.clock}_s"]
            report[name] = {
                "images_per_s": arms[name].batch / seconds,
                **medians,
                "peak_gb": peaks[name],
                "parameters": process.parameters,
            }
            if "products_seconds" in medians:
                report[name]["fraction_of_gemm"] = medians["products_seconds"] / seconds
                report[name]["gemm_gflops"] = medians["products_flops"] / medians["products_seconds"] / 1e9
                if options.device == "cuda":
                    peak = next(
                        (top for card, top in PEAK_TFLOPS.items() if card in torch.cuda.get_device_name()), None
                    )
                    report[name]["mfu"] = peak and medians["products_flops"] / seconds / peak / 1e12
            if arms[name].compiled:
                report[name]["compile"] = process.ask("compile_report")
        for name, process in processes.items():
            if arms[name].code == "ours":
                _extras(name, process, arms[name], options)
    finally:
        for process in processes.values():
            process.close()
    return report


def _extras(name: str, process: Process, spec: Spec, options: argparse.Namespace) -> None:
    """What was asked for beside the times."""
    if (
        options.check
        and spec.root == str(HERE.parent)
        and spec.task == "mixmae"
        and (spec.compiled or spec.pairing == "all")
    ):
        print(f"{name} beside {'eager' if spec.compiled else 'plain'}:", process.ask("check"))
    if options.profile:
        print("\n".join([f"--- {name}", *process.ask("profile")["lines"]]))
    if options.syncs:
        print(f"{name}: the host waits at {process.ask('syncs')['places']}")


def show(group: str, report: dict[str, dict[str, Any]]) -> None:
    """Print a group's table."""
    columns = ["images_per_s", "wall_s", "cpu_s", "forward_s", "backward_s", "optimizer_s", "fraction_of_gemm"]
    columns += ["gemm_gflops", "peak_gb"]
    columns += [column for column in ("kernel_s", "launches") if any(column in row for row in report.values())]
    print(f"\n{group:18}", *(f"{column:>16}" for column in columns))
    for name, row in report.items():
        numbers = (row.get(column) for column in columns)
        print(f"{name:18}", *(" " * 16 if number is None else f"{number:16.4g}" for number in numbers), flush=True)
        if row.get("mfu"):
            print(f"{'':18} MFU {row['mfu']:.1%}")
        if "compile" in row:
            print(f"{'':18} {row['compile']}")


def summary(reports: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The ratios, by group."""

    def ratios(one: str, two: str, key: str) -> dict[str, float]:
        pairs = {name: (report.get(one), report.get(two)) for name, report in reports.items()}
        return {name: round(a[key] / b[key], 3) for name, (a, b) in pairs.items() if a and b}

    every = {
        "ours_per_reference": ratios("ours", "plain", "images_per_s"),
        "blocks_per_reference": ratios("compiled blocks", "plain", "images_per_s"),
        "model_per_reference": ratios("compiled model", "plain", "images_per_s"),
        "fraction_of_gemm": {
            name: round(report["ours"]["fraction_of_gemm"], 3) for name, report in reports.items() if "ours" in report
        },
        "memory_ratio": ratios("ours", "plain", "peak_gb"),
        "ours_per_before": ratios("ours", "before", "images_per_s"),
        "recompute_per_ours": ratios("recompute", "ours", "images_per_s"),
        "recompute_memory": ratios("recompute", "ours", "peak_gb"),
        "once_per_all": ratios("once", "ours", "images_per_s"),
        "finetune_per_timm": ratios("finetune", "timm", "images_per_s"),
        "finetune_per_before": ratios("finetune", "finetune before", "images_per_s"),
    }
    return {name: values for name, values in every.items() if values}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    about, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("--encoder", default="demo", help="demo, or a Swin without shifts of mixmae.encoders")
    add("--batch", type=int, default=32)
    add("--images", type=int, nargs="+", default=[2, 4], help="K: images of a mix")
    add("--cases", nargs="+", default=list(CASES), choices=CASES)
    add("--compiled", nargs="+", default=[], choices=("blocks", "model"), help="also with torch.compile")
    add("--no-plain", action="store_true", help="leave the plain step out")
    add("--against", type=Path, help="another checkout of this repository, measured beside this one")
    add("--recompute", type=int, nargs="+", help="also with blocks of these stages computed twice, for less memory")
    add("--steps", type=int, default=10, help="steps of a turn")
    add("--rounds", type=int, default=7, help="turns of each arm")
    add("--warmup", type=int, default=2, help="steps before the first turn")
    add("--precision", default="float32", choices=("float32", "bfloat16"))
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=1)
    add("--clock", default="wall", choices=("wall", "cpu"))
    add("--input", default="plain", choices=("plain", "pinned", "device"), help="where the images are")
    add("--check", action="store_true", help="loss and gradients beside the plain step; compiled beside eager")
    add("--profile", action="store_true", help="the operations, or kernels, that take longest")
    add("--syncs", action="store_true", help="on a GPU: where the host waits for it")
    add("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args(argv)
    device = platform.processor() or platform.machine()
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {device}, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
    print({key: str(value) for key, value in vars(options).items()})
    reports = {}
    for name, arms in groups_of(options).items():
        reports[name] = measure(arms, options)
        show(name, reports[name])
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options), "report": reports}, default=str, indent=1))
    print(json.dumps(summary(reports)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
