"""Figures as a table, as JSON and as a picture. Used by command.py.

The picture is SVG written by hand: three small panels need no library, and the package stays without one.
"""

from collections.abc import Callable, Sequence
from typing import Any
from xml.sax.saxutils import escape

import msgspec

from service.load.figures import SATURATED, Figures, Spread, knee_of

_COLUMNS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("requests", lambda row: str(row.requests)),
    ("errors", lambda row: str(sum(row.errors.values()))),
    ("requests/s", lambda row: f"{row.requests_per_second:.1f}"),
    ("tokens/s", lambda row: f"{row.tokens_per_second:,.0f}"),
    ("tokens/event", lambda row: "-" if row.tokens_per_event is None else f"{row.tokens_per_event:.2f}"),
    ("TTFT ms", lambda row: _spread(row.ttft)),
    ("TPOT ms", lambda row: _spread(row.tpot)),
    ("event gap ms", lambda row: _spread(row.gap)),
    ("end to end ms", lambda row: _spread(row.end_to_end)),
    ("client CPU", lambda row: f"{row.client_load:.0%}{'!' if row.saturated else ''}"),
)
_PANEL_WIDTH, _PANEL_HEIGHT, _MARGIN = 360, 240, 50
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c")


def load_name(row: Figures) -> str:
    return f"{row.level.load:g}{' clients' if row.level.loop == 'closed' else '/s'}"


def _spread(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.p50:.2f} {spread.p90:.2f} {spread.p99:.2f}"


def table(rows: Sequence[Figures]) -> str:
    """A line a level; latencies are their percentiles 50, 90 and 99. Below it, what went wrong."""
    lines = [["load", *(name for name, _ in _COLUMNS)]]
    lines += [[load_name(row), *(cell(row) for _, cell in _COLUMNS)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    for row in rows:
        text += [f"{load_name(row)}: {count} x {error}" for error, count in row.errors.items()]
        if row.refused is not None:
            text.append(f"{load_name(row)}: refused after {_spread(row.refused)} ms")
        if row.saturated:
            share = f"{SATURATED:.0%}"
            text.append(f"{load_name(row)}: a client process was busy over {share} of the time: use more --processes")
        if row.interrupted:
            text.append(f"{load_name(row)}: cut short")
    if (knee := knee_of(rows)) is not None:
        row = rows[knee]
        text.append(f"saturated from {load_name(row)} on, with {row.tokens_per_second:,.0f} tokens/s: more only wait")
    return "\n".join(text)


def to_json(about: dict[str, Any], rows: Sequence[Figures]) -> bytes:
    """`about` and the figures; latencies are in milliseconds."""
    knee = knee_of(rows)
    found = {**about, "saturated_from": None if knee is None else rows[knee].level.load, "levels": rows}
    return msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"


def picture(about: dict[str, Any], rows: Sequence[Figures]) -> str:
    """An SVG: throughput, time to first token and time a token against load, one level beside the next."""
    names = [f"{row.level.load:g}" for row in rows]
    panels: list[Panel] = [
        ("generated tokens/s", {"": [row.tokens_per_second for row in rows]}),
        ("end to end, ms", _percentiles([row.end_to_end for row in rows])),
    ]
    if any(row.ttft for row in rows):
        panels[1:] = [
            ("time to first token, ms", _percentiles([row.ttft for row in rows])),
            ("time per output token, ms", _percentiles([row.tpot for row in rows])),
        ]
    unit = "clients" if rows and rows[0].level.loop == "closed" else "requests/s"
    return chart(_title(about), unit=unit, names=names, panels=panels, knee=knee_of(rows))


Panel = tuple[str, dict[str, list[float | None]]]  # title, and the values of each line by its name


def chart(title: str, *, unit: str, names: Sequence[str], panels: Sequence[Panel], knee: int | None = None) -> str:
    """An SVG of panels side by side, each with its lines over the same levels, which `names` names.

    `knee` is the place of the level that saturates, which each panel marks.
    """
    width, height = len(panels) * (_PANEL_WIDTH + _MARGIN) + _MARGIN, _PANEL_HEIGHT + 3 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_MARGIN}" y="22">{escape(title)}</text>',
    ]
    for place, (name, series) in enumerate(panels):
        left = _MARGIN + place * (_PANEL_WIDTH + _MARGIN)
        parts += _panel(left, title=name, unit=unit, names=names, series=series, knee=knee)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _title(about: dict[str, Any]) -> str:
    return " · ".join(str(about[name]) for name in ("url", "model", "device", "date") if about.get(name))


def _percentiles(spreads: Sequence[Spread | None]) -> dict[str, list[float | None]]:
    return {
        name: [None if spread is None else float(getattr(spread, name)) for spread in spreads]
        for name in ("p50", "p99")
    }


def _panel(
    left: int,
    *,
    title: str,
    unit: str,
    names: Sequence[str],
    series: dict[str, list[float | None]],
    knee: int | None,
) -> list[str]:
    """Lines over evenly spaced levels; the vertical axis begins at 0."""
    top, bottom, right = _MARGIN + 16, _MARGIN + 16 + _PANEL_HEIGHT, left + _PANEL_WIDTH
    most = max((value for values in series.values() for value in values if value is not None), default=0) or 1
    step = _PANEL_WIDTH / max(1, len(names))
    parts = [
        f'<text x="{left}" y="{top - 8}" font-weight="bold">{title}</text>',
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black"/>',
        f'<text x="{(left + right) / 2:.0f}" y="{bottom + 34}" text-anchor="middle">{unit}</text>',
    ]
    for place, name in enumerate(names):
        parts.append(
            f'<text x="{left + (place + 0.5) * step:.0f}" y="{bottom + 16}" text-anchor="middle">{name}</text>'
        )
    if knee is not None:
        x = left + (knee + 0.5) * step
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="grey" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{bottom - 6}" fill="grey">saturated</text>')
    for colour, (label, values) in zip(_COLOURS, series.items(), strict=False):
        points = [
            (left + (place + 0.5) * step, bottom - value / most * (_PANEL_HEIGHT - 20), value)
            for place, value in enumerate(values)
            if value is not None
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, value in points:
            number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            parts.append(f'<text x="{x:.1f}" y="{y - 7:.1f}" text-anchor="middle" fill="{colour}">{number}</text>')
        if label and points:
            x, y, _ = points[-1]
            parts.append(f'<text x="{x + 22:.1f}" y="{y + 4:.1f}" fill="{colour}">{label}</text>')
    return parts
