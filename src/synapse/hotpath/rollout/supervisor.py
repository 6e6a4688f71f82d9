"""What watches the hot paths of a process, off the hot path: it counts, asks store and flags, and sets decisions."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from synapse.errors import SynapseError
from synapse.hotpath.call import HotPath
from synapse.hotpath.guard.flight_recorder import FlightRecorder, deaths
from synapse.hotpath.metrics.window import NOTHING, Alert, Tally, alerts, combined
from synapse.hotpath.news import News, log, stopped_hint, tell
from synapse.hotpath.paths import PATHS
from synapse.hotpath.rollout.decision import BUCKETS, Decision, reference_only
from synapse.hotpath.rollout.flags import Flags, evaluate
from synapse.hotpath.rollout.plan import STAGES, Faults, Rollout, Stage
from synapse.hotpath.rollout.records import Subject, advance
from synapse.kernels.child import CALL_SECONDS, Crashed, Lost, NotSent, TrialProcess, Unusable
from synapse.kernels.native import FoundBuild, python_forced
from synapse.store import Store

NO_BUILD = "none"
"""The build under which calls are counted while there is none."""

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The time."""
    return datetime.now(UTC)


@dataclass(slots=True)
class Standing:
    """What the supervisor knows about one hot path.

    Attributes:
        build: its build, or None; then `problem` says why, and `hint` what helps.
        opened: the kernel, opened in this process.
        child: the process of the burn-in.
        rollout, alerts: as of the last time.
        unknown_stage: the name a flag had for a stage that there is not, so that it is said once.
    """

    build: FoundBuild | None = None
    problem: str = ""
    hint: str = ""
    opened: Callable[..., Any] | None = None
    child: TrialProcess | None = None
    rollout: Rollout | None = None
    alerts: tuple[Alert, ...] = ()
    unknown_stage: str = ""

    def close(self) -> None:
        """End the child."""
        if self.child is not None:
            self.child.close()
            self.child = None


