"""How missing models get into the cache: whole managers, the sandbox's CivitAI, real folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from a1111_worker.context import Deadline, JobContext, ReportProgress, ignore_progress
from a1111_worker.domain import HeldModels, ModelKind, Progress
from a1111_worker.errors import JobCancelled, JobTimeout, ModelAccessDenied, ModelError, ModelNotFound, ModelRejected
from a1111_worker.models.manager import ModelManager
from sandbox.civitai import SERVER_ERROR
from sandbox.models import sha256_of
from sandbox.storage import ServerFault
from tests.fleet import TUNING, Fleet, fetch, lora, named, soon, timings
from tests.support import wait_until

MB = 1_000_000


# -- verification


def test_a_wrong_hash_is_tried_once_more_with_a_fresh_link(fleet: Fleet) -> None:
    served = fleet.serve(77)
    fleet.civitai.storage.flip_at = [1000]

    model = fetch(fleet.start(), lora(77))

    assert model.sha256 == sha256_of(served)
    assert fleet.civitai.links_given == 2
    assert fleet.debris() == []


def test_a_wrong_hash_twice_is_refused_and_nothing_is_left(fleet: Fleet) -> None:
    served = fleet.serve(77, sha256="ab" * 32)

    with pytest.raises(ModelRejected) as raised:
        fetch(fleet.start(), lora(77))

    assert "abababababab" in raised.value.message
    assert sha256_of(served)[:12] in raised.value.message
    assert fleet.civitai.links_given == 2
    assert fleet.models_there() == []
    assert fleet.debris() == []


def test_a_hash_that_the_job_gives_and_no_file_has_is_refused(fleet: Fleet) -> None:
    fleet.serve(77)
    worker = fleet.start()

    for _ in ("before it is there", "when it is there"):
        with pytest.raises(ModelRejected):
            fetch(worker, lora(77, sha256="ab" * 32))
        fetch(worker, lora(77))

    assert fleet.debris() == []


@pytest.mark.parametrize(
    "content",
    [b"<!DOCTYPE html><html>login</html>", b"\x80\x04pickle" * 50, b"PK\x03\x04zip" * 50, b"\xff" * 400, b""],
    ids=["html", "pickle", "zip", "noise", "empty"],
)
def test_the_right_hash_of_something_else_is_refused_and_nothing_is_left(fleet: Fleet, content: bytes) -> None:
    path = fleet.folder / "bad.safetensors"
    path.write_bytes(content)
    fleet.serve(77, path)

    with pytest.raises(ModelError):
        fetch(fleet.start(), lora(77))

    assert fleet.models_there() == []
    assert fleet.debris() == []


def test_a_refusal_of_civitai_reaches_the_job_as_it_is(fleet: Fleet) -> None:
    fleet.serve(77)
    fleet.civitai.versions[77].usage_control = "Generation"

    with pytest.raises(ModelAccessDenied):
        fetch(fleet.start(), lora(77))

    assert fleet.debris() == []


def test_a_file_without_metadata_is_tried_unseen(fleet: Fleet) -> None:
    served = fleet.serve(77)
    fleet.civitai.fail(SERVER_ERROR, times=None, on="/api/v1/")

    model = fetch(fleet.start(), lora(77))

    assert model.sha256 == sha256_of(served)
    assert "could not be asked" in model.warnings[0]


# -- one fetch for all


def test_many_jobs_and_workers_that_need_one_file_fetch_it_once(fleet: Fleet) -> None:
    fleet.serve(77, size=3 * MB)
    fleet.civitai.storage.rate = 6 * MB
    workers = [fleet.start() for _ in range(3)]
    seen: list[Progress] = []

    def job(number: int) -> bool:
        with workers[number % 3].hold([lora(77)], JobContext(soon(), seen.append)) as held:
            return held.models[lora(77)].downloaded

    with ThreadPoolExecutor(9) as threads:
        downloaded = list(threads.map(job, range(9)))

    assert sum(downloaded) == 1
    assert fleet.civitai.resolves == {77: 1}
    fleet.civitai.storage.wait_until_idle()
    assert fleet.civitai.storage.bytes_sent == 3 * MB
    assert any("another worker is fetching Model 77" in progress.detail for progress in seen)
    assert any("another job is fetching Model 77" in progress.detail for progress in seen)
    assert fleet.debris() == []


def test_a_model_that_another_worker_fetched_is_found_though_the_folders_time_is_the_same(fleet: Fleet) -> None:
    # Some volumes keep times in whole seconds: two changes in one second look like one.
    fleet.serve(77)
    one, other = fleet.start(timings=timings(heartbeat=3600)), fleet.start(timings=timings(heartbeat=3600))
    os.utime(fleet.loras, (1000, 1000))
    with pytest.raises(ModelNotFound):
        fetch(other, named("nobody"))  # so that it has listed the folder
    fetch(one, lora(77))
    os.utime(fleet.loras, (1000, 1000))

    model = fetch(other, lora(77))

    assert not model.downloaded
    assert fleet.civitai.resolves == {77: 1}


def test_a_name_that_another_worker_fetched_is_found_though_the_folders_time_is_the_same(fleet: Fleet) -> None:
    fleet.serve(77)
    one, other = fleet.start(timings=timings(heartbeat=3600)), fleet.start(timings=timings(heartbeat=3600))
    os.utime(fleet.loras, (1000, 1000))
    with pytest.raises(ModelNotFound):
        fetch(other, named("nobody"))
    fetch(one, lora(77))
    os.utime(fleet.loras, (1000, 1000))

    model = fetch(other, named("Model-77_77"))

    assert model.version_id == 77


def test_a_cancelled_job_ends_at_once_and_a_waiting_one_goes_on_with_its_partial_file(fleet: Fleet) -> None:
    fleet.serve(77, size=2 * MB)
    fleet.civitai.storage.rate = 2 * MB
    worker = fleet.start()
    first, second = soon(), soon()
    waiting = threading.Event()

    def hold(deadline: Deadline, report: ReportProgress = ignore_progress) -> HeldModels:
        with worker.hold([lora(77)], JobContext(deadline, report)) as held:
            return held

    def report(progress: Progress) -> None:
        if "another job" in progress.detail:
            waiting.set()

    def cancel() -> None:
        waiting.wait(10)
        first.cancel()

    fleet.civitai.storage.at(MB, cancel)
    with ThreadPoolExecutor(2) as threads:
        cancelled = threads.submit(hold, first)
        partial_file = worker.cache.directories.for_new(ModelKind.LORA).partial_file("v77", worker.owner)
        wait_until(partial_file.exists, "the download")
        taken_over = threads.submit(hold, second, report)

        with pytest.raises(JobCancelled):
            cancelled.result()
        model = taken_over.result().models[lora(77)]

    assert model.downloaded
    assert fleet.civitai.storage.bytes_sent < 3 * MB
    assert fleet.debris() == []


def test_jobs_that_waited_get_the_failure_of_the_one_that_fetched(fleet: Fleet) -> None:
    fleet.serve(77, size=300_000, sha256="ab" * 32)
    fleet.civitai.storage.latency = 0.3
    worker = fleet.start()

    def job(number: int) -> str:
        try:
            fetch(worker, lora(77))
        except ModelRejected as error:
            return error.message
        return "fetched"

    with ThreadPoolExecutor(3) as threads:
        messages = list(threads.map(job, range(3)))

    assert len(set(messages)) == 1
    assert "abababababab" in messages[0]
    assert fleet.civitai.links_given == 2


@pytest.mark.parametrize(
    ("another_waits", "order"),
    [
        (False, ["next", "later"]),
        (True, ["later", "next"]),  # a later job began it, but the one that the GPU waits for needs it too
    ],
)
def test_downloads_that_the_gpu_waits_for_come_before_those_of_later_jobs(
    fleet: Fleet, another_waits: bool, order: list[str]
) -> None:
    fleet.serve(1, size=MB)
    fleet.serve(2, size=MB)
    fleet.civitai.storage.rate = MB
    tuning = replace(TUNING, connections=1, min_speed=1.0)
    worker = fleet.start(tuning=tuning)
    begun, waits = threading.Event(), threading.Event()
    finished: list[str] = []

    def job(version_id: int, report: ReportProgress, is_next: bool) -> None:
        with worker.hold([lora(version_id)], JobContext(soon(), report, is_next=lambda: is_next)):
            finished.append("later" if version_id == 1 else "next")

    def report(progress: Progress) -> None:
        if progress.facts["bytes"]:
            begun.set()

    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(job, 1, report, False)]
        begun.wait(10)
        if another_waits:
            jobs.append(threads.submit(job, 1, lambda progress: waits.set(), True))
            waits.wait(10)
        jobs.append(threads.submit(job, 2, ignore_progress, True))
        for future in jobs:
            future.result()

    assert list(dict.fromkeys(finished)) == order


def test_a_wrong_hash_is_the_failure_of_the_job_that_named_it(fleet: Fleet) -> None:
    served = fleet.serve(77, size=MB, sha256="")  # CivitAI has not computed it yet
    fleet.civitai.storage.rate = 4 * MB
    worker = fleet.start()
    begun = threading.Event()

    def wrong() -> None:
        with worker.hold([lora(77, sha256="ab" * 32)], JobContext(soon(), lambda progress: begun.set())):
            pass

    with ThreadPoolExecutor(1) as threads:
        failing = threads.submit(wrong)
        begun.wait(10)
        models = [fetch(worker, ref) for ref in (lora(77), lora(77, sha256=sha256_of(served)))]

        with pytest.raises(ModelRejected):
            failing.result()

    assert {model.sha256 for model in models} == {sha256_of(served)}
    assert fleet.debris() == []


def test_a_job_without_time_ends_and_its_partial_file_stays(fleet: Fleet) -> None:
    fleet.serve(77, size=2 * MB)
    fleet.civitai.storage.rate = MB
    worker = fleet.start()

    with pytest.raises(JobTimeout), worker.hold([lora(77)], JobContext(Deadline(0.7))):
        pass
    fleet.civitai.storage.rate = None
    fetch(worker, lora(77))

    assert fleet.civitai.storage.bytes_sent < 2 * MB + 500_000


KILLED = """
import os, sys
from pathlib import Path
from a1111_worker.context import Deadline, JobContext
from tests.fleet import lora, manager

