"""`a1111 volume upload` onto a real S3 server, and a worker that finds everything there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from a1111_client.cli import app
from a1111_client.errors import EndpointError
from a1111_client.volume import LocalFile, Step, Stored, Volume, decide, find_files, plan, s3_url, upload
from sandbox.server import Exchange
from tests.buckets import KEY_ID, SECRET, FaultyProxy, S3Fault, S3Server, s3_server
from tests.fleet import DETAIL, KEY, Fleet
from tests.support import ROOT

MIB = 1 << 20
KEYS = {"RUNPOD_S3_ACCESS_KEY_ID": KEY_ID, "RUNPOD_S3_SECRET_ACCESS_KEY": SECRET}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


class Upload:
    """A folder of models, a volume, and the upload between them."""

    def __init__(self, folder: Path, s3: S3Server) -> None:
        self.folder, self.states = folder / "models", folder / "states"
        self.s3, self.bucket = s3, s3.new_bucket()
        self.proxy = FaultyProxy(s3.url)
        self.sent: dict[str, int] = {}
        self.put("loras/a.safetensors", b"the LoRA", {"version_id": 1})
        self.put("checkpoints/big.safetensors", os.urandom(12 * MIB), {"version_id": 2})

    def put(self, name: str, data: bytes, sidecar: dict[str, Any] | None = None) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if sidecar is not None:
            known = {"schema": 1, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data), **sidecar}
            path.with_name(f"{path.name}.json").write_text(json.dumps(known), encoding="utf-8")
        return path

    def volume(self, **more: Any) -> Volume:
        options: dict[str, Any] = {"part_size": 5 * MIB, "at_once": 2, "patience": 0.2, **more}
        return Volume(self.bucket, url=self.proxy.url, region="EU-RO-1", key=(KEY_ID, SECRET), **options)

    def steps(self, *, verify: bool = False) -> dict[str, Step]:
        volume = self.volume()
        planned = plan(volume, find_files(self.folder), "models", verify=verify, tell=lambda file, size: None)
        volume.close()
        return {item.key: item.step for item in planned}

    def run(self, *, verify: bool = False, **more: Any) -> list[str]:
        volume = self.volume(**more)
        self.sent = {}

        def tell(file: LocalFile, size: int) -> None:
            self.sent[file.name] = self.sent.get(file.name, 0) + size

        try:
            planned = plan(volume, find_files(self.folder), "models", verify=verify, tell=lambda file, size: None)
            return upload(volume, planned, self.states, verify=verify, tell=tell)
        finally:
            volume.close()

    def stored(self, key: str) -> bytes:
        body: bytes = self.s3.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return body

    def write(self, key: str, data: bytes, **more: Any) -> None:
        """Put something there that the upload did not send."""
        self.s3.s3.put_object(Bucket=self.bucket, Key=key, Body=data, **more)


@pytest.fixture
def it(tmp_path: Path, s3: S3Server) -> Iterator[Upload]:
    it = Upload(tmp_path, s3)
    with it.proxy:
        yield it


ALL = [
    "models/checkpoints/big.safetensors",
    "models/checkpoints/big.safetensors.json",
    "models/loras/a.safetensors",
    "models/loras/a.safetensors.json",
]


def test_every_model_goes_before_its_sidecar_and_arrives_whole(it: Upload) -> None:
    unproven = it.run()

    assert unproven == []
    assert it.s3.keys(it.bucket) == ALL
    for key in ALL:
        assert it.stored(key) == (it.folder / key.removeprefix("models/")).read_bytes()
    puts = list(dict.fromkeys(it.proxy.puts()))
    assert [puts.index(key) < puts.index(f"{key}.json") for key in (ALL[0], ALL[2])] == [True, True]
    assert max(map(puts.index, (ALL[0], ALL[2]))) < min(map(puts.index, (ALL[1], ALL[3])))
    assert it.s3.unfinished(it.bucket) == []
    assert list(it.states.iterdir()) == []


def test_the_address_of_a_volume_is_its_data_centers() -> None:
    assert s3_url("EU-RO-1") == "https://s3api-eu-ro-1.runpod.io/"


def test_what_belongs_to_a_running_worker_stays_here(it: Upload) -> None:
    for name in (".parts/v1.x.part", ".leases/v1", ".holds/a.safetensors.x", ".trash/b.safetensors", ".DS_Store"):
        it.put(f"loras/{name}", b"x")
    it.put("loras/a.safetensors.uses", b"...")
    it.put("loras/gone.safetensors.json", b"{}")  # a sidecar without its model
    it.put("notes/private.txt", b"x")
    it.put("loras/.urls/3f9c", b"a.safetensors")
    it.put("upscalers/4x.pth", b"u")

    names = [file.name for file in find_files(it.folder)]

    assert names == [
        "checkpoints/big.safetensors",
        "loras/a.safetensors",
        "upscalers/4x.pth",
        "checkpoints/big.safetensors.json",
        "loras/.urls/3f9c",
        "loras/a.safetensors.json",
    ]


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="none of the folders checkpoints, loras") as caught:
        find_files(tmp_path)

    assert "model_manager.py prefetch" in caught.value.hint


def test_a_second_run_sends_nothing(it: Upload) -> None:
    it.run()
    before = len(it.proxy.puts())

    it.run()

    assert set(it.steps().values()) == {Step.SKIP}
    assert len(it.proxy.puts()) == before


FILE = LocalFile(Path("x"), "loras/x.safetensors", 10 * MIB)
SIDECAR = LocalFile(Path("x.json"), "loras/x.safetensors.json", 100)
SAME, OTHER = "a" * 64, "b" * 64

DECISIONS = [
    # file, what the volume has, whether the file's model is there, --verify → what to do
    (FILE, None, False, False, Step.SEND),
    (FILE, Stored(10 * MIB, SAME), False, False, Step.SKIP),
    (FILE, Stored(10 * MIB, OTHER), False, False, Step.CONFLICT),
    (FILE, Stored(9 * MIB, SAME), False, False, Step.CONFLICT),
    (FILE, Stored(9 * MIB, None), False, True, Step.CONFLICT),
    (FILE, Stored(10 * MIB, None), False, False, Step.UNKNOWN),
    (FILE, Stored(10 * MIB, None), False, True, Step.READ_BACK),
    (SIDECAR, Stored(100, None), False, False, Step.READ_BACK),  # a small file is read anyway
    (SIDECAR, Stored(120, None), True, False, Step.KEEP),  # a worker has written more into it
    (SIDECAR, Stored(120, None), False, False, Step.CONFLICT),  # it says something about another model
]


@pytest.mark.parametrize(("file", "stored", "model_is_there", "verify", "step"), DECISIONS)
def test_a_file_that_is_there_is_left_alone_or_in_the_way(
    file: LocalFile, stored: Stored | None, model_is_there: bool, verify: bool, step: Step
) -> None:
    assert decide(file, SAME, stored, model_is_there=model_is_there, verify=verify) is step


def test_a_store_that_keeps_no_metadata_is_read_back_with_verify(it: Upload) -> None:
    for name in ("checkpoints/big.safetensors", "loras/a.safetensors"):
        it.write(f"models/{name}", (it.folder / name).read_bytes())

    without, with_verify = it.steps(), it.steps(verify=True)

    assert without[ALL[0]] is Step.UNKNOWN and without[ALL[2]] is Step.SKIP
    assert with_verify[ALL[0]] is Step.SKIP


def test_a_model_that_is_not_what_its_sidecar_says_is_sent_nowhere(it: Upload) -> None:
    (it.folder / "loras/a.safetensors").write_bytes(b"the LoRa")

    with pytest.raises(EndpointError, match=r"loras/a\.safetensors has not the SHA-256"):
        it.run()

    assert it.proxy.puts() == []


def test_what_differs_is_replaced_with_the_old_sidecar_removed_first(it: Upload) -> None:
    it.write(ALL[2], b"THE LORA")
    it.write(ALL[3], b'{"sha256": "of the old one"}')

    assert (it.steps()[ALL[2]], it.steps()[ALL[3]]) == (Step.CONFLICT, Step.CONFLICT)
    it.run()

    changes = [(asked.method, asked.path.split("/", 2)[2]) for asked in it.proxy.asked if asked.method != "HEAD"]
    about = [change for change in changes if "loras/a." in change[1] and change[0] in ("PUT", "DELETE")]
    assert about[0] == ("DELETE", ALL[3]) and about[-2:] == [("PUT", ALL[2]), ("PUT", ALL[3])]
    assert it.stored(ALL[2]) == b"the LoRA"


def cut_at_the_second_part(it: Upload) -> None:
    """Run the upload, and have its volume refuse the large file's second part."""

    def refuse(exchange: Exchange) -> bool:
        if exchange.asked.query.get("partNumber") != "2":
            return False
        exchange.send(403, b"<Error><Code>AccessDenied</Code></Error>")
        return True

    it.proxy.before.append(refuse)
    with pytest.raises(EndpointError):
        it.run(at_once=1)
    it.proxy.before.clear()
    it.proxy.asked.clear()


