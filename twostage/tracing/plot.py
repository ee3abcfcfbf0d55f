"""A picture of a trace: who ran what and when, how many calls ran, how many tokens waited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twostage.base.words import STAGES
from twostage.tracing.timeline import calls_running, lanes, sums, tokens_waiting

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from twostage.observing.record import Attempts, Record
    from twostage.tracing.timeline import Steps

__all__ = ["plot"]

# Okabe and Ito's colours, which all eyes can tell apart: https://jfly.uni-koeln.de/color/
COLOURS = {1: "#0072B2", 2: "#56B4E9"}
RETRIED = "#F0E442"
FAILED = "#D55E00"
WAITING = "#CC79A7"
DELAYED = "#009E73"
HELD = "#777777"

MANY = 4_000  # attempts, from which on most of them would be narrower than a pixel
BINS = 900  # along the time, then
GAP = 0.06  # of all lanes, between the stages


def plot(trace: Record, path: str | os.PathLike[str] | None) -> Figure:
    """Returns a figure of a trace, and writes it to a file if there is to be one."""
    attempts = {stage: trace.stage(stage) for stage in (1, 2)}
    if not len(trace):
        raise ValueError("the trace has no attempts: nothing was asked for")
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError(
            "a plot needs matplotlib, which is not installed: pip install 'twostage[plot]'"
        ) from error
    seconds = max(trace.seconds, *(max(one.ended, default=0.0) for one in attempts.values())) or 1.0
    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    _timeline(above, trace, attempts, seconds)
    _counts(below, trace, attempts, seconds)
    below.set_xlim(0, seconds)
    below.set_xlabel("seconds since the job began")
    if path is not None:
        figure.savefig(path)
    return figure


# --- the timeline


def _timeline(axes: Axes, trace: Record, attempts: dict[int, Attempts], seconds: float) -> None:
    many = len(trace) > MANY
    lanes_of = {stage: lanes(one) for stage, one in attempts.items()}
    heights = {stage: max(lane_of, default=0) + 1 for stage, lane_of in lanes_of.items()}
    gap = GAP * sum(heights.values())
    top, ticks = 0.0, []
    kinds: dict[str, Any] = {f"{STAGES[stage]}: answered": {"facecolor": COLOURS[stage]} for stage in (1, 2)}
    for stage, one in attempts.items():
        lane_of, height = lanes_of[stage], heights[stage]
        if many:
            _draw_shares(axes, one, lane_of, stage, (top, height, seconds))
        else:
            _draw_bars(axes, one, lane_of, stage, top)
        if not many and any(number > 1 for number in one.number):
            kinds["answered after a retry"] = {"facecolor": RETRIED}
        if any(one.ending):
            kinds["failed"] = {"facecolor": FAILED}
        if pauses := [(since, until - since) for since, until, _ in trace.pauses(stage)]:
            look: dict[str, Any] = {"facecolor": "none", "edgecolor": HELD, "hatch": "////", "linewidth": 0.0}
            axes.broken_barh(pauses, (top - 0.1, height + 0.1), zorder=3, **look)
            kinds["held back by the API"] = look
        ticks.append((top + height / 2, f"{STAGES[stage]}\n{height} at once"))
        top += height + gap
    axes.set_ylim(top - gap + 0.1, -0.1)  # stage one is above stage two
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="both", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    busy = "; the darker, the busier each worker was" if many else ", a line for each worker"
    axes.set_title(f"{len(trace):,} attempts{busy}", loc="left", fontsize=10, pad=22)
    _legend(axes, kinds)


def _draw_bars(axes: Axes, attempts: Attempts, lane_of: Sequence[int], stage: int, top: float) -> None:
    from matplotlib.collections import PolyCollection  # noqa: PLC0415 - an extra

    corners, colours = [], []
    for place, lane in enumerate(lane_of):
        left, right = attempts.began[place], attempts.ended[place]
        low, high = top + lane + 0.08, top + lane + 0.92
        corners.append([(left, low), (right, low), (right, high), (left, high)])
        retried = RETRIED if attempts.number[place] > 1 else COLOURS[stage]
        colours.append(FAILED if attempts.ending[place] else retried)
    bars = PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=0.4)
    axes.add_collection(bars, autolim=False)


def _draw_shares(
    axes: Axes, attempts: Attempts, lane_of: Sequence[int], stage: int, box: tuple[float, int, float]
) -> None:
    """Draws each lane as a strip, which is the darker the busier it was, with what failed on it."""
    import numpy as np  # noqa: PLC0415 - matplotlib brings it
    from matplotlib.colors import to_rgb  # noqa: PLC0415 - an extra

    top, height, seconds = box
    edges = np.linspace(0, seconds, BINS + 1)
    strips = np.ones((height, BINS, 3))
    of_lane: list[list[int]] = [[] for _ in range(height)]
    for place in sorted(range(len(lane_of)), key=attempts.began.__getitem__):
        of_lane[lane_of[place]].append(place)
    for lane, places in enumerate(of_lane):
        busy = _shares(edges, attempts, places)
        failed = _shares(edges, attempts, [place for place in places if attempts.ending[place]])
        # What fails is often over in no time: it is shown at least as wide as a bin.
        for place in places:
            if attempts.ending[place]:
                failed[min(int(attempts.began[place] / seconds * BINS), BINS - 1)] = 1.0
        for share, colour in ((busy, COLOURS[stage]), (failed, FAILED)):
            strips[lane] += share[:, None] * (np.array(to_rgb(colour)) - strips[lane])
    axes.imshow(strips, extent=(0, seconds, top + height, top), aspect="auto", interpolation="antialiased")


def _shares(edges: Any, attempts: Attempts, places: Sequence[int]) -> Any:  # noqa: ANN401 - arrays of numpy
    """Returns which share of each bin attempts that do not overlap take."""
    import numpy as np  # noqa: PLC0415 - matplotlib brings it

    began = np.array([attempts.began[place] for place in places])
    ended = np.array([attempts.ended[place] for place in places])
    if not len(places):
        return np.zeros(len(edges) - 1)
    times = np.stack([began, ended], axis=1).ravel()
    taken = np.cumsum(ended - began)
    by_then = np.stack([taken - (ended - began), taken], axis=1).ravel()
    return np.clip(np.diff(np.interp(edges, times, by_then)) / np.diff(edges), 0.0, 1.0)


# --- the counts


def _counts(axes: Axes, trace: Record, attempts: dict[int, Attempts], seconds: float) -> None:
    lines = []
    for stage, one in attempts.items():
        lines += _line(axes, calls_running(one), seconds, f"{STAGES[stage]}'s calls running", COLOURS[stage])
    delayed = [change for stage in (1, 2) for since, until in trace.retries(stage)
               for change in ((since, 1), (until, -1))]  # fmt: skip
    if delayed:
        lines += _line(axes, sums(delayed), seconds, "calls that wait for a retry", DELAYED)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("calls")
    other = axes.twinx()
    lines += _line(
        other, tokens_waiting(attempts[1], attempts[2]), seconds, "tokens waiting (right)", WAITING
    )
    other.set_ylim(0, max(1.0, other.get_ylim()[1]))
    other.set_ylabel("tokens", color=WAITING)
    for panel in (axes, other):
        panel.spines["top"].set_visible(False)
        panel.locator_params(axis="y", integer=True)
    axes.legend(handles=lines, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(lines), fontsize=8,
                frameon=False, borderpad=0)  # fmt: skip


def _line(axes: Axes, steps: Steps, seconds: float, label: str, colour: str) -> list[Any]:
    steps = [(0.0, 0), *steps, (seconds, steps[-1][1] if steps else 0)]
    if len(steps) <= MANY:
        return axes.step(*zip(*steps, strict=True), where="post", label=label, color=colour, linewidth=1.4)
    import numpy as np  # noqa: PLC0415 - matplotlib brings it

    times, numbers = map(np.array, zip(*steps, strict=True))
    edges = np.linspace(0, seconds, BINS // 3 + 1)
    areas = np.concatenate([[0.0], np.cumsum(numbers[:-1] * np.diff(times))])
    means = np.diff(np.interp(edges, times, areas)) / np.diff(edges)
    return axes.plot((edges[1:] + edges[:-1]) / 2, means, label=label, color=colour, linewidth=1.4)


def _legend(axes: Axes, kinds: dict[str, Any]) -> None:
    from matplotlib.patches import Patch  # noqa: PLC0415 - an extra

    handles = [Patch(label=label, **look) for label, look in kinds.items()]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), fontsize=8,
                frameon=False, borderpad=0)  # fmt: skip
