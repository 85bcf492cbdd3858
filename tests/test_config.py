"""The settings: defaults, what is refused, and the rules between them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from a1111_worker.config import (
    SETTINGS,
    START_SH_SETTINGS,
    BucketVariables,
    Config,
    default_models_dir,
    find_misspelt_settings,
    prepare_sdk_environment,
    runs_test_file,
)
from a1111_worker.domain import BucketSettings
from a1111_worker.environment import settings_of
from a1111_worker.errors import ConfigError
from tests.support import ROOT


def test_an_empty_environment_is_a_valid_one() -> None:
    config = Config.from_env({})

    assert config.webui_url == "http://127.0.0.1:3000"
    assert config.checkpoint_file == "jib_mix_illustrious_realistic_v2.safetensors"
    assert config.boot_timeout == 400.0
    assert config.civitai_urls == ("https://civitai.com", "https://civitai.red")
    assert config.runpod is None


def test_an_empty_value_means_the_default() -> None:
    names = [setting.name for setting in SETTINGS if setting.name != "MODEL_SOURCES"]

    config = Config.from_env(dict.fromkeys(names, ""))

    assert config == Config.from_env({})


# name, value: what must be refused
BAD = [
    ("WEBUI_URL", "127.0.0.1:3000"),  # no scheme
    ("WEBUI_URL", "http://host/?x=1"),  # a query would end up in the middle of ours
    ("WEBUI_URL", "http://127.0.0.1:99999"),  # no such port
    ("WEBUI_URL", "http://127.0.0.1:abc"),
    ("WEBUI_URL", "http://127.0.0.1:0"),
    ("WEBUI_URL", "http://[::1"),
    ("WEBUI_URL", "https://user:pw@host"),
    ("WEBUI_URL", "https://:pw@host"),  # a password without a name
    ("WEBUI_URL", "https://@host"),
    ("BUCKET_ENDPOINT_URL", "https://:pw@s3.example.com"),
    ("BUCKET_PUBLIC_URL", "https://:pw@cdn.example.com/pictures"),
    ("CIVITAI_URL", "https://:pw@civitai.com"),
    ("MODEL_HOSTS", "https://:pw@cdn.example.com"),
    ("STORAGE_HOSTS", "cdn.example.com, :pw@cdn.example.com"),
    ("BOOT_TIMEOUT", "soon"),
    ("BOOT_TIMEOUT", "-1"),
    ("JOB_TIMEOUT", "nan"),
    ("GENERATION_TIMEOUT", "inf"),
    ("SHUTDOWN_GRACE", "1e1"),  # numbers to Python, and not to start.sh
    ("SHUTDOWN_GRACE", "1_0"),
    ("SHUTDOWN_GRACE", "\N{FULLWIDTH DIGIT EIGHT}"),
    ("SHUTDOWN_GRACE", ".5"),
    ("MODEL_CACHE_LIMIT_GB", "0"),
    ("CHECKPOINT_FILE", "../x.safetensors"),  # a path
    ("CHECKPOINT_FILE", "x.ckpt"),  # not safetensors
    ("CHECKPOINT_SHA256", "abc"),
    ("CIVITAI_URL", "https://civitai.com/api"),  # an origin has no path
    ("MODEL_HOSTS", "http://example.com"),  # not https
    ("MODEL_HOSTS", "http://127.0.0.1"),  # a local origin names its port
    ("STORAGE_HOSTS", "https://user@example.com"),
    ("MODEL_HOSTS", "https://host:99999"),
    ("MODEL_HOSTS", "https://host:abc"),
    ("MODEL_HOSTS", "https://münchen.de"),  # its name in the DNS is xn--mnchen-3ya.de
    ("MODEL_HOSTS", "https://host#frag"),
    ("MODEL_HOSTS", "https://host."),
    ("MODEL_HOSTS", "https://[::1"),
    ("STORAGE_HOSTS", "https://*"),
    ("CIVITAI_URL", "http://10.0.0.5:8080"),  # not https, and not this machine
    ("CIVITAI_URL", "https://civitai.com:99999"),
    ("CIVITAI_URL", "https://*.civitai.com"),
    ("HF_REPOS", "owner/one, two"),
    ("HF_REPOS", "https://huggingface.co/owner/one"),
    ("HF_ENDPOINT", "http://hub.example.com"),
    ("JOBS_IN_FLIGHT", "0"),
    ("JOBS_IN_FLIGHT", "2.5"),
    ("MAX_STEPS", "²"),  # a digit to Python, a number to nobody
    ("WARMUP", "maybe"),
    ("LOG_LEVEL", "LOUD"),
    ("LOG_FORMAT", "xml"),
    ("CIVITAI_API_KEY", "two words"),
    ("BUCKET_ENDPOINT_URL", "https://account.r2.cloudflarestorage.com/results"),  # as R2's page shows it
    ("BUCKET_ENDPOINT_URL", "s3.eu-central-1.amazonaws.com"),  # no scheme
    ("BUCKET_ENDPOINT_URL", "https://s3.example.com:abc"),
    ("BUCKET_NAME", "a/b"),
    ("BUCKET_REGION", "eu central 1"),
    ("BUCKET_PREFIX", "../up"),
    ("BUCKET_PREFIX", "a//b"),
    ("BUCKET_PREFIX", "a b"),
    ("BUCKET_LINK_TTL", "0"),
    ("BUCKET_LINK_TTL", "604801"),  # more than seven days is more than a signature may live
    ("BUCKET_PUBLIC_URL", "https://cdn.example.com/?x=1"),
    ("BUCKET_PUBLIC_URL", "https://cdn.example.com:abc"),
    ("BUCKET_SECRET_ACCESS_KEY", "with spaces in it"),
]

BUCKET = {
    "BUCKET_ENDPOINT_URL": "https://s3.eu-central-1.amazonaws.com/",
    "BUCKET_ACCESS_KEY_ID": "the-id",
    "BUCKET_SECRET_ACCESS_KEY": "the/secret+key",
    "BUCKET_NAME": "results",
}


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_stops_the_start_with_a_line_that_names_it(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Config.from_env({**(BUCKET if name.startswith("BUCKET_") else {}), name: value})

    line = str(raised.value)
    assert line.startswith(f"{name}=") and "takes" in line and "\n" not in line


def test_a_bad_address_is_refused_with_what_is_taken_even_if_it_cannot_be_parsed() -> None:
    with pytest.raises(ConfigError) as raised:
        Config.from_env({"WEBUI_URL": "http://[::1"})

    assert str(raised.value) == "WEBUI_URL='http://[::1': takes an http(s) URL without credentials and without a query"


def test_seconds_may_have_a_fraction_and_blanks_around_them() -> None:
    assert Config.from_env({"SHUTDOWN_GRACE": " 8.5 "}).shutdown_grace == 8.5


def test_a_bad_key_is_not_shown() -> None:
    with pytest.raises(ConfigError) as raised:
        Config.from_env({"CIVITAI_API_KEY": "secret with spaces"})

    assert "secret" not in str(raised.value)


def test_a_bad_secret_of_the_bucket_is_not_shown() -> None:
    with pytest.raises(ConfigError) as raised:
        Config.from_env({**BUCKET, "BUCKET_SECRET_ACCESS_KEY": "secret with spaces"})

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WEBUI_URL", "https://:hush@host"),
        ("WEBUI_URL", "https://user:hu/sh@host"),  # a `/` that should have been escaped
        ("MODEL_HOSTS", "https://user:hush@host"),
        ("CIVITAI_URL", "user:hush@civitai.com"),
        ("BUCKET_ENDPOINT_URL", "https://user:hush@s3.example.com?hush"),
    ],
)
def test_credentials_in_an_address_are_not_shown(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Config.from_env({**(BUCKET if name.startswith("BUCKET_") else {}), name: value})

    assert str(raised.value).startswith(f"{name}=(not shown): takes")
    assert "hu" not in str(raised.value)


def test_a_bucket_has_sane_defaults() -> None:
    bucket = Config.from_env(BUCKET).bucket

    assert bucket == BucketSettings("https://s3.eu-central-1.amazonaws.com", "results", "the-id", "the/secret+key")
    assert (bucket.region, bucket.prefix, bucket.link_seconds, bucket.public_url) == ("us-east-1", "", 86_400, None)


def test_every_setting_of_a_bucket_can_be_set() -> None:
    bucket = Config.from_env(
        {
            **BUCKET,
            "BUCKET_REGION": "eu-central-1",
            "BUCKET_PREFIX": "/a1111/prod/",
            "BUCKET_LINK_TTL": "604800",
            "BUCKET_PUBLIC_URL": "https://cdn.example.com/pictures/",
        }
    ).bucket

    assert bucket is not None
    assert (bucket.region, bucket.prefix, bucket.link_seconds) == ("eu-central-1", "a1111/prod", 604_800)
    assert bucket.public_url == "https://cdn.example.com/pictures"


@pytest.mark.parametrize("missing", BUCKET)
def test_a_bucket_without_one_of_its_four_settings_stops_the_start_with_a_line_that_names_it(missing: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Config.from_env({name: value for name, value in BUCKET.items() if name != missing})

    assert f"set without {missing}: " in str(raised.value)
    assert "secret" not in str(raised.value).replace("BUCKET_SECRET_ACCESS_KEY", "") and "\n" not in str(raised.value)


def test_an_optional_setting_of_the_bucket_needs_the_four_too() -> None:
    with pytest.raises(ConfigError, match="BUCKET_PREFIX set without BUCKET_ENDPOINT_URL"):
        Config.from_env({"BUCKET_PREFIX": "a"})


def test_a_buckets_keys_are_not_in_its_repr() -> None:
    config = Config.from_env(BUCKET)

    assert "the-id" not in repr(config) and "the/secret" not in repr(config)


def test_no_key_is_in_the_repr_of_the_configuration() -> None:
    config = Config.from_env(
        {"CIVITAI_API_KEY": "the-key", "RUNPOD_WEBHOOK_GET_JOB": "https://x", "RUNPOD_AI_API_KEY": "the-key"}
    )

    assert "the-key" not in repr(config)


def test_every_bad_value_has_its_line() -> None:
    with pytest.raises(ConfigError) as raised:
        Config.from_env({"WARMUP": "maybe", "LOG_FORMAT": "xml"})

    assert len(str(raised.value).splitlines()) == 2


def test_another_checkpoint_must_have_a_file_name_of_its_own() -> None:
    with pytest.raises(ConfigError, match="CHECKPOINT_FILE"):
        Config.from_env({"CHECKPOINT_URL": "https://civitai.com/api/download/models/1"})


def test_a_host_may_be_set_with_or_without_https() -> None:
    config = Config.from_env({"MODEL_HOSTS": "cdn.example.com, https://b.example:8443 http://127.0.0.1:8081"})

    assert config.model_hosts == ("https://cdn.example.com", "https://b.example:8443", "http://127.0.0.1:8081")


def test_a_mirror_of_civitai_is_the_only_one_that_is_asked() -> None:
    assert Config.from_env({"CIVITAI_URL": "http://127.0.0.1:9"}).civitai_urls == ("http://127.0.0.1:9",)


def test_the_boot_ends_before_runpod_gives_up() -> None:
    assert Config.from_env({"RUNPOD_INIT_TIMEOUT": "900"}).boot_timeout == 880.0


def test_an_empty_list_of_sources_means_none() -> None:
    assert Config.from_env({"MODEL_SOURCES": ""}).model_sources == ()
    assert Config.from_env({}).model_sources == (Path("/models"),)


def test_the_workers_id_is_filled_into_runpods_address_and_the_jobs_id_is_not() -> None:
    config = Config.from_env(
        {
            "RUNPOD_WEBHOOK_GET_JOB": "https://x/job-take/$ID?gpu=1",
            "RUNPOD_WEBHOOK_POST_OUTPUT": "https://x/job-done/$RUNPOD_POD_ID/$ID?gpu=1",
            "RUNPOD_POD_ID": "pod1",
            "RUNPOD_AI_API_KEY": "key",
        }
    )

    assert config.runpod is not None
    assert config.runpod.output_url == "https://x/job-done/pod1/$ID?gpu=1"


def test_the_cache_is_on_the_network_volume_if_there_is_one(tmp_path: Path) -> None:
    without = default_models_dir(tmp_path)
    (tmp_path / "runpod-volume").mkdir()

    assert without == tmp_path / "models"
    assert default_models_dir(tmp_path) == tmp_path / "runpod-volume" / "models"


def test_a_folder_with_runpods_cached_models_alone_is_no_network_volume(tmp_path: Path) -> None:
    (tmp_path / "runpod-volume/huggingface-cache/hub").mkdir(parents=True)
    alone = default_models_dir(tmp_path)
    (tmp_path / "runpod-volume/models").mkdir()

    assert alone == tmp_path / "models"
    assert default_models_dir(tmp_path) == tmp_path / "runpod-volume" / "models"


def test_the_repositories_of_a_list_are_separated_by_commas_or_spaces() -> None:
    config = Config.from_env({"HF_REPOS": "owner/one, Owner/two.x owner_3/three-y"})

    assert config.hf_repos == ("owner/one", "Owner/two.x", "owner_3/three-y")


# what somebody set, and what the SDK reads
SDK_LEVELS = [
    ({"RUNPOD_DEBUG_LEVEL": "WARNING"}, {"RUNPOD_DEBUG_LEVEL": "INFO"}),
    ({"RUNPOD_DEBUG_LEVEL": ""}, {"RUNPOD_DEBUG_LEVEL": "INFO"}),
    ({"RUNPOD_LOG_LEVEL": "LOUD"}, {"RUNPOD_LOG_LEVEL": "INFO", "RUNPOD_DEBUG_LEVEL": "INFO"}),
    ({"RUNPOD_LOG_LEVEL": "", "RUNPOD_DEBUG_LEVEL": "WARN"}, {"RUNPOD_DEBUG_LEVEL": "WARN"}),  # the first would win
    ({"RUNPOD_LOG_LEVEL": " error "}, {"RUNPOD_LOG_LEVEL": "error", "RUNPOD_DEBUG_LEVEL": "INFO"}),
]


@pytest.mark.parametrize(("given", "expected"), SDK_LEVELS)
def test_a_log_level_that_would_end_the_sdks_import_is_replaced(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    environ = dict(given)

    prepare_sdk_environment(environ)

    assert environ == expected


def test_the_sdk_logs_prompts_only_if_somebody_asked_for_it() -> None:
    silent: dict[str, str] = {}
    asked = {"RUNPOD_DEBUG_LEVEL": "DEBUG"}

    prepare_sdk_environment(silent)
    prepare_sdk_environment(asked)

    assert (silent["RUNPOD_DEBUG_LEVEL"], asked["RUNPOD_DEBUG_LEVEL"]) == ("INFO", "DEBUG")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        ({"RUNPOD_WEBHOOK_GET_JOB": "https://x"}, False),  # its queue
        ({"RUNPOD_REALTIME_PORT": "8000"}, False),
        ({"RUNPOD_REALTIME_PORT": "0"}, True),
    ],
)
def test_off_runpod_the_sdk_runs_the_job_of_its_test_file(environ: dict[str, str], expected: bool) -> None:
    assert runs_test_file(environ) is expected


# Misspelt settings

# a variable that is no setting, and the settings that it probably means, the likeliest first
MISSPELT = [
    ("MAX_STEP", ["MAX_STEPS"]),
    ("max_steps", ["MAX_STEPS"]),
    ("CIVITAI_KEY", ["CIVITAI_API_KEY"]),
    ("CIVITAI_TOKEN", ["CIVITAI_API_KEY"]),
    ("BUCKET_URL", ["BUCKET_ENDPOINT_URL", "BUCKET_PUBLIC_URL"]),
    ("BUCKET_SECRET_KEY", ["BUCKET_SECRET_ACCESS_KEY"]),
    ("S3_BUCKET_NAME", ["BUCKET_NAME"]),
    ("JOB_TIME_OUT", ["JOB_TIMEOUT"]),
    ("MODEL_DIR", ["MODELS_DIR"]),
    ("WEBUI_TIMEOUT", ["WEBUI_READY_TIMEOUT"]),
    ("WEBUI_RESTARTED", ["WEBUI_RESTARTS"]),  # start.sh's own
    ("WEBUI_XYZZY_PLUGH_PLOVER_FROTZ", []),  # ours by its prefix, and like none
]


@pytest.mark.parametrize(("name", "near"), MISSPELT)
def test_a_variable_that_looks_like_a_setting_is_found_with_the_nearest_settings(name: str, near: list[str]) -> None:
    assert find_misspelt_settings([name, "MAX_STEPS", "PATH"]) == {name: near}


# what containers, clouds, shells and Python themselves set
FOREIGN = """
    PATH HOME HOSTNAME PWD OLDPWD SHLVL TERM USER LOGNAME MAIL SHELL EDITOR LANG LC_ALL TZ TMPDIR _ DISPLAY COLUMNS
    RUNPOD_API_KEY RUNPOD_AI_API_KEY RUNPOD_POD_ID RUNPOD_ENDPOINT_ID RUNPOD_INIT_TIMEOUT RUNPOD_DEBUG_LEVEL
    RUNPOD_WEBHOOK_GET_JOB RUNPOD_WEBHOOK_POST_OUTPUT RUNPOD_WEBHOOK_PING RUNPOD_PING_INTERVAL RUNPOD_LOG_LEVEL
    RUNPOD_GPU_COUNT RUNPOD_CPU_COUNT RUNPOD_MEM_GB RUNPOD_GPU_NAME RUNPOD_VOLUME_ID RUNPOD_DC_ID RUNPOD_PUBLIC_IP
    RUNPOD_TCP_PORT_22 RUNPOD_MIN_DISK_PERCENT RUNPOD_MAX_DOWNLOAD_BYTES RUNPOD_SKIP_GPU_CHECK PUBLIC_KEY
    HF_TOKEN HF_HOME HF_HUB_OFFLINE HF_HUB_CACHE HUGGING_FACE_HUB_TOKEN TRANSFORMERS_CACHE TORCH_HOME
    AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_REGION AWS_DEFAULT_REGION AWS_PROFILE AWS_REQUEST_CHECKSUM_CALCULATION
    NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA CUDA_VERSION CUDA_VISIBLE_DEVICES NCCL_VERSION
    LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH PYTHONUNBUFFERED PYTHONDONTWRITEBYTECODE PYTHON_VERSION PIP_NO_CACHE_DIR
    UV_LINK_MODE VIRTUAL_ENV PYTORCH_CUDA_ALLOC_CONF OMP_NUM_THREADS MAX_JOBS KUBERNETES_SERVICE_HOST
    KUBERNETES_PORT_443_TCP_ADDR http_proxy HTTPS_PROXY NO_PROXY SSL_CERT_FILE REQUESTS_CA_BUNDLE CI GITHUB_ACTIONS
    GITHUB_TOKEN JUPYTER_PASSWORD OPENAI_API_KEY UVICORN_LOG_LEVEL COMMANDLINE_ARGS TORCH_COMMAND DEBIAN_FRONTEND
    GPG_KEY SSH_AUTH_SOCK MAKEFLAGS MAKELEVEL PYTEST_CURRENT_TEST COLORTERM XDG_RUNTIME_DIR JOB_NAME