def parts_sent(it: Upload) -> list[str]:
    return [asked.query["partNumber"] for asked in it.proxy.asked if "partNumber" in asked.query]


def test_an_upload_that_was_cut_goes_on_with_the_parts_that_are_missing(it: Upload) -> None:
    cut_at_the_second_part(it)

    it.run(at_once=1)

    assert parts_sent(it) == ["2", "3"]
    assert it.sent["checkpoints/big.safetensors"] == 12 * MIB
    assert it.stored(ALL[0]) == (it.folder / "checkpoints/big.safetensors").read_bytes()


def test_a_file_that_changed_meanwhile_is_sent_from_its_beginning_and_its_old_parts_go(it: Upload) -> None:
    cut_at_the_second_part(it)
    it.put("checkpoints/big.safetensors", os.urandom(12 * MIB), {"version_id": 2})

    it.run(at_once=1)

    assert parts_sent(it) == ["1", "2", "3"]
    assert it.stored(ALL[0]) == (it.folder / "checkpoints/big.safetensors").read_bytes()
    assert it.s3.unfinished(it.bucket) == []


@pytest.mark.parametrize("state", ["", "[]", '{"id": 1}', "no JSON"])
def test_a_state_that_cannot_be_read_is_as_good_as_none(it: Upload, state: str) -> None:
    cut_at_the_second_part(it)
    (left,) = it.states.iterdir()
    left.write_text(state, encoding="utf-8")

    it.run(at_once=1)

    assert parts_sent(it) == ["1", "2", "3"]


