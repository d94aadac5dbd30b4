# SPDX-License-Identifier: Apache-2.0
"""What a demo run showed: a record for machines, a table for people, curves as PNG."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One round as it ended; `accuracy` is of the exported model after it, None when aborted."""

    number: int
    outcome: str
    reported: int
    left: int
    late: int
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """One device: how its process ended and that one's peak resident memory by the kernel, in MiB.

    `hosted`: how many devices share the process.
    """

    id: str
    pid: int
    exit: int | None
    rss_mib: float
    training_rss_mib: float
    hosted: int = 1


@dataclass(frozen=True, slots=True)
class Record:
    """Everything a run measured. Bytes are PUBLISH payload bytes, for each device and round.

    Accuracies are shares of 1, or whatever `measure` says instead: the AUC of a search for
    anomalies, where `anomalies` holds what thresholds found.
    """

    accuracy_before: float
    accuracy_alone: float
    accuracy_after: float
    rounds: list[RoundRow]
    devices: list[DeviceRow]
    bytes_up_mean: float
    bytes_down_mean: float
    bytes_dense: int
    device_rss_mib: float
    training_rss_mib: float
    coordinator_rss_mib: float
    model_digest: str
    model_sha256: str
    broker: str
    seconds: float
    measure: str = "accuracy"
    anomalies: dict[str, Any] = field(default_factory=dict)
    bytes_update_mean: float = 0.0
    bytes_export: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as one JSON object."""
        return json.dumps(asdict(self), indent=1)


def table(record: Record) -> str:
    """Return the run as a table for a terminal of 80 columns."""
    rows = ["", f"round  outcome  reported  left  late  {record.measure} of the exported model"]
    rows += [_round(r) for r in record.rounds]
    rows += ["", *_accuracy(record), *_anomalies(record), "", *_bytes(record)]
    return "\n".join([*rows, "", *_memory(record)])


def _round(r: RoundRow) -> str:
    accuracy = "-" if r.accuracy is None else f"{r.accuracy:.3f}  {'#' * round(40 * r.accuracy)}"
    return f"{r.number:>5}  {r.outcome:<7}  {r.reported:>8}  {r.left:>4}  {r.late:>4}  {accuracy}"


def _accuracy(record: Record) -> list[str]:
    gain = 100 * (record.accuracy_after - record.accuracy_before)
    return [
        f"{record.measure} on rows that no device has seen",
        f"  as shipped             {record.accuracy_before:.3f}",
        f"  the mean device alone  {record.accuracy_alone:.3f}",
        f"  learning together      {record.accuracy_after:.3f}  ({gain:+.1f} points)",
    ]


def _anomalies(record: Record) -> list[str]:
    if not (found := record.anomalies):
        return []
    names = {
        "as shipped": "shipped",
        "the mean device alone": "alone",
        "learning together": "together",
    }
    lines = ["", "anomalies found         at 5 % false alarms  by the devices' thresholds"]
    for title, name in names.items():
        one = found[name]
        fair, own, false = one["detected_at_level"], one["detected"], one["false_alarms"]
        lines.append(f"  {title:<22}{fair:>12.3f}{own:>18.3f}, false alarms {false:.3f}")
    return lines


def _bytes(record: Record) -> list[str]:
    up, dense = record.bytes_up_mean, record.bytes_dense
    return [
        "bytes for each device and round, signatures and retries included",
        f"  up           {up:>9,.0f}  (1/{dense / up:.0f} of dense float32)"
        if up
        else "  up  none",
        f"  of it update {record.bytes_update_mean:>9,.0f}",
        f"  down         {record.bytes_down_mean:>9,.0f}",
        f"  dense float32{dense:>9,}",
    ]


def _memory(record: Record) -> list[str]:
    stayed, late = sum(d.exit == 0 for d in record.devices), sum(r.late for r in record.rounds)
    child, daemon = f"{record.training_rss_mib:.0f} MiB", f"{record.coordinator_rss_mib:.0f} MiB"
    return [
        f"peak memory: {_device_memory(record)}, child {child}, coordinator {daemon}",
        f"devices: {stayed} stayed, {len(record.devices) - stayed} left; late updates: {late}",
        f"broker: {record.broker}; {record.seconds:.0f} s; model {record.model_digest[:16]}",
    ]


def _device_memory(record: Record) -> str:
    most = max(record.devices, key=lambda device: device.rss_mib)
    if most.hosted == 1:
        return f"device {most.rss_mib:.0f} MiB"
    return f"process of {most.hosted} devices {most.rss_mib:.0f} MiB"


def curves(record: Record, path: Path) -> None:
    """Draw accuracy by round next to the shipped model and the mean device alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    done = [(r.number, r.accuracy) for r in record.rounds if r.accuracy is not None]
    axes.plot([0, *(n for n, _ in done)], [record.accuracy_before, *(a for _, a in done)], "o-")
    axes.axhline(record.accuracy_before, ls=":", color="gray", label="as shipped")
    axes.axhline(record.accuracy_alone, ls="--", color="tab:red", label="the mean device alone")
    axes.set(
        xlabel="round", ylabel=f"{record.measure} of the exported model", title="learning together"
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
