# SPDX-License-Identifier: Apache-2.0
"""A task as its owner writes it: which bundle, how to fold, what devices may spend. Data only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from coordinator.fleet import Entry
from coordinator.quarantine import Rules
from coordinator.strategy import Strategy, fedavg
from coordinator.sums import MAX_EXAMPLES
from coordinator.tags import where
from edge_sdk import codec as codecs
from edge_sdk import params, topics
from edge_sdk.bundle import Bundle
from edge_sdk.correction import MOST, decay_of
from edge_sdk.errors import CodecError, ConfigError, MessageError
from edge_sdk.types import Spec

HEADROOM = 2e9
"""Of `max_norm * max_examples`: sixteen updates at both limits still fit the int64 sum."""


@dataclass(frozen=True, slots=True)
class Task:
    """A model to improve, and how.

    Args:
        name: 1 to 20 of a-z, 0-9 and -; part of every topic.
        bundle: a `.fedge` file or a loaded `Bundle`; it may not change in the life of a task.
        strategy: how updates become the next version.
        codec: a preset's name or a chain such as ``[["deadzone", 2.0], ["int8"]]``.
        downlink: the codec of the patches by which devices come from version to version; what one
            could not carry goes into the next. "dense" sends whole weights every time.
        epochs, steps, seconds: what a device may spend on a round; whichever ends first, None for
            no limit. One at least is given.
        batch: examples in a step.
        lr: in place of the bundle's learning rate.
        mu: strength of FedProx's pull to the base, in place of the strategy's; the bundle must have
            been built for it.
        late: "fold" puts a straggler's update into the next version, discounted by staleness;
            "refuse" tells the device that it came too late.
        max_norm: an update whose delta has a larger L2 norm is refused.
        max_examples: one update never weighs more than this many examples.
        devices: who may take part, by id; None for all.
        where: who may take part, by an expression over the tags of a device: `coordinator.tags`.
        quarantine: when a device whose updates are bad sits out, and for how long.
        seed: of cohorts and of what devices draw.

    Raises: ConfigError when a setting is out of bounds or the codec makes no sense.
    """

    name: str
    bundle: Bundle | str | Path
    strategy: Strategy = field(default_factory=fedavg)
    codec: str | Spec = "default"
    downlink: str | Spec = "downlink"
    epochs: int | None = 1
    steps: int | None = None
    seconds: float | None = None
    batch: int | None = 32
    lr: float | None = None
    mu: float | None = None
    late: Literal["fold", "refuse"] = "fold"
    max_norm: float = 1000.0
    max_examples: int = MAX_EXAMPLES
    devices: Sequence[str] | None = None
    where: str = ""
    quarantine: Rules = field(default_factory=Rules)
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            topics.checked_task(self.name)
            _ = self.codec_spec, self.down, self.entry
        except (MessageError, CodecError, ConfigError) as error:
            raise ConfigError(f"task {self.name}: {error}") from error
        for name in ("epochs", "steps", "batch", "max_examples"):
            _check_whole(self, name)
        for name in ("seconds", "lr", "mu", "max_norm"):
            _check_real(self, name)
        if self.max_norm * self.max_examples > HEADROOM:
            raise ConfigError(
                f"task {self.name}: expected max_norm * max_examples up to {HEADROOM:.0e} (the "
                f"integer sum's room), got {self.max_norm:g} * {self.max_examples}"
            )
        self._check_support()
        if self.mu is not None and self.strategy.correction:
            raise ConfigError(f"task {self.name}: {self.strategy.name} sets mu; leave it out")
        if self.epochs is None and self.steps is None and self.seconds is None:
            raise ConfigError(f"task {self.name}: expected epochs, steps or seconds, got none")
        if self.late not in ("fold", "refuse"):
            raise ConfigError(
                f'task {self.name}: expected late = "fold" or "refuse", got {self.late!r}'
            )
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**31):
            raise ConfigError(f"task {self.name}: expected a seed below 2**31, got {self.seed!r}")

    def _check_control(self, bundle: Bundle) -> None:
        """Refuse a control that fits no invitation, or that steps of this bundle do not follow."""
        strategy, count = self.strategy, params.count(bundle.shapes)
        if strategy.server.control is None:
            return
        if count > MOST:
            raise ConfigError(
                f"task {self.name}: {strategy.name} sends a control with each invitation, for at "
                f"most {MOST} trainable numbers, got {count}; train fewer layers or take feddyn"
            )
        settings = strategy.spec[1]
        told = settings["decay"] if isinstance(settings, dict) else 0.0
        found = decay_of(bundle.manifest["optimizer"])
        if found is None or told != found:
            needs = "sgd or momentum" if found is None else f"decay = {found:g}"
            raise ConfigError(
                f"task {self.name}: {strategy.name} follows the devices' steps and needs {needs} "
                f"here, got decay = {told:g} and a bundle of {bundle.manifest['optimizer']!r:.60}"
            )

    def _check_support(self) -> None:
        """Refuse a rule that compares devices number by number where they send different ones."""
        aggregator = self.strategy.aggregator
        if aggregator.buckets == 0 and not codecs.from_spec(self.codec).sends_all:
            raise ConfigError(
                f"task {self.name}: {self.strategy.name} over single devices needs a codec that "
                f"sends every number, such as dense or exact-ish, got {self.codec!r}; or give it "
                "buckets"
            )

    @property
    def entry(self) -> Entry:
        """Who may take part."""
        tagged = where(self.where) if self.where else None
        if self.devices is None:
            return Entry(None, tagged)
        if isinstance(self.devices, str) or not self.devices:
            raise ConfigError(f"expected devices to be a list of ids, got {self.devices!r}")
        return Entry(frozenset(map(topics.checked_device, self.devices)), tagged)

    @property
    def codec_spec(self) -> Spec:
        """The codec as an invitation spells it: a list of stages, presets resolved."""
        return codecs.from_spec(self.codec).spec

    @property
    def down(self) -> codecs.Codec | None:
        """The codec of patches; None where there are none."""
        found = codecs.from_spec(self.downlink)
        return None if found.spec == [["dense"]] else found

    @property
    def pull(self) -> float | None:
        """How strongly devices are pulled to the base: the task's `mu`, or its strategy's."""
        return self.strategy.mu if self.mu is None else self.mu

    def load(self) -> Bundle:
        """Return the bundle, read from its file if need be.

        Raises: BundleError when it is damaged, ConfigError when it is not there or cannot do what
            the task asks.
        """
        bundle = self.bundle
        if not isinstance(bundle, Bundle):
            try:
                bundle = Bundle.load(bundle)
            except OSError as error:
                reason = error.strerror or str(error)
                raise ConfigError(f"task {self.name}: bundle {self.bundle}: {reason}") from error
        if self.pull and not bundle.manifest["proximal"]:
            raise ConfigError(
                f"task {self.name}: {'mu' if self.mu else self.strategy.name} needs a bundle built "
                "with proximal=True; rebuild it with fedge build --proximal"
            )
        self._check_control(bundle)
        return bundle


def _check_whole(task: Task, name: str) -> None:
    value = getattr(task, name)
    if value is None and name != "max_examples":
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**32:
        raise ConfigError(
            f"task {task.name}: expected {name} to be a whole number of 1 or more, got {value!r}"
        )


def _check_real(task: Task, name: str) -> None:
    value = getattr(task, name)
    if value is None and name != "max_norm":
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    lowest_ok = is_number and (value >= 0 if name == "mu" else value > 0)
    if not lowest_ok or not math.isfinite(value):
        raise ConfigError(f"task {task.name}: expected {name} to be above 0, got {value!r}")
