"""The cache as a whole: against a plain model of it, and under many processes at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import HeldModels, Model
from a1111_worker.errors import VolumeFull
from a1111_worker.models import care
from a1111_worker.models.manager import ModelManager
from sandbox.models import sha256_of
from tests.fleet import Fleet, lora, timings

VERSIONS = (1, 2, 3, 4, 5)
SIZE = 70_000
ROOM = 3  # models that the cache may have


class Cache(RuleBasedStateMachine):
    """Two workers on one folder. The invariants are what must be true at every moment."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.fleet = Fleet(self.folder)
        self.fleet.__enter__()
        self.sha256 = {version: sha256_of(self.fleet.serve(version, size=SIZE)) for version in VERSIONS}
        self.workers = [self.new_worker(), self.new_worker()]
        self.held: list[tuple[ModelManager, Model, AbstractContextManager[HeldModels]]] = []
        self.forgotten: set[str] = set()  # held by workers that died

    def new_worker(self) -> ModelManager:
        still = timings(heartbeat=3600, stale_after=600, room_wait=0)
        return self.fleet.start(checkpoint=None, limit=ROOM * SIZE, timings=still)

    def file(self, version: int) -> Path:
        return self.fleet.loras / f"Model-{version}_{version}.safetensors"

    def held_files(self) -> set[str]:
        return {model.file for _, model, _ in self.held} | self.forgotten

    @rule(worker=st.integers(0, 1), version=st.sampled_from(VERSIONS))
    def hold(self, worker: int, version: int) -> None:
        context = self.workers[worker].hold([lora(version)], JobContext(Deadline(30)))
        was_there, was_held = self.file(version).exists(), self.held_files()
        try:
            held = context.__enter__()
        except VolumeFull:
            assert not was_there
            assert len(was_held) >= ROOM  # only what is in use may keep a model out
            return
        model = held.models[lora(version)]
        assert model.downloaded is not was_there
        assert model.sha256 == self.sha256[version]
        self.held.append((self.workers[worker], model, context))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 10))
    def release(self, which: int) -> None:
        _, _, context = self.held.pop(which % len(self.held))
        context.__exit__(None, None, None)

    @rule(worker=st.integers(0, 1), models=st.integers(0, ROOM))
    def evict(self, worker: int, models: int) -> None:
        held = self.held_files()
        try:
            care.shrink(self.workers[worker].cache, models * SIZE)
        except VolumeFull:
            assert len(held) > models
        else:
            assert len(self.fleet.models_there()) <= models

    @rule(worker=st.integers(0, 1))
    def crash(self, worker: int) -> None:
        """The worker is gone without a word. What it held stays held until it is known to be dead."""
        dead = self.workers[worker]
        dead._heartbeat.stop()
        self.forgotten |= {hold.name.removesuffix(f".{dead.owner}") for hold in dead._holds._own}
        dead._holds._own.clear()
        self.held = [held for held in self.held if held[0] is not dead]
        self.workers[worker] = self.new_worker()

    @rule(version=st.sampled_from(VERSIONS), how=st.sampled_from(["gone", "cut off", "nonsense"]))
    def lose_a_sidecar(self, version: int, how: str) -> None:
        sidecar = Path(f"{self.file(version)}.json")
        if not sidecar.exists():
            return
        if how == "gone":
            sidecar.unlink()
        else:
            sidecar.write_bytes(sidecar.read_bytes()[:20] if how == "cut off" else b"\x00nonsense")

    @rule(version=st.sampled_from(VERSIONS))
    def put_it_there_by_hand(self, version: int) -> None:
        if not self.file(version).exists():
            shutil.copy(self.fleet.folder / "served" / f"{version}.safetensors", self.file(version))

    @invariant()
    def every_model_is_the_right_one(self) -> None:
        for version in VERSIONS:
            if self.file(version).exists():
                assert sha256_of(self.file(version)) == self.sha256[version]

    @invariant()
    def what_is_held_is_there(self) -> None:
        for _, model, _ in self.held:
            assert model.path.exists()

    @invariant()
    def nothing_is_left_of_work_that_is_over(self) -> None:
        assert [path for path in self.fleet.debris() if "/.holds/" not in path] == []

    def teardown(self) -> None:
        for _, _, context in self.held:
            context.__exit__(None, None, None)
        self.fleet.__exit__()
        shutil.rmtree(self.folder)


