# The worker's image. Every address, version and commit is a build argument, with the real value as its default. Stages:
#
#   system ── webui ── extensions ─────┬── (the image)     /opt/webui     Python 3.10, torch, A1111 at its pin, extensions
#     │         │           │          │                                  only with EXTENSIONS
#     │         ├── tokenizer ─────────┤                   /opt/huggingface
#     │         └── smoke-webui ───────┤                   the test that A1111 can start; the image needs its result
#     ├── worker ─────────────────┬────┤                   /opt/worker    the worker's environment
#     │         └── smoke-worker ─┼────┤
#     ├── pinned ─────────────────┤    ├                   /opt/webui/app/models  upscalers, faces: image/pins.toml
#     ├── checkpoint ─────────────┘    ├                   /models        only with BAKE_CHECKPOINT=1
#     └── files ───────────────────────┘                   /opt/worker/app, last: a change of handler.py is one small layer
#
# `--target sandbox` is the worker's environment without a WebUI, for docker-compose.yml's sandbox.

# torch's wheels contain CUDA: a base image with CUDA would only add 2 GB of it again.
ARG BASE_IMAGE=ubuntu:22.04

# ---- the base of every other stage ----
FROM ${BASE_IMAGE} AS system
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG PYTHON=python3.10
# libgoogle-perftools4: tcmalloc for the WebUI; git: for GitPython, which A1111 imports.
# Their versions are not pinned (DL3008): Ubuntu's archive deletes a version when it publishes the next one.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked <<'END'
rm -f /etc/apt/apt.conf.d/docker-clean
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -qy --no-install-recommends ca-certificates git libgoogle-perftools4 "$PYTHON"
END

# ---- uv, only for the build ----
FROM system AS tools
ARG PYPI_INDEX_URL=https://pypi.org/simple
COPY locks/uv.txt /tmp/
# DL3008: as above. DL3013 wants a version for pip's package: uv.txt pins it, with its hash.
# hadolint ignore=DL3008,DL3013
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked <<'END'
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -qy --no-install-recommends python3-pip
python3 -m pip install -q --no-cache-dir --index-url "$PYPI_INDEX_URL" --target /uv --require-hashes -r /tmp/uv.txt
END

# ---- the WebUI ----
FROM system AS webui
ARG PYTHON=python3.10
ARG PYPI_INDEX_URL=https://pypi.org/simple
# Its packages, each with its version and hash: locks/webui-NAME.txt and locks/torch-NAME.txt. cu128: PyTorch's builds,
# for sm_75 to sm_120. pypi: PyPI's builds of the same versions, for CUDA 12.6, sm_50 to sm_90; TORCH_INDEX_URL is empty.
ARG WEBUI_LOCK=cu128
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cu128
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
COPY locks/torch-${WEBUI_LOCK}.txt locks/webui-${WEBUI_LOCK}.txt /opt/webui/locks/
# `architectures`: which GPUs torch has code for. start.sh reads it, because importing torch takes seconds.
RUN --mount=type=cache,target=/root/.cache/uv --mount=type=bind,from=tools,source=/uv,target=/uv <<'END'
export VIRTUAL_ENV=/opt/webui UV_DEFAULT_INDEX="$PYPI_INDEX_URL"
/uv/bin/uv venv -q --allow-existing --no-python-downloads --python "$PYTHON" /opt/webui
install() { /uv/bin/uv pip install --no-deps --require-hashes "$@"; }
install ${TORCH_INDEX_URL:+--default-index "$TORCH_INDEX_URL"} -r "/opt/webui/locks/torch-$WEBUI_LOCK.txt"
install -r "/opt/webui/locks/webui-$WEBUI_LOCK.txt"
/opt/webui/bin/python -c 'import torch; print(torch._C._cuda_getArchFlags())' >/opt/webui/architectures
END