def report(progress):
    if progress.facts["bytes"] > 600_000:
        os.kill(os.getpid(), 9)

with manager(Path(sys.argv[1]), sys.argv[2], sys.argv[3], name="dead", checkpoint=None) as worker:
    with worker.hold([lora(77)], JobContext(Deadline(30), report)):
        pass
"""


def test_a_killed_workers_lease_is_taken_over_and_its_partial_file_completed(fleet: Fleet) -> None:
    served = fleet.serve(77, size=2 * MB)
    fleet.civitai.storage.rate = 2 * MB
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(fleet.folder), fleet.civitai.url, fleet.civitai.storage.url]
    )
    sent = fleet.civitai.storage.bytes_sent
    left = [path.name for path in (fleet.loras / ".leases").iterdir()]
    worker = fleet.start(timings=timings(stale_after=0.3))

    model = fetch(worker, lora(77))

    assert killed.returncode == -9
    assert left == ["v77"]
    assert model.sha256 == sha256_of(served)
    assert fleet.civitai.storage.bytes_sent - sent < 1_900_000  # it went on where the dead one stopped
    assert fleet.debris() == []


PAUSED = """
import sys
from dataclasses import replace
from pathlib import Path
from a1111_worker.context import Deadline, JobContext
from tests.fleet import TUNING, lora, manager