TestCache = Cache.TestCase
TestCache.settings = settings(
    max_examples=12,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

STORM = """
import hashlib, json, random, sys
from pathlib import Path
from a1111_worker.context import Deadline, JobContext
from a1111_worker.errors import VolumeFull
from a1111_worker.models import care
from tests.fleet import lora, manager, timings

folder, api, storage, name, operations, limit = sys.argv[1:]
chance = random.Random(int(name))
served = json.loads((Path(folder) / "served.json").read_text())
refused = 0
how = dict(name=name, checkpoint=None, limit=int(limit), timings=timings(heartbeat=0.2, stale_after=60.0))
with manager(Path(folder), api, storage, **how) as worker:
    for _ in range(int(operations)):
        if chance.random() < 0.15:
            try:
                care.shrink(worker.cache, chance.randrange(int(limit)))
            except VolumeFull:
                refused += 1
            continue
        refs = [lora(int(version)) for version in chance.sample(sorted(served), chance.randint(1, 2))]
        try:
            with worker.hold(refs, JobContext(Deadline(100))) as held:
                for ref, model in held.models.items():
                    link = Path(folder) / f"container{name}/webui/Lora" / model.shown_file
                    for path in (model.path, link):
                        bytes_ = path.read_bytes()
                        assert hashlib.sha256(bytes_).hexdigest() == served[str(ref.version_id)] == model.sha256
                    Deadline().wait(chance.random() * 0.01)
                    assert model.path.exists(), "evicted while held"
        except VolumeFull:
            refused += 1
print(json.dumps({"refused": refused}))
"""


def storm(fleet: Fleet, processes: int, operations: int) -> list[int]:
    """Processes that fetch, hold and evict at random; how many times each was refused for want of room."""
    served = {version: sha256_of(fleet.serve(version, size=SIZE)) for version in range(1, 11)}
    (fleet.folder / "served.json").write_text(json.dumps(served))
    limit = str(5 * SIZE)
    arguments = [str(fleet.folder), fleet.civitai.url, fleet.civitai.storage.url]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", STORM, *arguments, str(number), str(operations), limit],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    refused = []
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        refused.append(json.loads(out)["refused"])
    return refused


def check_storm(fleet: Fleet, refused: list[int], operations: int) -> None:
    served = json.loads((fleet.folder / "served.json").read_text())
    for name in fleet.models_there():
        version = name.removesuffix(".safetensors").rpartition("_")[2]
        assert hashlib.sha256((fleet.loras / name).read_bytes()).hexdigest() == served[version]
    assert fleet.debris() == []
    assert sum(refused) < len(refused) * operations / 2  # it was a storm of work, not of refusals


def test_processes_that_fetch_hold_and_evict_never_see_a_wrong_or_a_missing_model(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        refused = storm(fleet, processes=3, operations=10)

        check_storm(fleet, refused, 10)


@pytest.mark.slow
def test_eight_processes_of_fifty_operations_each(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        refused = storm(fleet, processes=8, operations=50)

        check_storm(fleet, refused, 50)


FETCH = """
import sys
from pathlib import Path
from a1111_worker.context import Deadline, JobContext
from tests.fleet import lora, manager

folder, api, storage, name = sys.argv[1:]
with manager(Path(folder), api, storage, name=name, checkpoint=None) as worker:
    with worker.hold([lora(1)], JobContext(Deadline(100))) as held:
        print(held.models[lora(1)].downloaded)
"""


def test_processes_that_wake_up_together_fetch_a_file_once(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        fleet.serve(1, size=4_000_000)
        fleet.civitai.storage.rate = 2_000_000
        arguments = [str(fleet.folder), fleet.civitai.url, fleet.civitai.storage.url]

        with contextlib.ExitStack() as stack:
            running = [
                stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, "-c", FETCH, *arguments, str(n)], stdout=subprocess.PIPE, text=True
                    )
                )
                for n in range(4)
            ]
            outputs = [process.communicate(timeout=100)[0].strip() for process in running]

        assert sorted(outputs) == ["False", "False", "False", "True"]
        fleet.civitai.storage.wait_until_idle()
        assert fleet.civitai.storage.bytes_sent == 4_000_000
        assert fleet.civitai.links_given == 1
        assert fleet.debris() == []