class Supervisor:
    """Watches hot paths. `sync` does everything once; who runs it, and how often, is no concern of this class."""

    def __init__(
        self,
        folder: Path,
        *,
        paths: Mapping[str, HotPath[..., Any]] = PATHS,
        clock: Clock = utc_now,
        call_seconds: float = CALL_SECONDS,
    ) -> None:
        """Watch these paths.

        Args:
            folder: where flight recorders are kept; it exists.
            clock: what time it is, for dwell times and windows.
            call_seconds: how long a call in the burn-in may take.
        """
        self.standings: dict[str, Standing] = {}
        self._folder = folder
        self._paths = paths
        self._clock = clock
        self._call_seconds = call_seconds
        self._recorder: FlightRecorder | None = None
        self._recorder_problem = ""

    async def sync(self, store: Store) -> None:
        """Bring store, flags and decisions together. It blocks while a child starts: give it a loop of its own.

        Raises:
            SynapseError: the store cannot be used. What was counted is kept for the next time, decisions stay.
        """
        await self._blame(store)
        for path in list(self._paths.values()):
            standing = self.standings.setdefault(path.name, Standing())
            self._find(path, standing)
            await self._count(store, path, standing)
            decision = self._decide(path, standing)
            if path.has_faults:  # opening or rehearsing has found something: it counts at once
                await self._count(store, path, standing)
                decision = self._decide(path, standing)
            path.decide(decision)
        self._check_recorder()

    async def flush(self, store: Store) -> None:
        """Only keep what was counted: the process is about to end. Raises as `sync`."""
        for path in list(self._paths.values()):
            await self._count(store, path, self.standings.setdefault(path.name, Standing()))

    def interrupt(self) -> None:
        """Let a `sync` that waits for a child in another thread come to its end."""
        for standing in list(self.standings.values()):
            if standing.child is not None:
                standing.child.interrupt()

    def close(self) -> None:
        """Stop watching: the reference answers everything from now on."""
        for path in self._paths.values():
            path.decide(reference_only("nothing watches the rollout any more"))
        for standing in self.standings.values():
            standing.close()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def abandon(self) -> None:
        """In a forked child: leave the recorder and the children to the parent."""
        if self._recorder is not None:
            self._recorder.abandon()

    def _check_recorder(self) -> None:
        """Say once that a crash of this process would not be known afterwards."""
        problem = self._recorder.problem if self._recorder is not None else ""
        if problem and problem != self._recorder_problem:
            log.warning("hotpath.not_recorded", message=problem, hint="make room, then start this process again")
        self._recorder_problem = problem

    async def _blame(self, store: Store) -> None:
        """Hold what was running in processes that died against it. A file is removed when the store knows."""
        for death in deaths(self._folder):
            for running in death.running:
                path = self._paths.get(running.path)
                subject = Subject(running.path, running.build, path.plan if path is not None else STAGES)
                if death.signal is not None:
                    how = f"process {death.process} died of {signal.Signals(death.signal).name} while it was running"
                    tally, faults = NOTHING, Faults(crash=how)
                else:
                    how = f"process {death.process} was killed while it was running"
                    tally, faults = Tally(killed=1), Faults(killed=how)
                _, news = await advance(store, subject, tally, faults, self._clock())
                _tell(news)
            death.remove()

    def _find(self, path: HotPath[..., Any], standing: Standing) -> None:
        """Look for the build, until there is one. It stays the same for as long as this process lives."""
        if standing.build is None:
            try:
                standing.build = path.native.find()
                standing.problem = standing.hint = ""
            except (SynapseError, OSError) as error:
                standing.problem, standing.hint = str(error), getattr(error, "hint", None) or ""

    async def _count(self, store: Store, path: HotPath[..., Any], standing: Standing) -> None:
        """Keep what was counted and found, and learn where the rollout stands."""
        build = standing.build.id if standing.build is not None else NO_BUILD
        subject = Subject(path.name, build, path.plan)
        tally, faults = path.counters.take(), path.take_faults()
        try:
            standing.rollout, news = await advance(store, subject, tally, faults, self._clock())
        except BaseException:
            path.counters.put_back(tally)
            path.report(faults)
            raise
        lately = combined(part.tally for part in standing.rollout.window)
        now = {alert.name: alert for alert in alerts(lately)}
        before = {alert.name: alert for alert in standing.alerts}
        standing.alerts = tuple(now.values())
        news += [News("alert", path.name, build, alert.message) for name, alert in now.items() if name not in before]
        news += [News("alert_over", path.name, build, f"{name} is well again") for name in before if name not in now]
        if tally.errors:
            log.warning("hotpath.native_errors", path=path.name, build=build, count=tally.errors, last=path.last_error)
        _tell(news)

    def _decide(self, path: HotPath[..., Any], standing: Standing) -> Decision:
        """What calls are to do, as things stand."""
        rollout, build = standing.rollout, standing.build
        assert rollout is not None  # noqa: S101 (counted before)
        if build is None:
            return reference_only(standing.problem, hint=standing.hint)
        own = Flags(path.plan[rollout.stage].name, python_forced(), rollout.mode == "quarantined")
        flags = evaluate(path.name, build.id, own)
        veto = _veto(own, flags, rollout)
        if veto:
            standing.close()
            return reference_only(veto, hint=stopped_hint(path.name) if rollout.stopped else _unveto(own))
        names = [stage.name for stage in path.plan]
        if flags.stage not in names and standing.unknown_stage != flags.stage:
            standing.unknown_stage = flags.stage
            log.warning("hotpath.unknown_stage", path=path.name, stage=flags.stage, expected=names)
        stage = path.plan[names.index(flags.stage) if flags.stage in names else rollout.stage]
        try:
            return self._use(
                path, standing, build, stage, stage.name + ("" if stage.name == own.stage else " by a flag")
            )
        except (Crashed, Unusable, Lost, NotSent) as error:
            if isinstance(error, Crashed):
                path.report(Faults(crash=str(error)))
            elif isinstance(error, Unusable) and rollout.problem != str(error):
                path.report(Faults(problem=str(error)))
                log.warning("hotpath.unusable", path=path.name, build=build.id, message=str(error))
            return reference_only(str(error), below=round(stage.share * BUCKETS))

    def _use(self, path: HotPath[..., Any], standing: Standing, build: FoundBuild, stage: Stage, why: str) -> Decision:
        """The kernel answers its share: from a child during the burn-in, and from this process after it.

        Raises:
            Crashed, Unusable, Lost, NotSent: the build cannot be opened there.
        """
        assert standing.rollout is not None  # noqa: S101 (counted before)
        below = round(stage.share * BUCKETS)
        if standing.rollout.burned_in:
            standing.close()
            if standing.opened is None:
                standing.opened = _open(path, build)
            if self._recorder is None:
                self._recorder = FlightRecorder(self._folder)
            number = self._recorder.number_of(path.name, build.id)
            decision = Decision(standing.opened, below, stage.compare, self._recorder.slots, number, None, why)
        else:
            child = self._burn_in(path, standing, build)
            decision = Decision(_in_child, below, stage.compare, None, 0, child, f"{why}, burn-in")
        if standing.rollout.problem:
            path.report(Faults(problem=""))
        return decision

    def _burn_in(self, path: HotPath[..., Any], standing: Standing, build: FoundBuild) -> TrialProcess:
        """The child of a build that is not trusted in this process yet, running."""
        if standing.child is None:
            standing.child = TrialProcess(path.native.bind, build.library, call_seconds=self._call_seconds)
        child = standing.child
        if not child.running:
            child.start()
            path.rehearse(child)
        return child


def _open(path: HotPath[..., Any], build: FoundBuild) -> Callable[..., Any]:
    try:
        return path.native.bind(build.library)
    except Exception as error:  # `bind` is code of the hot path's room, and a library may lack anything
        raise Unusable(f"the build cannot be opened: {type(error).__name__}: {error}") from error


def _unveto(own: Flags) -> str:
    """What ends a veto that the rollout has nothing to do with."""
    return (
        "unset SYNAPSE_FORCE_PYTHON" if own.force_python else "the flag service of this process decides it; ask there"
    )


def _veto(own: Flags, flags: Flags, rollout: Rollout) -> str:
    """Why the reference answers everything; empty when the kernel may answer its share."""
    if own.force_python or flags.force_python:
        return "Python is forced" + ("" if own.force_python else " by a flag")
    if rollout.stopped:
        return f"{rollout.mode}: {rollout.reason}"
    return "quarantined by a flag" if flags.quarantine else ""


def _in_child(*args: Any, **kwargs: Any) -> Any:
    """Stands for the kernel while it runs in the child; the adapter calls the child itself."""
    raise AssertionError("a call in the burn-in goes to the child")


def _tell(news: list[News]) -> None:
    for item in news:
        tell(item)