ARG WEBUI_REPO=https://github.com/AUTOMATIC1111/stable-diffusion-webui.git
# v1.10.1; v1.9.3 is 1c0a0c4c26f78c32095ebc7f8af82f5c04fca8c0
ARG WEBUI_COMMIT=82a973c04367123ae98bd9abdf80d9eda9b910e2
ARG ASSETS_REPO=https://github.com/AUTOMATIC1111/stable-diffusion-webui-assets.git
ARG ASSETS_COMMIT=6f7db241d2f8ba7457bac5ca9753331f0c266917
# A copy by a maintainer of A1111: Stability-AI's own is gone since December 2025.
ARG STABLE_DIFFUSION_REPO=https://github.com/w-e-w/stablediffusion.git
ARG STABLE_DIFFUSION_COMMIT=cf1d67a6fd5ea1aa600c4df58e5b47da45f6bdbf
ARG STABLE_DIFFUSION_XL_REPO=https://github.com/Stability-AI/generative-models.git
ARG STABLE_DIFFUSION_XL_COMMIT=45c443b316737a4ab6e40413d7794a7f5657c19f
ARG K_DIFFUSION_REPO=https://github.com/crowsonkb/k-diffusion.git
ARG K_DIFFUSION_COMMIT=ab527a9a6d347f364e3d185ba6d714e22d80cb3c
ARG BLIP_REPO=https://github.com/salesforce/BLIP.git
ARG BLIP_COMMIT=48211a1594f1321b00f14c9f7a5b4813144b2fb9
# A1111 looks for the helpers under exactly these names.
RUN --mount=type=bind,source=image/checkout.sh,target=/image/checkout.sh <<'END'
. /image/checkout.sh
app=/opt/webui/app
checkout "$app" "$WEBUI_REPO" "$WEBUI_COMMIT"
checkout "$app/repositories/stable-diffusion-webui-assets" "$ASSETS_REPO" "$ASSETS_COMMIT"
checkout "$app/repositories/stable-diffusion-stability-ai" "$STABLE_DIFFUSION_REPO" "$STABLE_DIFFUSION_COMMIT"
checkout "$app/repositories/generative-models" "$STABLE_DIFFUSION_XL_REPO" "$STABLE_DIFFUSION_XL_COMMIT"
checkout "$app/repositories/k-diffusion" "$K_DIFFUSION_REPO" "$K_DIFFUSION_COMMIT"
checkout "$app/repositories/BLIP" "$BLIP_REPO" "$BLIP_COMMIT"
# Demo pictures, 58 MB.
rm -rf "$app/repositories/stable-diffusion-stability-ai/assets" "$app/repositories/generative-models/assets"
# A1111 makes this folder beside its code, also if its data is elsewhere: docker run --read-only.
ln -s /tmp/webui-data/config_states "$app/config_states"
END

ARG CLIP_PACKAGE=git+https://github.com/openai/CLIP.git@d50d76daa670286dd6cacf3bcd80b5e4823fc8e1
RUN --mount=type=cache,target=/root/.cache/uv --mount=type=bind,from=tools,source=/uv,target=/uv <<'END'
export VIRTUAL_ENV=/opt/webui GIT_TERMINAL_PROMPT=0
# Its commit is its pin. It is built with the setuptools that A1111 pins: newer ones have no pkg_resources any more.
/uv/bin/uv pip install --no-deps --no-build-isolation "clip @ $CLIP_PACKAGE"
# Compiled here: otherwise every new container would compile it again. Some files of the helpers are for another Python.
/opt/webui/bin/python -m compileall -q -j 0 /opt/webui/app >/dev/null || true
END

# ---- A1111's extensions, by name: EXTENSIONS="controlnet adetailer". They are not under this repository's licence ----
FROM webui AS extensions
ARG PYPI_INDEX_URL=https://pypi.org/simple
ARG EXTENSIONS=
# v1.1.455, GPL-3.0
ARG CONTROLNET_REPO=https://github.com/Mikubill/sd-webui-controlnet.git
ARG CONTROLNET_COMMIT=56cec5b2958edf3b1807b7e7b2b1b5186dbd2f81
# 25.3.0, AGPL-3.0
ARG ADETAILER_REPO=https://github.com/Bing-su/adetailer.git
ARG ADETAILER_COMMIT=36189cbea735b85fd01e98ac42002b8ce6f0e41d
RUN --mount=type=cache,target=/root/.cache/uv --mount=type=bind,from=tools,source=/uv,target=/uv \
    --mount=type=bind,source=image/checkout.sh,target=/image/checkout.sh \
    --mount=type=bind,source=locks/controlnet.txt,target=/image/controlnet.txt \
    --mount=type=bind,source=locks/adetailer.txt,target=/image/adetailer.txt <<'END'
export VIRTUAL_ENV=/opt/webui UV_DEFAULT_INDEX="$PYPI_INDEX_URL"
. /image/checkout.sh
folder=/opt/webui/app/extensions
# Over the packages of A1111. Those that they replace are in these lists too.
install() {
  cp "/image/$1.txt" /opt/webui/locks/
  /uv/bin/uv pip install --no-deps --require-hashes -r "/image/$1.txt"
}
for extension in $EXTENSIONS; do
  case "$extension" in
    controlnet) checkout "$folder/sd-webui-controlnet" "$CONTROLNET_REPO" "$CONTROLNET_COMMIT" && install controlnet ;;
    adetailer) checkout "$folder/adetailer" "$ADETAILER_REPO" "$ADETAILER_COMMIT" && install adetailer ;;
    *) echo "EXTENSIONS has no $extension; it knows controlnet and adetailer" >&2 && exit 1 ;;
  esac
