"""A run of a load program as JSON and as a picture over time. Used by overload.py and soak.py."""

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from bench.watch import Sample, Watch
from service.version import VERSION

_APART_SECONDS = 0.2  # of two samples, for a rate to be told from them
_BINS = 60  # of the time, in each of which latencies have their percentiles


def keep(
    out: Path,
    module: str,
    watch: Watch,
    found: Mapping[str, Any],
    *,
    latencies: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    marks: Sequence[tuple[float, str]] = (),
) -> None:
    """Write what was `found` by `module`, and where and when, into .json beside the name `out`, and draw .svg."""
    about = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "version": VERSION,
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        **found,
        "growth": [asdict(each) for each in watch.growths()],
        "samples": [asdict(each) for each in watch.samples],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    title = " · ".join(str(about[name]) for name in ("command", "device", "date"))
    draw(out.with_suffix(".svg"), title, watch.samples, latencies=latencies, marks=marks)


def draw(
    path: Path,
    title: str,
    samples: Sequence[Sample],
    *,
    latencies: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    marks: Sequence[tuple[float, str]] = (),
) -> None:
    """`latencies` are moments (monotonic seconds) and seconds, by what is told of them; `marks` are faults."""
    begin = samples[0].at
    at = np.array([each.at for each in samples]) - begin
    figure, panels = plt.subplots(4, 1, figsize=(11, 12), sharex=True, layout="constrained")
    figure.suptitle(title)
    for name, (moments, seconds) in latencies.items():
        for percentile, style in ((50, "-"), (99, ":")):
            panels[0].plot(*_percentiles(np.array(moments) - begin, np.array(seconds), at[-1], percentile), style)
            panels[0].lines[-1].set_label(f"{name}, p{percentile}")
    panels[0].set(yscale="log", ylabel="milliseconds")
    apart = [0, *(np.flatnonzero(np.diff(at) >= _APART_SECONDS) + 1)]
    tokens = np.array([samples[place].generated_tokens for place in apart])
    panels[1].plot(at[apart][1:], np.diff(tokens) / np.diff(at[apart]), label="generated tokens/s")
    panels[1].set(ylabel="tokens/s", ylim=(0, None))
    panels[2].plot(at, [each.running for each in samples], label="running")
    panels[2].plot(at, [each.waiting for each in samples], label="waiting")
    panels[2].set(ylabel="sequences", ylim=(0, None))
    for name in samples[0].memory_mib:
        panels[3].plot(at, [each.memory_mib.get(name, np.nan) for each in samples], label=name)
    panels[3].set(ylabel="MiB", ylim=(0, None), xlabel="seconds")
    for place, panel in enumerate(panels):
        for moment, name in marks:
            panel.axvline(moment - begin, color="grey", linewidth=0.8, linestyle="--")
            if not place:
                panel.annotate(
                    name, (moment - begin, 1.01), xycoords=("data", "axes fraction"), rotation=40, fontsize=7
                )
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=8, loc="upper right")
    figure.savefig(path)
    plt.close(figure)


def _percentiles(
    moments: np.ndarray, seconds: np.ndarray, end: float, percentile: float
) -> tuple[list[float], list[float]]:
    """The middle of each part of the time that has values, and the percentile of these in milliseconds."""
    edges = np.linspace(0, max(end, 1e-9), _BINS + 1)
    places = np.digitize(moments, edges) - 1
    found = [place for place in range(_BINS) if (places == place).any()]
    return (
        [float(edges[place] + edges[place + 1]) / 2 for place in found],
        [float(1000 * np.percentile(seconds[places == place], percentile)) for place in found],
    )
