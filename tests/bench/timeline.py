"""A picture of rollouts: what each host did, and what clients saw meanwhile. From what was measured, as SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# state -> colour and what it means
STATES = {
    "serves": ("#7fb77e", "serves"),
    "serves new": ("#2f7d4f", "serves the new version"),
    "drains": ("#f2c14e", "out of traffic, running requests end"),
    "refuses": ("#e07a5f", "stops, and refuses what comes"),
    "down": ("#9aa5b1", "stopped, starts"),
    "returns": ("#5b8db8", "answers, is proved, not in traffic yet"),
}
FAILED = "#c1121f"
LEFT, WIDTH, ROW, BARS = 130, 860, 22, 60


@dataclass(frozen=True)
class Span:
    """What a host did for a while."""

    host: str
    begin: float
    end: float
    state: str


@dataclass(frozen=True)
class Panel:
    """One rollout: its spans, and when requests ended, well and badly. Moments are seconds of one clock."""

    title: str
    begin: float
    end: float
    spans: Sequence[Span]
    good: Sequence[float]
    failed: Sequence[float]


def spans_of(host: str, edges: Sequence[tuple[float, str]], end: float) -> list[Span]:
    """From moments at which a state began."""
    found: list[Span] = []
    for (begin, state), (after, _) in zip(edges, [*edges[1:], (end, "")], strict=True):
        if found and found[-1].state == state:
            found[-1] = Span(host, found[-1].begin, after, state)
        else:
            found.append(Span(host, begin, after, state))
    return [span for span in found if span.end > span.begin]


def per_second(moments: Sequence[float], begin: float, end: float) -> Mapping[int, int]:
    """Second of the panel -> how many ended in it."""
    return Counter(int(moment - begin) for moment in moments if begin <= moment <= end)


def panel_height(panel: Panel) -> int:
    """Its pixels."""
    return 26 + ROW * len({span.host for span in panel.spans}) + 6 + BARS + 36


def drawn(panel: Panel, top: int, scale: float) -> list[str]:
    """One panel; `scale` is pixels for a second, the same for all, so that their lengths can be compared."""
    lines = [f'<text x="{LEFT}" y="{top + 16}" class="title">{escape(panel.title)}</text>']
    y = top + 26
    for host in sorted({span.host for span in panel.spans}):
        lines.append(f'<text x="{LEFT - 8}" y="{y + 14}" class="right">{escape(host)}</text>')
        for span in panel.spans:
            begin, end = max(span.begin, panel.begin), min(span.end, panel.end)
            if span.host == host and end > begin:
                x, width = LEFT + (begin - panel.begin) * scale, (end - begin) * scale
                told = f"{STATES[span.state][1]}, {end - begin:.1f} s"
                lines.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 4}" fill="{STATES[span.state][0]}"><title>{told}</title></rect>'
                )
        y += ROW
    good, failed = (per_second(moments, panel.begin, panel.end) for moments in (panel.good, panel.failed))
    seconds = range(math.ceil(panel.end - panel.begin))
    highest = max([good[second] + failed[second] for second in seconds] + [1])
    floor = y + 6 + BARS
    for second in seconds:
        height = BARS / highest
        x, width = LEFT + second * scale, max(scale - 0.5, 0.5)
        tall, bad = good[second] * height, failed[second] * height
        if good[second]:
            lines.append(
                f'<rect x="{x:.1f}" y="{floor - tall:.1f}" width="{width:.1f}" height="{tall:.1f}" class="good"/>'
            )
        if failed[second]:
            lines.append(
                f'<rect x="{x:.1f}" y="{floor - tall - bad:.1f}" width="{width:.1f}" height="{bad:.1f}" fill="{FAILED}"/>'
            )
    count = sum(failed.values())
    told = f"{sum(good.values()) + count} requests, {count} failed"
    lines += [
        f'<text x="{LEFT - 8}" y="{floor - BARS + 12}" class="right">answers a second</text>',
        f'<text x="{LEFT - 8}" y="{floor - BARS + 28}" class="right">(highest: {highest})</text>',
        f'<line x1="{LEFT}" x2="{LEFT + (panel.end - panel.begin) * scale:.1f}" y1="{floor}" y2="{floor}" stroke="#555"/>',
        f'<text x="{LEFT + WIDTH}" y="{top + 16}" class="{"failed" if count else "fine"}">{told}</text>',
    ]
    step = next(each for each in (5, 10, 15, 30, 60, 120, 300, 600) if each * scale > 45 or each == 600)
    for second in range(0, int(panel.end - panel.begin) + 1, step):
        lines.append(f'<text x="{LEFT + second * scale:.1f}" y="{floor + 14}" class="middle">{second} s</text>')
    return lines


def picture(panels: Sequence[Panel]) -> str:
    """All panels, one below the other, and what the colours mean."""
    scale = WIDTH / max(panel.end - panel.begin for panel in panels)
    lines, y = [], 10
    for panel in panels:
        lines += drawn(panel, y, scale)
        y += panel_height(panel)
    used = [state for state in STATES if any(span.state == state for panel in panels for span in panel.spans)]
    legend = [STATES[state] for state in used]
    if any(panel.failed for panel in panels):
        legend.append((FAILED, "failed requests"))
    for number, (colour, told) in enumerate(legend):
        x, line = LEFT + number % 3 * 290, y + number // 3 * 20
        lines.append(f'<rect x="{x}" y="{line}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 18}" y="{line + 11}">{escape(told)}</text>')
    height = y + (len(legend) + 2) // 3 * 20 + 10
    style = (
        "text{font:12px sans-serif;fill:#222}.title{font-weight:bold;font-size:14px}.right{text-anchor:end}.middle{text-anchor:middle;fill:#555}"
        f".fine{{text-anchor:end;fill:#2f7d4f;font-weight:bold}}.failed{{text-anchor:end;fill:{FAILED};font-weight:bold}}.good{{fill:#8fb8de}}"
    )
    size = f'width="{LEFT + WIDTH + 20}" height="{height}" viewBox="0 0 {LEFT + WIDTH + 20} {height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            f"<style>{style}</style>",
            '<rect width="100%" height="100%" fill="#fff"/>',
            *lines,
            "</svg>",
            "",
        ]
    )