"""


def test_other_programs_variables_are_no_misspelt_settings() -> None:
    assert find_misspelt_settings(FOREIGN.split()) == {}


def test_no_setting_is_misspelt() -> None:
    assert find_misspelt_settings([*(setting.name for setting in SETTINGS), *START_SH_SETTINGS]) == {}


def test_a_variable_whose_name_cannot_be_shown_is_left_out() -> None:
    assert find_misspelt_settings(["MAX_STEP\x1b[31m", "WEBUI_\nX", "MAX_STEPS" * 1000, ""]) == {}


def test_the_settings_of_start_sh_are_those_that_it_reads() -> None:
    script = (ROOT / "start.sh").read_text(encoding="utf-8")
    read = re.findall(r'^ +(?:export )?([A-Z_]+)="\$\{\1:?-', script, re.MULTILINE)

    assert sorted(START_SH_SETTINGS) == sorted(set(read) - {setting.name for setting in SETTINGS})


# The table


def test_every_field_is_a_setting_unless_it_is_made_of_several_variables_or_runpods_own_folder() -> None:
    fields = {field.name for field in dataclasses.fields(Config)}

    assert fields - set(settings_of(Config)) == {"bucket", "hub_cache", "runpod"}


def test_the_bucket_has_a_setting_for_every_field() -> None:
    fields = {field.name for field in dataclasses.fields(BucketSettings)}

    assert set(settings_of(BucketVariables)) == fields


def test_every_variable_has_one_place_in_the_table() -> None:
    tables = [settings_of(Config), settings_of(BucketVariables)]

    names = [setting.name for setting in SETTINGS]

    assert len(names) == len(set(names))
    assert {setting.name for table in tables for setting in table.values()} == {
        setting.name for setting in SETTINGS if setting.reader == "worker"
    }


def test_a_default_that_is_shown_means_the_same_when_it_is_set() -> None:
    shown = {setting.name: setting.default for setting in SETTINGS if setting.default != "none"}
    described = {"BOOT_TIMEOUT", "MODELS_DIR", "STORAGE_HOSTS", "CHECKPOINT_URL"}  # in words, not as a value

    values = {name: default for name, default in shown.items() if name not in described}

    for name, default in values.items():
        assert Config.from_env({**(BUCKET if name.startswith("BUCKET_") else {}), name: default}) == Config.from_env(
            BUCKET if name.startswith("BUCKET_") else {}
        ), name


def test_every_setting_is_described_and_every_key_is_secret() -> None:
    assert all(setting.what for setting in SETTINGS)
    assert {setting.name for setting in SETTINGS if setting.secret} == {
        setting.name for setting in SETTINGS if "KEY" in setting.name or "TOKEN" in setting.name
    }