tuning = replace(TUNING, connections=1, min_range_bytes=100_000, max_range_bytes=100_000)
with manager(Path(sys.argv[1]), *sys.argv[2:], name="paused", checkpoint=None, tuning=tuning) as worker:
    with worker.hold([lora(77)], JobContext(Deadline(30))) as held:
        print(held.models[lora(77)].downloaded)
"""


@pytest.mark.parametrize(
    "fault",
    [
        ServerFault(),  # it goes on where it was paused
        ServerFault(etag='"another"'),  # it starts over
        ServerFault(whole=True),  # it starts over, in one stream
    ],
    ids=["goes on", "starts over", "one stream"],
)
def test_a_paused_worker_leaves_the_model_alone_that_another_made_of_its_partial_file(
    fleet: Fleet, fault: ServerFault
) -> None:
    served, storage = fleet.serve(77, size=4 * MB), fleet.civitai.storage
    storage.rate = 4 * MB
    stopped = threading.Event()
    command = [sys.executable, "-c", PAUSED, str(fleet.folder), fleet.civitai.url, storage.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as paused:

        def pause() -> None:
            paused.send_signal(signal.SIGSTOP)
            stopped.set()

        storage.at(MB, pause)
        stopped.wait(30)
        storage.rate = None
        model = fetch(fleet.start(timings=timings(stale_after=0.3)), lora(77))
        written = model.path.stat().st_mtime_ns
        storage.fail(fault, times=None)

        paused.send_signal(signal.SIGCONT)
        output, _ = paused.communicate(timeout=30)

    assert model.path.stat().st_mtime_ns == written
    assert sha256_of(model.path) == sha256_of(served)
    assert output == "False\n"  # it looked again, and the model was there
    assert fleet.debris() == []


def test_a_worker_that_lost_its_lease_waits_for_the_one_that_has_it(fleet: Fleet) -> None:
    fleet.serve(77, size=2 * MB)
    storage = fleet.civitai.storage
    storage.rate = 2 * MB
    one, other = fleet.start(), fleet.start()
    waits = threading.Event()

    def job(worker: ModelManager, report: ReportProgress) -> str:
        with worker.hold([lora(77)], JobContext(soon(), report)) as held:
            return held.models[lora(77)].file

    def report(progress: Progress) -> None:
        if "another worker" in progress.detail:
            waits.set()

    def lose() -> None:
        waits.wait(10)
        (fleet.loras / ".leases/v77").unlink()

    storage.at(MB // 2, lose)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(job, one, ignore_progress)
        wait_until((fleet.loras / ".leases/v77").exists, "the lease")
        second = threads.submit(job, other, report)

        files = {first.result(), second.result()}

    assert files == {"Model-77_77.safetensors"}
    assert fleet.debris() == []