def test_an_answer_that_is_lost_after_the_parts_were_put_together_is_no_failure(it: Upload) -> None:
    statuses: list[int] = []

    def lose_the_answer(exchange: Exchange) -> bool:
        asked = exchange.asked
        if asked.method != "POST" or "uploadId" not in asked.query:
            return False
        statuses.append(it.proxy._ask(asked).status_code if not statuses else 524)
        exchange.send(524)
        return True

    it.proxy.before.append(lose_the_answer)

    it.run()

    assert statuses[0] == 200
    assert it.s3.keys(it.bucket) == ALL


def test_parts_that_are_never_put_together_are_an_error(it: Upload) -> None:
    def refuse(exchange: Exchange) -> bool:
        asked = exchange.asked
        if asked.method != "POST" or "uploadId" not in asked.query:
            return False
        exchange.send(400, b"<Error><Code>InvalidPart</Code></Error>")
        return True

    it.proxy.before.append(refuse)

    with pytest.raises(EndpointError, match="400 InvalidPart"):
        it.run()


def test_a_file_that_is_another_one_afterwards_is_an_error(it: Upload) -> None:
    def spoil(exchange: Exchange) -> bool:
        asked = exchange.asked
        if asked.method == "PUT" and asked.path.endswith("a.safetensors"):
            it.write(ALL[2], b"THE LORA", Metadata={"sha256": "0" * 64})
            exchange.send(200, headers={"etag": '"x"'})
            return True
        return False

    it.proxy.before.append(spoil)

    with pytest.raises(EndpointError, match=r"a\.safetensors is not on the volume as it was sent"):
        it.run()


@pytest.mark.parametrize(
    ("status", "code", "said"), [(403, "ENDPOINT_REFUSED", "S3 API Keys"), (500, "UPLOAD_FAILED", "")]
)
def test_a_refusal_has_a_code_and_no_key(it: Upload, status: int, code: str, said: str) -> None:
    it.proxy.faults.append(S3Fault(status, method="PUT"))

    with pytest.raises(EndpointError) as caught:
        it.run()

    assert caught.value.code == code and said in caught.value.hint
    assert SECRET not in str(caught.value) + caught.value.hint


# The command


def run(it: Upload, *words: str, **environment: str) -> Result:
    result = CliRunner().invoke(
        app,
        ["volume", "upload", str(it.folder), it.bucket, "--datacenter", "EU-RO-1", "--s3-url", it.proxy.url, *words],
        env={**KEYS, "XDG_CACHE_HOME": str(it.states), **environment},
    )
    assert SECRET not in result.output
    return result


def test_the_command_sends_a_folder_and_says_what_it_did(it: Upload) -> None:
    first, second = run(it), run(it)

    assert first.exit_code == 0, first.output
    assert first.output.splitlines()[-1] == "4 of 4 files sent, 0.01 GB"
    assert second.output.splitlines() == [f"{key}: is there" for key in (ALL[0], ALL[2], ALL[1], ALL[3])] + [
        "0 of 4 files sent, 0.00 GB"
    ]


