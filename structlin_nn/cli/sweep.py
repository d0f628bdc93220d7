"""``structlin sweep``: many runs from one description."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from structlin_nn._text import table
from structlin_nn.cli.common import add, fail, positive, print_json, print_table, show

SHOWN = 10
"""Number of runs that a message names."""
HELP = "train the runs of a sweep, on this machine or on a cluster; the paper's sweeps have names"
EXAMPLES = """\
examples:
  structlin sweep --list
      list the sweeps of the paper
  structlin sweep delta-h --data path/to/cifar-10-batches-bin --dry-run
      print what the runs would cost
  structlin sweep delta-h --data path/to/cifar-10-batches-bin --only '*-w64*' --workers 2
      train those of width 64; finished runs are skipped, and interrupted runs are resumed
  structlin sweep gpt2 --data DIR --set device=cuda --print-commands --launcher srun
      print a command for each run
  structlin sweep imagenet --data DIR --set device=cuda --submit slurm --workers 4 \\
    --submit-set timeout_min=4320 --submit-set gpus_per_node=1
      submit the runs to a cluster, four at a time, by submitit (the extra 'cluster')
  structlin sweep my_sweep.py
      train the sweep of your own file, which defines SWEEP, a structlin_nn.sweeps.Sweep
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "NAME", "a sweep of --list, or a Python file", nargs="?")
    add(parser, "--list", "print the sweeps and exit")
    add(parser, "--data DIR", "folder of the data, as for structlin train")
    add(parser, "--unverified", "do not verify the checksums of CIFAR")
    add(parser, "--out DIR", "parent folder of the runs (runs/NAME)")
    add(parser, "--set KEY=VALUE", "change a configuration field of all runs", [])
    add(parser, "--only GLOB", "names of runs, repeatable", [])
    add(parser, "--workers N", "parallel runs (one for each core, at most 8)", kind=positive)
    add(parser, "--retry", "resume failed runs from their last checkpoint")
    add(parser, "--dry-run", "print the table and exit")
    add(parser, "--print-commands", "print a command for each unfinished run")
    about = "submit the runs by submitit to slurm, or local for a trial on this machine (the extra 'cluster')"
    add(parser, "--submit NAME", about)
    about = "a parameter of submitit, such as timeout_min=600 or slurm_partition=gpu, repeatable"
    add(parser, "--submit-set KEY=VALUE", about, [])
    add(parser, "--launcher WORDS", "words before each command: 'torchrun ...'", "")
    add(parser, "--json", "print one JSON document instead of text")
    add(parser, "--quiet", "print neither table nor progress bar")


def run(arguments: argparse.Namespace) -> int:
    from structlin_nn.records import failure_of
    from structlin_nn.sweeps import find, names

    if arguments.list:
        sweeps = {name: find(name) for name in names()}
        record = [{"name": name, "data": sweep.data, "about": sweep.about} for name, sweep in sweeps.items()]
        show(arguments, record, table(("name", "data", "what"), [tuple(row.values()) for row in record], left=3))
        return 0
    if arguments.name is None:
        raise ValueError(f"the following arguments are required: NAME, one of {', '.join(names())}")
    if arguments.launcher and not (arguments.print_commands or arguments.submit):
        raise ValueError("--launcher is for the commands of --print-commands and --submit")
    if arguments.submit_set and not arguments.submit:
        raise ValueError("--submit-set is for --submit")
    if arguments.submit and arguments.print_commands:
        raise ValueError("give one of --submit and --print-commands")
    from structlin_nn.sweeps.local import default_workers, plan
    from structlin_nn.sweeps.submit import command

    workers = arguments.workers or default_workers()
    planned = plan(_jobs(arguments, find(arguments.name)))
    skipped = {"finished"} if arguments.retry else {"finished", "failed"}
    left = {name: entry.job for name, entry in planned.items() if entry.state not in skipped}
    failed = {
        name: failure_of(entry.job.folder) or "unknown"
        for name, entry in planned.items()
        if entry.state == "failed" and name not in left
    }
    launcher = shlex.split(arguments.launcher)
    if arguments.print_commands:
        commands = {name: command(job, launcher) for name, job in left.items()}
        if arguments.json:
            print_json([{"run": name, "command": text} for name, text in commands.items()])
        else:
            for text in commands.values():
                print(text)
        if not left and not failed:
            print("structlin sweep: all runs are finished", file=sys.stderr)
        _print_number_failed(failed, planned)
        return 1 if failed and not left else 0
    if arguments.dry_run and arguments.json:
        print_json([
            {"run": name, "state": entry.state, "config": entry.job.config.to_dict(), **entry.counts}
            for name, entry in planned.items()
        ])  # fmt: skip
    elif not (arguments.quiet or arguments.json):
        _print_plan(planned, left)
    if arguments.dry_run:
        return 0
    if arguments.submit:
        return _submit(arguments, planned, left, failed, workers, launcher)
    return _train(arguments, planned, left, failed, workers)


