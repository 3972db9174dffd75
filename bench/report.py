"""The results as JSON, as a Markdown table, and as a plot."""

from __future__ import annotations

import json
import statistics
from html import escape
from pathlib import Path

from plugin_ways import PluginWay
from suite import Results, Row, Settings
from way import blocks_swapped, split_with

from block_swap.pass_schedule import predict
from block_swap.step_time import improve

GIB = 1 << 30
MIB = 1 << 20
COLOURS = ("#000000", "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")


def write(folder: Path, name: str, machine: dict, settings: Settings, results: Results) -> str:
    """Write ``name``.json, .md and .svg into ``folder``; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    simulated = bool(machine["simulated"])
    text = markdown(machine, settings, results)
    rows = [as_dict(row, results, simulated) for row in results.complete()]
    whole = {
        "machine": machine,
        "blocks": {shape.name: shape.layers for shape in settings.shapes},
        "rounds": settings.rounds,
        "rows": rows,
        "not_at_hand": results.not_at_hand,
        "remarks": results.remarks,
        "skipped": results.skipped,
        "failed": results.failed,
    }
    (folder / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (folder / f"{name}.svg").write_text(plot(results), encoding="utf-8")
    return text


def as_dict(row: Row, results: Results, simulated: bool) -> dict[str, object]:
    """One row of the JSON: seconds, bytes, bytes per second."""
    low, middle, high = quartiles(row.seconds)
    out = {
        "model": row.point.model,
        "format": row.point.form,
        "length": row.length.name,
        "tokens": row.length.tokens,
        "way": row.way,
        "blocks_swapped": _swapped(row),
        "share_swapped": _share(row),
        "bytes_to_move": results.bytes_to_move(row),
        "step": {"median": middle, "q1": low, "q3": high, "passes": len(row.seconds)},
        "resident_step": results.resident_step(row),
        "bandwidth": results.bandwidth(row),
        "flops_per_second": results.flops[row.panel] / results.resident_step(row),
        "bound": results.bound(row),
        "ratio": results.ratio(row),
        "equal": row.equal,
        "peak_device_bytes": row.peak_device,
        "peak_device_bytes_loading": row.peak_load,
    }
    if row.way == PluginWay.name:
        out["slots"] = row.split.slots
        out["slot_bytes"] = row.split.slot_bytes
        out["predicted"] = predict(row.split, results.timing(row))
    if not simulated:
        out["allocator"] = row.allocator
        out["over_native"] = results.over_native(row)
        out["peak_rss_bytes"] = row.peak_rss
        out["load_seconds"] = statistics.median(row.load_seconds)
        out["first_step_seconds"] = _median(row.first_seconds)
        out["host_seconds"] = _median(row.host_seconds)
    return out


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def markdown(machine: dict, settings: Settings, results: Results) -> str:
    """All tables: one per model, format and length, the ways at every share below each other."""
    simulated = bool(machine["simulated"])
    both = len(results.allocators) > 1
    facts = [f"{key} {value}" for key, value in machine.items() if key != "simulated"]
    lines = [f"# {machine['device']}", "", ", ".join(facts), ""]
    layers = {shape.name: shape.layers for shape in settings.shapes}
    for panel, rows in _panels(results).items():
        model, form, length = panel
        flops = results.flops[panel] / results.resident_step(rows[0])
        lines += [
            f"## {model}, {form}, {length.name}: {length.tokens} tokens, {layers[model]} blocks",
            "",
            f"Weights {_size(results.weights[model, form])}, link "
            f"{results.bandwidth(rows[0]) / 1e9:.3g} GB/s, everything resident "
            f"{flops / 1e12:.3g} TFLOP/s.",
            "",
        ]
        names = ["swapped", "way", *([] if simulated else ["allocator"])]
        heads = ["step [ms]", "spread", *(["to native"] if both else []), "ratio to bound"]
        heads += ["predicted [ms]", "equal", "device peak"]
        heads += [] if simulated else ["RAM peak", "host [ms]", "load [s]", "first step [s]"]
        lines.append(f"| {' | '.join(names + heads)} |")
        lines.append("|---:|" + "---|" * (len(names) - 1) + "---:|" * len(heads))
        for row in rows:
            low, middle, high = quartiles(row.seconds)
            cells = [
                f"{_swapped(row)} of {row.point.layers}, {_share(row):.0%}",
                row.way,
                *([] if simulated else [row.allocator]),
                f"{middle * 1e3:.4g}",
                f"{(high - low) / middle:.1%}",
                *([_over_native(results, row)] if both else []),
                f"{results.ratio(row):.3f}",
                _predicted(results, row),
                "yes" if row.equal else "**NO**",
                _size(row.peak_device),
            ]
            if not simulated:
                cells += [
                    _size(row.peak_rss),
                    f"{statistics.median(row.host_seconds) * 1e3:.4g}",
                    f"{statistics.median(row.load_seconds):.1f}",
                    f"{statistics.median(row.first_seconds):.1f}" if row.first_seconds else "",
                ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *_quotas(results, rows[0]), ""]
    for title, entries in (
        ("Not at hand", [f"{name}: {why}" for name, why in results.not_at_hand.items()]),
        ("Remarks", results.remarks),
        ("Failed", results.failed),
        ("Not measured, the time was used up", results.skipped),
    ):
        if entries:
            lines += [f"## {title}", "", *(f"- {entry}" for entry in entries), ""]
    return "\n".join(lines).rstrip()


def _swapped(row: Row) -> int:
    """How many blocks were swapped while the row was measured."""
    return blocks_swapped(row.split)


def _share(row: Row) -> float:
    """The share of the blocks' bytes that was swapped then."""
    sizes = row.split.sizes
    swapped = sum(sizes.parts[i].nbytes for i in row.split.swapped)
    return swapped / sum(block.nbytes for block in sizes.blocks)