def test_ctrl_c_does_not_wait_for_the_parts_on_their_way(it: Upload) -> None:
    with (it.folder / "checkpoints" / "large.safetensors").open("wb") as file:
        file.truncate(65 * MIB)
    it.proxy.faults.append(S3Fault("hold", on="large", times=2))
    words = ["volume", "upload", str(it.folder), it.bucket, "--datacenter", "EU-RO-1", "--s3-url", it.proxy.url]
    environ = {"PATH": os.environ["PATH"], **KEYS, "XDG_CACHE_HOME": str(it.states)}

    with subprocess.Popen(
        [sys.executable, "-m", "a1111_client", *words], cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True
    ) as process:
        assert it.proxy.holding.wait(60)
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()

    assert (process.returncode, said) == (130, "a1111: stopped\n")


def test_without_replace_nothing_is_overwritten_and_nothing_sent(it: Upload) -> None:
    it.write(ALL[2], b"THE LORA")

    refused = run(it)
    unasked = run(it, "--replace")

    assert refused.exit_code == 1
    assert f"{ALL[2]}: is there, and is another file" in refused.output and "--replace overwrites" in refused.output
    assert unasked.exit_code == 2 and "No worker may run meanwhile" in unasked.output
    assert it.s3.keys(it.bucket) == [ALL[2]] and it.stored(ALL[2]) == b"THE LORA"

    replaced = run(it, "--replace", "--yes")

    assert replaced.exit_code == 0, replaced.output
    assert it.stored(ALL[2]) == b"the LoRA"


def test_without_a_key_or_an_s3_api_nothing_is_asked(it: Upload) -> None:
    no_key = run(it, RUNPOD_S3_SECRET_ACCESS_KEY="")
    words = ["volume", "upload", str(it.folder), it.bucket, "--datacenter", "US-TX-3"]
    no_api = CliRunner().invoke(app, words, env=KEYS)

    assert no_key.exit_code == 2 and "RUNPOD_S3_ACCESS_KEY_ID" in no_key.output
    assert no_api.exit_code == 2 and "volumes in US-TX-3 have no S3 API" in no_api.output
    assert it.proxy.asked == []


# A worker


def manager(fleet: Fleet, *words: str, models: Path) -> subprocess.CompletedProcess[str]:
    """`python model_manager.py` with the settings of a worker."""
    environ = {
        "PATH": os.environ["PATH"],
        "MODELS_DIR": str(models),
        "MODEL_SOURCES": "",
        "WEBUI_MODELS_DIR": str(fleet.folder / "webui"),
        "CIVITAI_URL": fleet.civitai.url,
        "STORAGE_HOSTS": fleet.civitai.storage.url,
        "CIVITAI_API_KEY": KEY,
    }
    command = [sys.executable, str(ROOT / "model_manager.py"), *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


def test_a_worker_finds_what_was_uploaded_as_if_it_had_fetched_it(tmp_path: Path, s3: S3Server) -> None:
    it = Upload(tmp_path, s3)
    prepared, mounted = tmp_path / "prepared", tmp_path / "runpod-volume"
    with Fleet(tmp_path) as fleet, it.proxy:
        fleet.serve_checkpoint()
        fleet.serve(DETAIL)
        words = ("prefetch", "checkpoint", str(DETAIL), "--models-dir", str(prepared))
        assert manager(fleet, *words, models=tmp_path / "elsewhere").returncode == 0
        it.folder = prepared
        assert run(it).exit_code == 0
        for key in s3.keys(it.bucket):  # a key is a path below the volume's root
            (mounted / key).parent.mkdir(parents=True, exist_ok=True)
            (mounted / key).write_bytes(it.stored(key))
        fleet.civitai.asked.clear()
        fleet.civitai.storage.asked.clear()

        found = manager(fleet, "prefetch", "checkpoint", str(DETAIL), "--json", models=mounted / "models")

        document = json.loads(found.stdout)
        assert found.returncode == 0 and len(document["models"]) == 2, found.stderr
        assert all(not model["downloaded"] for model in document["models"])
        assert [asked.path for asked in (*fleet.civitai.asked, *fleet.civitai.storage.asked)] == []
        listed = manager(fleet, "list", models=mounted / "models").stdout
        assert re.search(rf"{DETAIL}\s+detail_tweaker_xl\.safetensors", listed)