done
[ -z "$EXTENSIONS" ] || /opt/webui/bin/python -m compileall -q -j 0 "$folder" >/dev/null || true
END

# ---- what A1111 would fetch from the Hugging Face hub with its first model ----
FROM webui AS tokenizer
# DL3064 takes the name for that of a secret: this is CLIP's tokenizer.
# hadolint ignore=DL3064
ARG BAKE_TOKENIZER=1
COPY image/tokenizer.py /image/
RUN <<'END'
mkdir -p /opt/huggingface
if [ "$BAKE_TOKENIZER" = 1 ]; then
  HF_HOME=/opt/huggingface /opt/webui/bin/python /image/tokenizer.py
fi
find /opt/huggingface -exec touch -h -d @0 {} +
END

# ---- the worker's environment: not the WebUI's, whose fastapi is too old for the runpod SDK ----
FROM system AS worker
ARG PYTHON=python3.10
ARG PYPI_INDEX_URL=https://pypi.org/simple
COPY locks/worker.txt /tmp/
RUN --mount=type=cache,target=/root/.cache/uv --mount=type=bind,from=tools,source=/uv,target=/uv <<'END'
export VIRTUAL_ENV=/opt/worker UV_DEFAULT_INDEX="$PYPI_INDEX_URL" UV_LINK_MODE=copy
/uv/bin/uv venv -q --no-python-downloads --python "$PYTHON" /opt/worker
/uv/bin/uv pip install --compile-bytecode --require-hashes -r /tmp/worker.txt
END

# ---- files that A1111 would download at job time, each proven by its SHA-256: image/pins.toml ----
FROM system AS pinned
ARG BAKE_UPSCALERS=1
ARG EXTENSIONS=
ARG CONTROLNET_ANNOTATORS=
COPY image/pins.py image/pins.toml /image/
RUN --mount=type=cache,id=pinned,target=/cache --mount=type=bind,from=worker,source=/opt/worker,target=/opt/worker <<'END'
mkdir -p /pinned/opt/webui/app/models
/opt/worker/bin/python /image/pins.py fetch /cache /pinned/opt/webui/app/models
find /pinned -exec touch -h -d @0 {} +
END

# ---- the worker itself, compiled; all times are fixed, so that the same files give the same layer on any builder ----
FROM system AS files
ARG PYTHON=python3.10
COPY handler.py model_manager.py start.sh image/healthcheck.py /files/opt/worker/app/
COPY a1111_worker /files/opt/worker/app/a1111_worker
COPY local_queue /files/opt/worker/app/local_queue
RUN <<'END'
"$PYTHON" -m compileall -q --invalidation-mode unchecked-hash -s /files -p / /files
chmod -R u=rwX,go=rX /files
chmod 755 /files/opt/worker/app/start.sh
find /files -exec touch -h -d @0 {} +
END

# ---- the checkpoint, if the image is to contain it; its key is a build secret and is in no layer ----
FROM system AS checkpoint
ARG BAKE_CHECKPOINT=0
ARG CHECKPOINT_URL=
ARG CHECKPOINT_FILE=
ARG CHECKPOINT_NAME=
ARG CHECKPOINT_SHA256=
# Where it comes from, only during the build. Empty: CivitAI.
ARG CIVITAI_URL=
ARG MODEL_HOSTS=
ARG STORAGE_HOSTS=
RUN --mount=type=cache,id=checkpoint,target=/cache \
    --mount=type=bind,from=worker,source=/opt/worker,target=/opt/worker \
    --mount=type=bind,from=files,source=/files/opt/worker/app/a1111_worker,target=/worker/a1111_worker \
    --mount=type=bind,from=files,source=/files/opt/worker/app/model_manager.py,target=/worker/model_manager.py \
    --mount=type=bind,source=image/baked.py,target=/image/baked.py \
    --mount=type=secret,id=civitai_api_key <<'END'
mkdir -p /baked/models/checkpoints /known/models/checkpoints
if [ "$BAKE_CHECKPOINT" = 1 ]; then
  CIVITAI_API_KEY="$(cat /run/secrets/civitai_api_key 2>/dev/null || true)" MODELS_DIR=/cache/models \
    /opt/worker/bin/python /worker/model_manager.py prefetch checkpoint
  PYTHONPATH=/worker /opt/worker/bin/python /image/baked.py /cache/models/checkpoints >/known/models/baked-checkpoint
  file="$(sed -n 's/^CHECKPOINT_FILE=//p' /known/models/baked-checkpoint)"
  cp "/cache/models/checkpoints/$file" /baked/models/checkpoints
  cp "/cache/models/checkpoints/$file.json" /known/models/checkpoints