def _predicted(results: Results, row: Row) -> str:
    """What ``step_time`` says of this plugin's split, from the resident step and the link."""
    if row.way != PluginWay.name:
        return ""
    return f"{predict(row.split, results.timing(row)) * 1e3:.4g}"


def _over_native(results: Results, row: Row) -> str:
    ratio = results.over_native(row)
    return "" if ratio is None else f"{ratio:.3f}"


def _quotas(results: Results, row: Row) -> list[str]:
    """What each quota would cost of this format and length, as predicted."""
    split, timing = row.point.split, results.timing(row)
    lines = ["Predicted for this plugin, by the quota of the compute device:", ""]
    shown = {}
    for share in range(0, 101, 10):
        other = improve(split_with(split.sizes, share, split.compute_device), timing)
        shown.setdefault(other.compute_bytes, predict(other, timing))
    lines.append(f"| quota | {' | '.join(_size(nbytes) for nbytes in shown)} |")
    lines.append("|---|" + "---:|" * len(shown))
    lines.append(f"| step [ms] | {' | '.join(f'{s * 1e3:.4g}' for s in shown.values())} |")
    times = (f"{seconds / timing.compute:.2f}" for seconds in shown.values())
    lines.append(f"| over everything resident | {' | '.join(times)} |")
    return lines


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.1f} MiB"


def _panels(results: Results) -> dict[tuple, list[Row]]:
    panels: dict[tuple, list[Row]] = {}
    for row in results.complete():
        panels.setdefault(row.panel, []).append(row)
    for rows in panels.values():  # processes come one after the other, but are read side by side
        shares = list(dict.fromkeys(row.point.share for row in rows))
        ways = list(dict.fromkeys(row.way for row in rows))
        rows.sort(key=lambda row: (shares.index(row.point.share), ways.index(row.way)))
    return panels


# ------------------------------------------------------------------------------------ the plot

WIDTH, HEIGHT, MARGIN, PER_LINE = 360, 220, 50, 3
ASIDE = ", with "  # between a way and another allocator


def plot(results: Results) -> str:
    """An SVG of one panel per model, format and length: step over share, a line per way."""
    panels = list(_panels(results).items())
    ways = list(dict.fromkeys(_series(row) for row in results.complete()))
    across = max(1, min(PER_LINE, len(panels)))
    down = -(-len(panels) // PER_LINE)
    legend = 18 * (len(ways) + 1) + 12
    width, height = across * (WIDTH + MARGIN) + 20, down * (HEIGHT + 70) + legend
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, ((model, form, length), rows) in enumerate(panels):
        left = MARGIN + number % PER_LINE * (WIDTH + MARGIN)
        top = 30 + number // PER_LINE * (HEIGHT + 70)
        parts += _panel(f"{model}, {form}, {length.name}", left, top, rows, ways, results)
    for number, name in enumerate([*ways, "bound"]):
        y = height - legend + 18 * number + 12
        parts.append(_line([(MARGIN, y), (MARGIN + 30, y)], *_style(name, ways)))
        parts.append(f'<text x="{MARGIN + 38}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(title: str, left: int, top: int, rows: list[Row], ways: list[str], results: Results):
    """Axes, ticks and lines of one panel whose plotting area starts at ``left``, ``top``."""
    lines = {way: [] for way in [*ways, "bound"]}
    for row in rows:
        share = _share(row)
        lines[_series(row)].append((share, statistics.median(row.seconds) * 1e3))
        if row.allocator == rows[0].allocator:
            lines["bound"].append((share, results.bound(row) * 1e3))
    highest = max(y for points in lines.values() for _, y in points) * 1.05

    def place(point):
        return left + point[0] * WIDTH, top + HEIGHT - point[1] / highest * HEIGHT

    yield f'<text x="{left}" y="{top - 10}" font-weight="bold">{escape(title)}</text>'
    for tick in range(5):
        (x, _), (_, y) = place((tick / 4, 0)), place((0, highest * tick / 4))
        yield _line([(left, y), (left + WIDTH, y)], "#ddd", "")
        label = f"{highest * tick / 4:.3g}"
        yield f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        yield f'<text x="{x}" y="{top + HEIGHT + 14}" text-anchor="middle">{tick * 25}%</text>'
    axis = "share of the blocks swapped; step [ms]"
    yield f'<text x="{left + WIDTH / 2}" y="{top + HEIGHT + 28}" text-anchor="middle">{axis}</text>'
    for way, points in lines.items():
        colour, dashes = _style(way, ways)
        places = [place(point) for point in sorted(set(points))]
        yield _line(places, colour, dashes)
        for x, y in places if way != "bound" else ():
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>'


def _series(row: Row) -> str:
    """The line that a row belongs to; those of PyTorch's own allocator have the way's name."""
    return row.way if row.allocator in ("", "native") else f"{row.way}{ASIDE}{row.allocator}"


def _style(way: str, ways: list[str]) -> tuple[str, str]:
    """Colour and dashes of a line."""
    if way == "bound":
        return "#bbbbbb", "5 4"
    names = list(dict.fromkeys(name.partition(ASIDE)[0] for name in ways))
    name, aside, _ = way.partition(ASIDE)
    return COLOURS[names.index(name) % len(COLOURS)], "2 2" if aside else ""


def _line(points, colour: str, dashes: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashed}/>'
