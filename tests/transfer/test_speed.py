"""What counts as slow, and that a process which did not run was not slow."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from a1111_worker.transfer.speed import SpeedCheck, judged_speed
from tests.support import ROOT
from tests.transfer.download_setup import FETCH, QUICK, DownloadSetup, KiB


@pytest.mark.parametrize(
    ("received", "seconds", "answer_seconds", "usual", "expected"),
    [
        (1000, 0.4, 0.0, 0.0, None),  # too young
        (0, 0.4, 0.0, 9e6, 9e6),  # it seems to stand still on a busy machine
        (1000, 0.5, 0.0, 9e6, 2000.0),
        (0, 1.9, 0.5, 9e6, 9e6),  # answers take long here
        (0, 2.0, 0.5, 9e6, 0.0),
    ],
)
def test_the_speed_of_a_young_request_is_taken_to_be_the_usual_one(
    received: int, seconds: float, answer_seconds: float, usual: float, expected: float | None
) -> None:
    assert judged_speed(received, seconds, answer_seconds, usual) == expected


def test_speed_is_judged_by_whole_periods_of_their_own() -> None:
    check = SpeedCheck(10.0, longest_step=60.0, now=0.0)
    looks = [(9.0, 0), (10.0, 1000), (15.0, 1000), (21.0, 2000), (31.0, 2999)]

    assert [check.is_too_slow(now, received, least=100.0) for now, received in looks] == [
        False,  # the period is not over
        False,
        False,
        True,  # 1000 bytes in eleven seconds
        True,
    ]


def test_time_in_which_the_process_did_not_run_does_not_count() -> None:
    check = SpeedCheck(1.0, longest_step=0.5, now=100.0)

    # 60 seconds count as half of one
    assert [check.is_too_slow(now, 0, least=1.0) for now in (100.1, 160.1, 160.4, 160.6)] == [False, False, False, True]


def test_time_in_which_no_bytes_are_expected_does_not_count() -> None:
    check = SpeedCheck(1.0, longest_step=0.5, now=100.0)

    looks = [(100.5, 1.0), (100.9, 0.0), (101.4, 1.0), (101.9, 1.0)]
    assert [check.is_too_slow(now, 0, least) for now, least in looks] == [False, False, False, True]


@pytest.mark.parametrize(
    ("seconds", "is_whole", "error"),
    [
        (60, True, ""),
        (2, False, "JobTimeout"),  # the job's own time goes on
    ],
)
def test_a_process_that_was_stopped_goes_on_with_its_download(
    download: DownloadSetup, seconds: int, is_whole: bool, error: str
) -> None:
    tuning = dataclasses.replace(QUICK, connections=1)
    arguments = [download.storage.sign(download.key), str(download.part), json.dumps(dataclasses.asdict(tuning))]
    command = [sys.executable, "-c", FETCH, *arguments, str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:

        def stop_for_longer_than_it_is_patient() -> None:  # in the storage's thread, which sends nothing meanwhile
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            time.sleep(3 * tuning.patience_seconds)  # this is the fault
            process.send_signal(signal.SIGCONT)

        download.storage.at(64 * KiB, stop_for_longer_than_it_is_patient)
        _, errors = process.communicate(timeout=60)

    assert (process.returncode == 0) is is_whole, errors
    assert (download.part.read_bytes() == download.content) is is_whole
    assert error in errors