elif [ -n "$CHECKPOINT_URL" ]; then
  echo 'CHECKPOINT_URL is for BAKE_CHECKPOINT=1; to choose another checkpoint at run time, set it there' >&2
  exit 1
fi
# Fixed times: otherwise a builder without this cache would make, and push, another layer of the same 6.5 GB.
# The sidecar contains the time of the download, and is a layer of its own.
find /baked /known -exec touch -h -d @0 {} +
END

# ---- does it work? Both tests are part of the build; SMOKE_TEST=0 skips them ----
FROM extensions AS smoke-webui
ARG SMOKE_TEST=1
ARG EXTENSIONS=
# DL3064 takes the name for that of a secret: this is CLIP's tokenizer.
# hadolint ignore=DL3064
ARG BAKE_TOKENIZER=1
COPY image/smoke.py image/tokenizer.py start.sh /image/
WORKDIR /opt/webui/app
RUN --mount=type=bind,from=tokenizer,source=/opt/huggingface,target=/opt/huggingface,rw <<'END'
mkdir -p /passed/opt/smoke
if [ "$SMOKE_TEST" = 1 ]; then
  HF_HUB_OFFLINE=1 HF_HOME=/opt/huggingface /opt/webui/bin/python /image/smoke.py webui /image/start.sh /opt/webui/locks >/passed/opt/smoke/webui
  cat /passed/opt/smoke/webui
fi
find /passed -exec touch -d @0 {} +
END

FROM system AS smoke-worker
ARG SMOKE_TEST=1
COPY image/smoke.py /image/
RUN --mount=type=bind,from=worker,source=/opt/worker,target=/opt/worker \
    --mount=type=bind,from=files,source=/files/opt/worker/app,target=/files <<'END'
mkdir -p /passed/opt/smoke
if [ "$SMOKE_TEST" = 1 ]; then
  bash -n /files/start.sh
  /opt/worker/bin/python /image/smoke.py worker /files >/passed/opt/smoke/worker
  cat /passed/opt/smoke/worker
fi
find /passed -exec touch -d @0 {} +
END

# ---- the worker against the sandbox, without a WebUI or a GPU: docker compose --profile sandbox up ----
FROM system AS sandbox
COPY --from=worker /opt/worker /opt/worker
WORKDIR /checkout
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
CMD ["/opt/worker/bin/python", "-m", "sandbox", "--folder", "/tmp/sandbox", "--", \
     "/opt/worker/bin/python", "-m", "local_queue", "--host", "0.0.0.0", "--", "/opt/worker/bin/python", "handler.py"]

# ---- the image ----
FROM extensions AS image
COPY --link --from=tokenizer /opt/huggingface /opt/huggingface
COPY --link --from=worker /opt/worker /opt/worker
COPY --link --from=pinned /pinned/ /
COPY --link --from=checkpoint /baked/ /
COPY --link --from=checkpoint /known/ /
COPY --link --from=smoke-webui /passed/ /
COPY --link --from=smoke-worker /passed/ /
COPY --link --from=files /files/ /

# RUNPOD_DEBUG_LEVEL: the SDK's default logs prompts and results; WARNING would crash its import.
# RUNPOD_MIN_DISK_PERCENT: the SDK ends a worker if less than 10 % of / is free; the worker itself reports a full disk.
ENV WEBUI_DIR=/opt/webui/app \
    WEBUI_PYTHON=/opt/webui/bin/python \
    WORKER_DIR=/opt/worker/app \
    WORKER_PYTHON=/opt/worker/bin/python \
    WEBUI_STATE_FILE=/tmp/webui.state \
    WORKER_STATE_FILE=/tmp/worker.state.json \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    RUNPOD_DEBUG_LEVEL=INFO \
    RUNPOD_MIN_DISK_PERCENT=1

ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="a1111-worker" \
      org.opencontainers.image.description="A RunPod serverless worker for the Automatic1111 Stable Diffusion WebUI" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

WORKDIR /opt/worker/app
# The local queue, if it listens on more than 127.0.0.1. The WebUI cannot be reached from outside of the container.
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=420s --retries=3 \
    CMD ["/opt/worker/bin/python", "-IS", "/opt/worker/app/healthcheck.py"]
ENTRYPOINT ["/opt/worker/app/start.sh"]
