"""What is told when a training has ended: of a run, a stage, the roadmap; and the exit status that says it."""

from pathlib import Path
from typing import TYPE_CHECKING

from moe_lab.terminal import DIVERGED, DONE, FAILED, console, interrupted, print_json

if TYPE_CHECKING:
    from moe_lab.roadmap import Result
    from moe_lab.stages import Stage
    from moe_lab.train import Outcome


def report_run(outcome: "Outcome", as_json: bool) -> int:
    """Prints how a run ended; the exit status."""
    from moe_lab import frames, tables

    if outcome.signal is not None:
        return interrupted(outcome.out, outcome.signal)
    record = frames.read_run(outcome.out)
    if as_json:
        # The results stand at the top, as the binary prints them.
        print_json({"run": outcome.out, "status": record.get("status"), **(record.get("results") or {})})
        return DONE
    tables.render([tables.summary(outcome.out)], console())
    _print_answer(outcome.out)
    print(f"run directory: {outcome.out}")
    return DONE


def _print_answer(out: str) -> None:
    """The greedy answer to one training question: the last of the samples that the engine wrote."""
    from moe_lab import frames

    sample = frames.last_sample(out)
    if sample is not None:
        print(f"{sample[0]}\n  {sample[1]}")


def report_stage(stage: "Stage", as_json: bool) -> int:
    """Prints how a stage ended and writes its page; the exit status."""
    from moe_lab import report, tables

    if stage.signal is not None:
        return interrupted(stage.out, stage.signal)
    page = report.write(stage.out)
    if as_json:
        verdicts = [verdict.as_dict() for verdict in stage.verdicts]
        passed = stage.passed if stage.judged else None
        print_json({"stage": stage.out, "passed": passed, "gates": verdicts, "runs": list(stage.rows)})
    else:
        shown = console()
        tables.render(stage.rows, shown, title=stage.title)
        for verdict in stage.verdicts:
            tables.render_verdict(verdict, shown)
        print(f"stage directory: {stage.out}\nreport: {page}")
    if stage.diverged:
        return DIVERGED
    return DONE if stage.passed or not stage.judged else FAILED


def report_roadmap(result: "Result", as_json: bool) -> int:
    """Prints how far the roadmap came and writes its page; the exit status."""
    from moe_lab import report, roadmap, tables

    if result.signal is not None:
        return interrupted(result.out, result.signal)
    page = report.write(result.out)
    if as_json:
        told = {
            "roadmap": result.out,
            "failed": result.failed,
            "why": result.why,
            "rows": roadmap.rows(Path(result.out)),
        }
        print_json({**told, "gates": [verdict.as_dict() for verdict in result.verdicts.values()]})
    else:
        shown = console()
        for verdict in result.verdicts.values():
            tables.render_verdict(verdict, shown)
        roadmap.render(Path(result.out), shown)
        print(f"roadmap directory: {result.out}\nreport: {page}")
        if result.failed:
            print(f"stopped at {result.failed}: {result.why}")
    if result.diverged:
        return DIVERGED
    return FAILED if result.failed else DONE