def _print_plan(planned: Mapping[str, Any], left: Mapping[str, Any]) -> None:
    from structlin_nn.sweeps.local import number_of_runs

    form = "{params:,}|{forward_macs:,}|{steps:,}|{total_training_macs:.3g}"
    rows = [(name, entry.state, *form.format(**entry.counts).split("|")) for name, entry in planned.items()]
    print_table(("run", "state", "parameters", "MACs forward", "steps", "training MACs"), rows, left=2)
    macs = {name: entry.counts["total_training_macs"] for name, entry in planned.items()}
    every, rest = (
        f"{number_of_runs(len(names))}, {sum(macs[name] for name in names):.3g} training MACs"
        for names in (planned, left)
    )
    print(f"\n{every}; left: {rest}")
    sys.stdout.flush()


def _jobs(arguments: argparse.Namespace, sweep: Any) -> dict[str, Any]:
    from structlin_nn.recipes import recipe
    from structlin_nn.recipes._config import overrides
    from structlin_nn.sweeps.local import Job

    kind = type(recipe(sweep.model))
    cifar = kind.task == "cifar"
    if arguments.unverified and not cifar:
        raise ValueError(f"--unverified is for CIFAR, and {sweep.name} is trained on {sweep.data}")
    configs = sweep.runs(overrides(kind, arguments.set))
    known = all(getattr(config, "data_set", "") == "fashion" for config in configs.values())
    if arguments.data is None and not (arguments.dry_run or known):
        also = ", or --set data_set=fashion for the embedded images" if cifar else ""
        raise ValueError(f"--data is needed: the folder of {sweep.data}{also} (--dry-run needs no data)")
    if arguments.only:
        kept = {n: c for n, c in configs.items() if any(fnmatchcase(n, glob) for glob in arguments.only)}
        if not kept:
            raise ValueError(f"--only {' '.join(arguments.only)} matches none of the runs {', '.join(configs)}")
        configs = kept
    folder = Path(arguments.out or f"runs/{sweep.name}")
    own = {"unverified": arguments.unverified} if cifar else {}
    data = None if arguments.data is None else Path(arguments.data)
    found = {}
    for name, config in configs.items():
        job = Job(config, None)
        found[name] = Job(config, job.recipe.Options(data=data, out=folder / name, **own))
    return found


def _train(
    arguments: argparse.Namespace, planned: Any, left: dict[str, Any], failed: dict[str, str], workers: int
) -> int:
    """Train the runs that are left; `failed` are those that failed before, and are not left."""
    from structlin_nn.sweeps.local import number_of_runs, run_all, state_of

    # A step of a small model costs more than its products.
    weights = {n: planned[n].counts["total_training_macs"] + 3e6 * planned[n].counts["samples"] for n in left}
    outcome = run_all(left, workers=workers, weights=weights, progress=not arguments.quiet)
    _print_failed(outcome.failed)
    failed = failed | outcome.failed
    _print_number_failed(failed, planned)
    finished = [
        name
        for name, entry in planned.items()
        if entry.state == "finished" or (name in left and state_of(entry.job.config, entry.job.folder) == "finished")
    ]
    if arguments.json:
        print_json({"finished": finished, "failed": failed})
    elif left and outcome.signal is None and not arguments.quiet:
        print(f"done: {len(finished)} of {number_of_runs(len(planned))} finished, {len(failed)} failed")
    if outcome.signal is not None:
        fail("sweep", f"{outcome.signal.name}; the same command resumes the unfinished runs")
        return 128 + outcome.signal
    unfinished = [name for name in planned if name not in finished and name not in failed]
    if unfinished:
        resumed = "it" if len(unfinished) == 1 else "them"
        fail("sweep", f"neither finished nor failed: {_some(unfinished)}; the same command resumes {resumed}")
    return 1 if failed or unfinished else 0


def _submit(
    arguments: argparse.Namespace, planned: Any, left: dict[str, Any], failed: dict[str, str], workers: int,
    launcher: list[str],
) -> int:  # fmt: skip
    """Submit the runs that are left; `failed` are those that failed before, and are not left."""
    from structlin_nn.recipes._config import assigned
    from structlin_nn.sweeps.submit import failures, submit

    submitted: dict[str, Any] = {}
    now: dict[str, str] = {}
    if left:
        name = Path(arguments.name).stem
        logs = next(iter(left.values())).folder.parent / "submitit"
        submitted = submit(
            name, left, logs, cluster=arguments.submit, workers=workers, launcher=launcher,
            parameters=assigned(arguments.submit_set),
        )  # fmt: skip
        now = {} if arguments.submit == "slurm" else failures(submitted)
    _print_failed(now)
    _print_number_failed(failed, planned)
    if arguments.json:
        print_json({"submitted": {run: job.job_id for run, job in submitted.items()}, "failed": failed | now})
    elif left and not arguments.quiet:
        print_table(("run", "job"), [(run, job.job_id) for run, job in submitted.items()], left=2)
        print(f"\nlogs: {logs}")
    return 1 if now or (failed and not left) else 0


def _print_failed(failed: Mapping[str, str]) -> None:
    for name, message in failed.items():
        fail("sweep", f"{name}: {message}")


def _print_number_failed(failed: Mapping[str, str], planned: Mapping[str, Any]) -> None:
    """Print in one line on stderr which runs failed, if any did."""
    from structlin_nn.sweeps.local import number_of_runs

    if failed:
        resumed = "it" if len(failed) == 1 else "them"
        count = f"{len(failed)} of {number_of_runs(len(planned))} failed"
        fail("sweep", f"{count}: {_some([*failed])}; --retry resumes {resumed}")


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN], *([f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else [])])
