# SPDX-License-Identifier: Apache-2.0
"""The device as an application sees it: predict, learn, and a model that gets better by itself."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike, NDArray

from edge_sdk import __version__, topics
from edge_sdk.agent import Agent
from edge_sdk.bounds import MAX_TAGS, Tag, are_tags
from edge_sdk.bundle import Bundle
from edge_sdk.conditions import ConditionLike, always, condition
from edge_sdk.errors import ConfigError, MessageError
from edge_sdk.failpoints import Failpoints
from edge_sdk.limits import Limits
from edge_sdk.local import Local
from edge_sdk.model import Model
from edge_sdk.model_file import ModelFile
from edge_sdk.outbox import DEFAULT_CAP_BYTES, Outbox
from edge_sdk.presence import Presence
from edge_sdk.settings import Settings
from edge_sdk.store import Store, default_state
from edge_sdk.training import CHECKPOINT_S, ChildTrainer, LocalTraining
from edge_sdk.transport import Transport
from edge_sdk.trial import Terms
from edge_sdk.types import Clock

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

log = logging.getLogger(__name__)

CLOSE_PATIENCE_S = 2.5
POKE_UP_TO = 64
"""From this many examples on, one more does not make the agent look at the conditions at once."""

Will = Callable[[], tuple[str, bytes]]
Connect = Callable[[str, Will], Transport]
"""Makes a transport of your own, given a client id and what makes the will: anew each time that it
connects, for a will that was heard is worth nothing afterwards."""


class Device:
    """A board that predicts, learns from its own examples and takes part in rounds.

    Use it as a context manager, or call `start` and `close`. `predict` and `learn` work at once
    and from any thread, with the broker in reach or not. Nothing that comes over the network can
    make them fail: it is counted, logged and dropped.

    Args:
        broker: ``mqtts://host[:8883]`` or ``mqtt://host[:1883]``.
        task: the task's name, as the coordinator has it.
        bundle: what to begin with; without it, the coordinator's first offer brings one.
        state: this device's folder, for its key, examples, model and outbox; one process at a
            time. ``~/.local/state/fedge/TASK`` by default.
        model_file: where to keep the model that `predict` answers with as a file, ``.tflite`` or
            ``.onnx``, for an interpreter of your own. It is replaced whole with each version,
            before `when_updated` is called.
        conditions: when it may train, such as ``when.on_mains & when.idle``; or any ``() -> bool``.
        engine, threads: what runs the graphs; "auto" is the first that is installed and that the
            bundle has graphs for, of ort, litert and tflite.
        capacity: how many examples are kept; the newest push out the oldest.
        min_examples: with fewer the device does not take part.
        name: what people call this device; its id otherwise.
        coordinator_key: the one coordinator to obey (32 bytes, or hex); without it, the first one
            that is met.
        tags: what the device says of itself, such as ``{"site": "north"}``: tasks choose by it.
        ca_file, username, password: for the broker.
        error_quantile: for an anomaly detector (loss mse): `status` then tells `error_threshold`,
            the error that this share of the stored examples stays within.
        limits: the most that a bundle may take here, and learning in a day. A bundle beyond them,
            or one that fails the other checks, is never run: `status` says why, and the device
            waits for another. At a limit of the day it takes part in no round until the next.
        checkpoint_s: how often a training under way is kept on disk: one that is killed goes on
            from there. 0 is never.
        trial: what a new version has to show before the one before it is given up.
        connect, trainer, clock, root: ports, for tests and simulation.

    Raises: ConfigError, BundleError, StoreError or EngineError when it cannot work as asked.
    """

    def __init__(
        self,
        broker: str,
        *,
        task: str,
        bundle: Bundle | str | Path | None = None,
        state: str | Path | None = None,
        model_file: str | Path | None = None,
        conditions: ConditionLike = always,
        engine: str = "auto",
        threads: int = 1,
        capacity: int = 2000,
        min_examples: int = 1,
        name: str = "",
        tags: Mapping[str, Tag] | None = None,
        coordinator_key: bytes | str | None = None,
        ca_file: str | Path | None = None,
        username: str | None = None,
        password: str | None = None,
        keepalive_s: int = 30,
        outbox_bytes: int = DEFAULT_CAP_BYTES,
        error_quantile: float | None = None,
        limits: Limits | None = None,
        checkpoint_s: float = CHECKPOINT_S,
        trial: Terms | None = None,
        connect: Connect | None = None,
        trainer: LocalTraining | None = None,
        clock: Clock = time,
        root: Path = Path("/"),
    ) -> None:
        self.when_updated: Callable[[Model], object] | None = None
        """Called with the new model, in the agent's thread, after each switch: be quick."""
        _check_task(task)
        failpoints = Failpoints.from_environment()
        given = Bundle.load(bundle) if isinstance(bundle, str | Path) else bundle
        held = ModelFile(model_file) if model_file is not None else None
        most = (limits or Limits()).max_disk_bytes
        self._store = Store(state or default_state(task), max_bytes=most)
        try:
            key = self._store.identity()
            settings = Settings(
                task=task,
                name=name,
                tags=_checked_tags(tags),
                sdk=f"fedge {__version__}",
                boot=self._store.count_boot(),
                start=secrets.randbits(63) or 1,
                conditions=condition(conditions),
                min_examples=min_examples,
                threads=threads,
                engine=engine,
                root=root,
                limits=limits or Limits(),
                checkpoint_s=checkpoint_s,
                pinned=_key(coordinator_key),
            )
            self._local = Local(
                self._store,
                given,
                engine=engine,
                threads=threads,
                capacity=capacity,
                limits=limits,
                quantile=error_quantile,
                model_file=held,
                terms=trial,
            )
            presence = Presence(key, settings, self._store.count_boot)
            if connect is None:
                options = {"ca_file": ca_file, "username": username, "password": password}
                connect = _mqtt(broker, keepalive_s=keepalive_s, **options)
            self._transport = connect(key.id, presence.will)
            self._agent = Agent(
                settings,
                key=key,
                presence=presence,
                store=self._store,
                local=self._local,
                outbox=Outbox(self._store.outbox, outbox_bytes, quota=self._store.quota),
                transport=self._transport,
                trainer=trainer or ChildTrainer(),
                clock=clock,
                failpoints=failpoints,
                on_updated=self._updated,
            )
        except BaseException:
            self._store.close()
            raise
        self.id: str = key.id
        """This device's id: `d` and 15 hex digits of the hash of its public key."""
        self._is_open = True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Begin to take part, in the background. The broker may come later."""
        self._agent.start()

    def watch(self, alive: Callable[[], object]) -> None:
        """Call `alive` in the agent's thread whenever it has got on: at least every ten seconds.

        What feeds a watchdog. It must be quick, and not raise. Before `start`.
        """
        self._agent.on_turn = alive

    def close(self) -> None:
        """Stop: leave the broker politely, end a training under way, keep everything on disk.

        At most a few seconds. `predict` still answers afterwards.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._agent.stop()
        leaving = threading.Thread(target=self._transport.close, name="fedge-leave", daemon=True)
        leaving.start()  # a broker out of reach must not hold the application up
        leaving.join(CLOSE_PATIENCE_S)
        self._agent.settle()
        self._local.close()
        self._store.close()

    def predict(self, x: ArrayLike) -> NDArray[Any]:
        """Answer with the last good model, at once, whatever else is going on.

        `x`: one example or a batch; float32, or raw int8 for a model with an int8 input.
        Returns: the forward model's output for it, raw int8 where the model's output is int8.
        Raises: NoModelError before the first model; ValueError on another shape.
        """
        return self._local.predict(x)

    def learn(self, x: ArrayLike, label: ArrayLike) -> None:
        """Store one labelled example on this device; it never leaves it.

        Raises: NoModelError before the first model, which says what an example looks like;
            ValueError on another shape or an unknown class; StoreError when the disk is full.
        """
        self._local.learn(x, label)
        if self._local.examples <= POKE_UP_TO:
            self._agent.poke()

    def learn_many(self, xs: ArrayLike, labels: ArrayLike) -> None:
        """Store a batch of labelled examples, `[n, ...]`, with one write to disk. As `learn`."""
        self._local.learn(xs, labels)
        self._agent.poke()

    def error_quantile(self, level: float) -> float:
        """Return the mean squared error that a share `level` of the stored examples stays within.

        An anomaly detector's threshold, from what is normal here: an example whose reconstruction
        is further off than 0.95 of them is worth a look. Nothing leaves the device.
        Raises: NoModelError; ValueError without examples, or where the loss is not mse.
        """
        return self._local.error_quantile(level)

    def wait_for_model(self, timeout_s: float) -> bool:
        """Wait until there is a model to predict with; return whether there is."""
        return self._local.arrived.wait(timeout_s)

    @property
    def model(self) -> Model | None:
        """The model in use; None before the first."""
        return self._local.model

    @property
    def version(self) -> int | None:
        """The version of the model in use; 0 is what the bundle came with."""
        model = self._local.model
        return model.version if model is not None else None

    @property
    def online(self) -> bool:
        """Whether the broker is connected."""
        return self._agent.is_online

    @property
    def state(self) -> str:
        """One word: waiting (no model), offline, idle, invited, training, stopping, submitting."""
        return self._agent.state

    @property
    def examples(self) -> int:
        """How many labelled examples are stored."""
        return self._local.examples

    @property
    def examples_ever(self) -> int:
        """How many labelled examples were ever stored, those pushed out included."""
        return self._local.examples_ever

    def status(self) -> dict[str, Any]:
        """Return how the device is doing, as ``fedge device status --json`` prints it."""
        return self._agent.status()

    def _updated(self, model: Model) -> None:
        if self.when_updated is not None:
            self.when_updated(model)


def _mqtt(broker: str, **options: Any) -> Connect:
    def connect(client_id: str, will: Will) -> Transport:
        from edge_sdk.transport.mqtt import Mqtt

        return Mqtt(broker, client_id, will=will, **options)

    return connect


def _checked_tags(tags: Mapping[str, Tag] | None) -> dict[str, Tag]:
    if not are_tags(found := dict(tags or {})):
        raise ConfigError(
            f"tags: expected up to {MAX_TAGS} short names with text, numbers, true or false, "
            f"got {found!r:.200}"
        )
    return found


def _check_task(task: str) -> None:
    try:
        topics.checked_task(task)
    except MessageError as error:
        raise ConfigError(f"task: {error}") from error


def _key(key: bytes | str | None) -> bytes | None:
    if key is None:
        return None
    try:
        raw = bytes.fromhex(key) if isinstance(key, str) else bytes(key)
    except ValueError as error:
        raise ConfigError("coordinator_key: expected 64 hex digits; copy it anew") from error
    if len(raw) != 32:
        raise ConfigError(f"coordinator_key: expected 32 bytes, got {len(raw)}; copy it anew")
    return raw
