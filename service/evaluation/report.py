"""What an evaluation found: as JSON, as lines to read, and in a sentence against the paper."""

from collections.abc import Mapping
from typing import Any

from service.evaluation.tasks import Task

_CLOSE = 0.01  # of the paper's figure: other kernels and precisions move it by less
_SHARES = ("accuracy",)


def verdict(task: Task, figures: Mapping[str, Any], model_incomparable: str | None) -> str | None:
    """None for a task that the paper does not have."""
    if task.paper is None:
        return None
    name, theirs = task.paper
    shown = _as_in_paper(name, theirs)
    if reason := task.incomparable or model_incomparable:
        return f"not to be compared with the paper's {shown}: {reason}"
    ours = figures[name]
    difference = ours / theirs - 1
    met = "reproduced" if abs(difference) <= _CLOSE else "NOT reproduced"
    return f"{met}: {_as_in_paper(name, ours)}, and {shown} in the paper ({difference:+.2%})"


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report for a reader, a line each."""
    data, figures = report["data"], report["figures"]
    counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in data.items() if isinstance(value, int))
    found = [("data", f"{data['file']}: {counts}")]
    found += [("skipped", f"line {each['line']}: {each['reason']}") for each in report["skipped"]]
    found.append(("protocol", ", ".join(f"{name} {value}" for name, value in report["protocol"].items())))
    found.append(("model", ", ".join(str(value) for value in report["model"].values())))
    for name, value in figures.items():
        if name.endswith("_interval"):
            continue
        text = _shown(name, value)
        if (interval := figures.get(f"{name}_interval")) is not None:
            text += f" (95 %: {_shown(name, interval[0])} to {_shown(name, interval[1])})"
        found.append((name.replace("_", " "), text))
    seconds, rate = report["seconds"], report["tokens_per_second"]
    found.append(("time", f"{seconds:.1f} s" + ("" if rate is None else f", {rate:,.0f} tokens/s")))
    if report["verdict"] is not None:
        found.append(("verdict", report["verdict"]))
    return [f"{name:20} {text}" for name, text in found]


def _as_in_paper(name: str, value: float) -> str:
    """To two digits."""
    return f"{value:.2%}" if name in _SHARES else f"{value:.2f}"


def _shown(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2%}" if name in _SHARES else f"{value:.4f}"
