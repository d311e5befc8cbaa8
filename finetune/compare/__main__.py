"""Which reward should I train on? Trains on each of several, and says what came of it.

    python -m finetune.compare --config configs/compare_tinyworld.yaml [--any_setting value]

Every entrant is a training by `run_ddpo.py` or `finetune.draft`, over several seeds, with equal pictures or seconds and
the same prompts. Base and tuned policies are judged by all evaluators on held-out prompts, from the same noise. The
report - HTML, Markdown, JSON - says who gained how much in whose eyes, who was gamed, and what follows by fixed rules.
Killed and started again, it goes on where it was. `--sheet` also writes blinded pages for people, and `--read_sheet
CSV` counts what they chose. A YAML names code: run only those you trust.
"""

import logging
import os
import sys
from collections.abc import Sequence

import diffusers
import transformers
from rich.console import Console

transformers.logging.set_verbosity_error()  # says on import what does not concern us
transformers.logging.disable_progress_bar()
diffusers.logging.disable_progress_bar()

from finetune.compare.agreement import check_agreement  # noqa: E402
from finetune.compare.config import CompareArguments, read_comparison  # noqa: E402
from finetune.compare.folder import check_folder, claim  # noqa: E402
from finetune.compare.report import write_report  # noqa: E402
from finetune.compare.results import read_results  # noqa: E402
from finetune.compare.runs import Work, read_outcome  # noqa: E402
from finetune.compare.sheet import KEYS, count_answers, read_answers, write_sheet  # noqa: E402
from reward.arguments import main_guard, parse_arguments  # noqa: E402
from reward.folder_lock import check_free, taken  # noqa: E402
from rl.checkpoints import check_writable  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    (arguments,) = parse_arguments([CompareArguments], argv)
    console = Console(highlight=False, soft_wrap=True)

    if arguments.gpus:  # settings of a training are read as in its own process, which sees one of them
        os.environ["CUDA_VISIBLE_DEVICES"] = arguments.gpus[0]
    # Whatever can be wrong with the input is found out before anything is run.
    comparison = read_comparison(arguments)
    if not arguments.report_only:
        check_agreement(comparison)
    check_folder(comparison)
    check_writable(arguments.output_dir)
    answers = read_answers(comparison, arguments.read_sheet) if arguments.read_sheet else None
    check_free(arguments.output_dir)

    with taken(arguments.output_dir) as lock:
        claim(comparison)
        outcome = read_outcome(comparison) if arguments.report_only else Work(comparison, console, lock).do()
        results = read_results(comparison, outcome.failures)
        counted = count_answers(answers) if answers is not None else None
        command = ["python", "-m", "finetune.compare", *(sys.argv[1:] if argv is None else argv)]
        report = write_report(comparison, results, outcome.agreement, counted, command, console)
        if arguments.sheet:
            pages = write_sheet(comparison, results, report.verdict)
            console.print(f"pages for people: {pages}; fill in answers.csv beside them, then --read_sheet it")
            console.print(f"who is who lies in {comparison.folder / KEYS}: keep that from those who answer")
    for name, path in report.files.items():
        console.print(f"{name}: {path}", markup=False)
    console.print(f"[bold]{report.verdict.headline}[/]")
    failed = {f"{name}, seed {seed}": failure for (name, seed), failure in outcome.failures.items()}
    if outcome.agreement is not None:
        failed["before training"] = outcome.agreement
    for what, failure in failed.items():
        print(f"failed: {what}: {failure.step}: {failure.said}; see {failure.log}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main_guard(main)
