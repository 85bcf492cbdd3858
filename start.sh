#!/usr/bin/env bash
# The container's first process: it starts the WebUI and keeps it alive, starts the worker, and ends with the worker.
#
#   start.sh [ARGUMENTS OF handler.py]
#
# Without arguments the worker takes jobs: on RunPod from its queue, elsewhere from a queue of its own, on port 8000.
#
# Begin with `main` at the bottom. Sourcing this file defines its functions and runs nothing.
set -euo pipefail

readonly WEBUI_FLAGS=(
  --api --nowebui --server-name 127.0.0.1 # without --server-name, --nowebui listens on every address
  --skip-prepare-environment --skip-install --skip-python-version-check --skip-version-check --skip-torch-cuda-test
  --no-download-sd-model --no-half-vae --disable-console-progressbars
)
readonly CPU_FLAGS=(--use-cpu all --no-half)
# The variables that the WebUI's process gets; `*` is a pattern. docs/modules/startup-script.md has a reason for each.
readonly WEBUI_ENVIRONMENT=(
  PATH HOME LANG 'LC_*' TZ TMPDIR LD_LIBRARY_PATH 'CUDA_*' 'NVIDIA_*' 'PYTORCH_*' 'OMP_*' 'MKL_*'
)
# What it gets besides. Its downloads are refused at once: nothing listens on port 9 of this machine. Otherwise a job with
# a missing upscaler would fetch a file that nobody has verified, or hang for ever if packets are dropped.
readonly WEBUI_OFFLINE=(
  HF_HUB_OFFLINE=1 http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9 'no_proxy=127.0.0.1,localhost'
)
RELAY_PY="$(realpath "${BASH_SOURCE[0]}")"
readonly RELAY_PY="${RELAY_PY%/*}/a1111_worker/relay.py" # beside this file
# Seconds between TERM and KILL for the WebUI, after the worker has ended. By then nobody waits for anything in it, and
# unloading torch alone takes longer.
readonly WEBUI_GRACE=0.3

ending=''      # the exit status that a signal asked for
worker=''      # the pid of handler.py, or of its local queue; its process group too
webui=''       # the WebUI's pid, known only to its supervisor
supervisor=''  # the pid of the process that starts the WebUI again
gpu_problem='' # why no WebUI can run on this machine

# --- settings -------------------------------------------------------------------------------------------------------

# Give every setting that is not set its default. If the worker reads the setting too, it is the worker's default.
set_defaults() {
  WEBUI_DIR="${WEBUI_DIR:-/opt/webui/app}"
  WEBUI_PYTHON="${WEBUI_PYTHON:-/opt/webui/bin/python}"
  WEBUI_HF_HOME="${WEBUI_HF_HOME:-/opt/huggingface}"
  WORKER_DIR="${WORKER_DIR:-/opt/worker/app}"
  WORKER_PYTHON="${WORKER_PYTHON:-/opt/worker/bin/python}"
  WEBUI_URL="${WEBUI_URL:-http://127.0.0.1:3000}"
  WEBUI_MODELS_DIR="${WEBUI_MODELS_DIR:-/tmp/webui-models}"
  MODELS_DIR="${MODELS_DIR:-$(default_models_dir)}"
  MODEL_SOURCES="${MODEL_SOURCES-/models}"
  use_baked_checkpoint
  CHECKPOINT_FILE="${CHECKPOINT_FILE:-jib_mix_illustrious_realistic_v2.safetensors}"
  SHUTDOWN_GRACE="${SHUTDOWN_GRACE:-8}"
  LOCAL_API_HOST="${LOCAL_API_HOST:-127.0.0.1}"
  WEBUI_RESTARTS="${WEBUI_RESTARTS:-3}"               # this many restarts
  WEBUI_RESTART_WINDOW="${WEBUI_RESTART_WINDOW:-600}" # within this many seconds
  WEBUI_RESTART_BACKOFF="${WEBUI_RESTART_BACKOFF:-1}" # seconds before the first; doubled for each further one
  # What the WebUI writes is in its own folder, unless that is read-only.
  [[ ! -w "$WEBUI_DIR" ]] || WEBUI_DATA_DIR="${WEBUI_DATA_DIR:-$WEBUI_DIR}"
  WEBUI_DATA_DIR="${WEBUI_DATA_DIR:-/tmp/webui-data}"
  export WEBUI_STATE_FILE="${WEBUI_STATE_FILE:-/tmp/webui.state}"
  export PYTHONUNBUFFERED=1
}

# A checkpoint in the image is the default if the operator names no other one. The build has written its file name, title
# and hash beside it. With these the worker finds it, and needs neither its URL nor a host to download it from.
use_baked_checkpoint() {
  local root name value
  local -a roots
  [[ -z "${CHECKPOINT_URL:-}${CHECKPOINT_FILE:-}" ]] || return 0
  IFS=: read -r -a roots <<<"$MODEL_SOURCES"
  for root in "${roots[@]}"; do
    [[ -r "$root/baked-checkpoint" ]] || continue
    while IFS='=' read -r name value; do
      [[ -n "${!name:-}" ]] || export "$name=$value"
    done <"$root/baked-checkpoint"
  done
}

# The folder of the cache if MODELS_DIR is not set: the same that a1111_worker/config.py chooses.
default_models_dir() {
  if [[ -d /runpod-volume && "$(ls -A /runpod-volume)" != huggingface-cache ]]; then
    echo /runpod-volume/models
  elif [[ -w /models || (! -e /models && -w /) ]]; then
    echo /models
  else
    echo "$WORKER_DIR/models"
  fi
}

# Whether this is a worker of RunPod: then it takes jobs from a queue.
is_on_runpod() { [[ -n "${RUNPOD_WEBHOOK_GET_JOB:-}" ]]; }

# The port of the WebUI, if start.sh has to run it. Fails if WEBUI_URL is neither 127.0.0.1 nor localhost.
local_webui_port() {
  [[ "$WEBUI_URL" =~ ^http://(127\.0\.0\.1|localhost)(:([0-9]+))?/?$ ]] && echo "${BASH_REMATCH[3]:-80}"
}

# --- the GPU --------------------------------------------------------------------------------------------------------

# Set `gpu_flags` to what the WebUI needs on this GPU, or without one if ALLOW_CPU=1. If it cannot run here, set
# `gpu_problem` and fail.
choose_gpu_flags() {
  local capability
  if capability="$(compute_capability)"; then
    gpu_problem="torch in this image has no code for a GPU of compute capability $capability"
    is_supported "$capability" "$(torch_architectures)" || return 1
    gpu_flags=("$(attention_flag "$capability" "$(has_xformers && echo yes)")")
    log INFO "a GPU of compute capability $capability: ${gpu_flags[*]}"
  elif [[ "${ALLOW_CPU:-0}" == 1 ]]; then
    gpu_flags=("${CPU_FLAGS[@]}")
    log INFO "no GPU, and ALLOW_CPU=1: ${gpu_flags[*]}"
  else
    gpu_problem='no GPU found: run the container with --gpus all, or with ALLOW_CPU=1 to generate (very slowly) without one'
    return 1
  fi
}

# Print the GPU architectures that torch has code for, as the build has asked it: importing torch would take seconds.
torch_architectures() { cat "${WEBUI_PYTHON%/bin/*}/architectures" 2>/dev/null || true; }

# The compute capability of the first GPU, such as 8.9: from nvidia-smi, or from torch if nvidia-smi is too old.
compute_capability() {
  local found=''
  command -v nvidia-smi >/dev/null || [[ -e /dev/nvidiactl || -e /dev/dxg ]] || return 1
  read -r found < <(timeout 10 nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || true
  [[ "$found" =~ ^[0-9]+\.[0-9]+$ ]] ||
    found="$("$WEBUI_PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null)" ||
    return 1
  [[ "$found" =~ ^[0-9]+\.[0-9]+$ ]] && echo "$found"
}

# is_supported CAPABILITY ARCHITECTURES: whether torch has code for the GPU. ARCHITECTURES is torch's own list, such as
# `sm_75 sm_86 compute_90`; code for sm_86 runs on 8.6 and 8.9, and code for compute_90 on 9.0 and all later ones. If the
# list is empty, nothing is known: then it is tried.
is_supported() {
  local -i gpu="${1/./}" built
  local architecture
  [[ -n "$2" ]] || return 0
  for architecture in $2; do
    [[ "$architecture" =~ ^(sm|compute)_([0-9]+)$ ]] || continue
    built="${BASH_REMATCH[2]}"
    ((built <= gpu)) || continue
    [[ "${BASH_REMATCH[1]}" == compute ]] || ((built / 10 == gpu / 10)) || continue
    return 0
  done
  return 1
}

# attention_flag CAPABILITY XFORMERS: below 6.0 and above 9.0 A1111 1.10.1 ignores --xformers, without a message.
attention_flag() {
  local number="${1/./}"
  if [[ "$2" == yes ]] && ((number >= 60 && number <= 90)); then
    echo --xformers
  else
    echo --opt-sdp-attention
  fi
}

# Whether the WebUI's environment has xformers. Importing it would take seconds, so this only looks for it.
has_xformers() {
  "$WEBUI_PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("xformers") is None)' 2>/dev/null
}

# --- the WebUI ------------------------------------------------------------------------------------------------------

# start_supervisor PORT: start the supervisor, and wait until it has written the WebUI's pid: the worker reads that.
start_supervisor() {
  local log_fd
  exec {log_fd}> >(relay_lines webui)
  webui_logger=$!
  supervise_webui "$1" "$log_fd" &
  supervisor=$!
  exec {log_fd}>&-
  until [[ -s "$WEBUI_STATE_FILE" ]] || ! is_alive "$supervisor"; do sleep 0.01; done
}

# supervise_webui PORT LOG_FD: run the WebUI, and run it again each time it ends, until TERM or until it ends too often.
supervise_webui() {
  local -a restarts=()
  local delay status
  trap '' INT # a terminal sends it to this process too; start.sh answers it with a TERM
  trap 'ending=yes && stop_webui' TERM
  while :; do
    start_webui "$1" "$2"
    status=0
    wait_for_exit "$webui" || status=$?
    kill_group "$webui"
    [[ -z "$ending" ]] || return 0
    log WARNING "the WebUI (pid $webui) ended with $(describe_status "$status")"
    delay="$(restart_delay "$(now)" "${restarts[@]}")" ||
      give_up "it ended with $(describe_status "$status"), after $WEBUI_RESTARTS restarts in $WEBUI_RESTART_WINDOW s"
    restarts+=("$(now)")
    log INFO "the WebUI is started again in $delay s"
    pause "$delay"
    [[ -z "$ending" ]] || return 0
  done
}

# describe_status STATUS: an exit status in words. The kernel ends a process with KILL if the memory is full, and only the
# worker does the same, to a WebUI that hangs: then its own line is in the log.
describe_status() {
  echo "status $1$([[ "$1" != 137 ]] || echo ' (killed: the memory was full, or it hung)')"
}

# give_up WHY: end the supervisor.
give_up() {
  set_failed "$1"
  exit 0
}

# set_failed WHY: nothing starts the WebUI (any more). The worker reads this, and answers the jobs that wait with WHY.
set_failed() {
  write_state "failed: $1"
  log ERROR "given up on the WebUI: $1"
}

# restart_delay NOW RESTARTS…: the seconds to wait before the next restart. Fails if there were too many in the window.
restart_delay() {
  local now="$1" at recent=0
  shift
  for at in "$@"; do
    ((now - at >= WEBUI_RESTART_WINDOW * 100)) || recent=$((recent + 1))
  done
  ((recent < WEBUI_RESTARTS)) && awk -v first="$WEBUI_RESTART_BACKOFF" -v n="$recent" 'BEGIN { print first * 2 ^ n }'
}

# start_webui PORT LOG_FD: start the WebUI in a process group of its own, and write its pid.
start_webui() {
  local log_fd="$2" variable
  local -a flags environment=()
  mapfile -d '' -t flags < <(webui_flags "$1")
  [[ ${#flags[@]} != 0 ]] || give_up "the folders of WEBUI_MODELS_DIR or WEBUI_DATA_DIR cannot be made"
  set_default_checkpoint || log WARNING "config.json of the WebUI cannot be written"
  while read -r variable; do environment+=("$variable=${!variable}"); done < <(webui_variables)
  [[ -z "$tcmalloc" ]] || environment+=("LD_PRELOAD=$tcmalloc")
  setsid env -i -C "$WEBUI_DIR" "${environment[@]}" PYTHONUNBUFFERED=1 HF_HOME="$WEBUI_HF_HOME" "${WEBUI_OFFLINE[@]}" \
    "$WEBUI_PYTHON" launch.py "${flags[@]}" >&"$log_fd" 2>&1 {log_fd}>&- </dev/null &
  webui=$!
  write_state "$webui"
  [[ -z "$ending" ]] || stop_webui
}

# Print the names of this process's variables that the WebUI may have.
webui_variables() {
  local name pattern
  while read -r name; do
    for pattern in "${WEBUI_ENVIRONMENT[@]}"; do
      # shellcheck disable=SC2053 # it is a pattern
      [[ "$name" != $pattern ]] || echo "$name"
    done
  done < <(compgen -e)
}

# webui_flags PORT: the WebUI's arguments, each ended by NUL; nothing if its folders cannot be made. If the checkpoint
# is on disk, the WebUI loads it at once. If not, it loads nothing: any other model would be loaded only to be thrown
# away.
webui_flags() {
  local checkpoint
  local -a more=()
  read -r -d '' -a more <<<"${WEBUI_ARGS:-}" || true
  mkdir -p "$WEBUI_MODELS_DIR"/{Stable-diffusion,Lora,VAE,embeddings,ESRGAN}
  make_data_dir
  link_upscalers
  if checkpoint="$(link_checkpoint)"; then
    more=(--ckpt "$checkpoint" "${more[@]}")
  else
    more=(--skip-load-model-at-start "${more[@]}")
  fi
  [[ "$WEBUI_DATA_DIR" == "$WEBUI_DIR" ]] || more=(--data-dir "$WEBUI_DATA_DIR" "${more[@]}")
  printf '%s\0' "${WEBUI_FLAGS[@]}" --port "$1" --ckpt-dir "$WEBUI_MODELS_DIR/Stable-diffusion" \
    --lora-dir "$WEBUI_MODELS_DIR/Lora" --vae-dir "$WEBUI_MODELS_DIR/VAE" \
    --embeddings-dir "$WEBUI_MODELS_DIR/embeddings" --esrgan-models-path "$WEBUI_MODELS_DIR/ESRGAN" "${gpu_flags[@]}"
  extension_flags
  printf '%s\0' "${more[@]}"
}

# Print the flags that only an extension knows, each ended by NUL. ControlNet looks for models in the worker's folder, and
# the worker looks for annotators in the folder that is named here. ADetailer would ask the Hugging Face hub at each start.
extension_flags() {
  local annotators="$WEBUI_DATA_DIR/models/ControlNetAnnotators"
  if [[ -d "$WEBUI_DIR/extensions/sd-webui-controlnet" ]]; then
    mkdir -p "$annotators" "$WEBUI_MODELS_DIR/ControlNet"
    printf '%s\0' --controlnet-dir "$WEBUI_MODELS_DIR/ControlNet" --controlnet-annotator-models-path "$annotators"
  fi
  [[ ! -d "$WEBUI_DIR/extensions/adetailer" ]] || printf '%s\0' --ad-no-huggingface
}

# Show the operator's own upscalers to the WebUI: A1111 lists them only when it starts.
link_upscalers() {
  local root file folder="$WEBUI_MODELS_DIR/ESRGAN"
  local -a roots
  for file in "$folder"/*; do
    [[ ! -L "$file" ]] || rm -f "$file" # of an earlier start
  done
  IFS=: read -r -a roots <<<"$MODELS_DIR:$MODEL_SOURCES"
  for root in "${roots[@]}"; do
    for file in "$root"/upscalers/*.pth; do
      [[ -n "$root" && -s "$file" && ! -e "$folder/${file##*/}" ]] || continue
      ln -sfn "$(realpath "$root")/upscalers/${file##*/}" "$folder/${file##*/}"
    done
  done
}

# Print the path of the checkpoint's link in the WebUI's folder. The worker keeps that link, but the WebUI may start
# first, and A1111 must know the file by one path from its first load on: so the link is made here if it is missing.
# Fails if there is no verified checkpoint on disk (a sidecar beside it shows that it was verified:
# docs/subsystems/resource-management.md).
link_checkpoint() {
  local link="$WEBUI_MODELS_DIR/Stable-diffusion/$CHECKPOINT_FILE" root folder
  local -a roots
  [[ ! -s "$link" ]] || {
    echo "$link"
    return 0
  }
  IFS=: read -r -a roots <<<"$MODELS_DIR:$MODEL_SOURCES"
  for root in "${roots[@]}"; do
    for folder in "$root"/{checkpoints,Stable-diffusion,.}; do
      [[ -n "$root" && -s "$folder/$CHECKPOINT_FILE" && -s "$folder/$CHECKPOINT_FILE.json" ]] || continue
      ln -sfn "$(realpath "$folder")/$CHECKPOINT_FILE" "$link"
      echo "$link"
      return 0
    done
  done
  return 1
}

# Make the folder that the WebUI writes. If it is not the WebUI's own folder, it gets links to what is there: models such
# as upscalers, extensions, settings. A1111 also wants its folder `config_states`, wherever its data is (1.10.1,
# modules/config_states.py); in the image it is a link into /tmp.
make_data_dir() {
  local name
  mkdir -p "$(realpath -m "$WEBUI_DIR/config_states")" "$WEBUI_DATA_DIR"
  [[ "$WEBUI_DATA_DIR" != "$WEBUI_DIR" ]] || return 0
  for name in models embeddings extensions styles.csv config.json; do
    [[ ! -e "$WEBUI_DIR/$name" ]] || cp -rsn "$(realpath "$WEBUI_DIR")/$name" "$WEBUI_DATA_DIR" || true
  done
}

# Write the checkpoint's file name into the WebUI's settings: it is what A1111 loads first, before the worker has asked for
# anything. The bare name is found always; a title with a hash only if A1111's cache knows that hash. All other settings
# stay. A file that is not a JSON object is left as it is.
set_default_checkpoint() {
  "$WORKER_PYTHON" -IS - "$WEBUI_DATA_DIR/config.json" "$CHECKPOINT_FILE" <<'END'
import json, os, sys

path, checkpoint = sys.argv[1:]
try:
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
except FileNotFoundError:
    settings = {}
except (OSError, ValueError):
    settings = None
if not isinstance(settings, dict):
    sys.exit(1)
settings["sd_model_checkpoint"] = checkpoint
try:
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=4, ensure_ascii=False)
    os.replace(path + ".new", path)
except OSError:
    sys.exit(1)
END
}

# Print the path of tcmalloc's library, if there is one that can be preloaded. After six model loads, 3.7 GB are
# resident with it, and 5.6 GB with glibc's allocator.
find_tcmalloc() {
  local library
  while read -r library; do
    [[ -z "$(LD_PRELOAD="$library" /bin/true 2>&1)" ]] && echo "$library" && return 0
  done < <(ldconfig -p | sed -nE 's/^\s*libtcmalloc(_minimal)?\.so\.4 .*=> //p')
}

# write_state PID|failed: replace the file that the worker reads, so that it never reads half of it.
write_state() {
  echo "$1" >"$WEBUI_STATE_FILE.new"
  mv -f "$WEBUI_STATE_FILE.new" "$WEBUI_STATE_FILE"
}

# Stop the WebUI that runs now, if there is one.
stop_webui() {
  [[ -z "$webui" ]] || stop_process "$webui" "$WEBUI_GRACE"
}

# Stop the supervisor, and with it the WebUI.
stop_supervisor() {
  [[ -n "$supervisor" ]] || return 0
  kill -TERM "$supervisor" 2>/dev/null || true
  wait_at_most 2 "$supervisor" || kill -KILL "$supervisor" 2>/dev/null || true
  kill_group "$(<"$WEBUI_STATE_FILE")" # if the supervisor had no time for it
  wait_at_most 1 "$webui_logger" || true
}

# --- the worker -----------------------------------------------------------------------------------------------------

# start_worker [ARGUMENTS]: start handler.py in a process group of its own; off RunPod, without arguments, behind a queue
# of its own.
start_worker() {
  local log_fd
  local -a command=("$WORKER_PYTHON" handler.py "$@")
  if [[ $# == 0 ]] && ! is_on_runpod; then
    command=("$WORKER_PYTHON" -m local_queue --host "$LOCAL_API_HOST" --port 8000 -- "${command[@]}")
  fi
  exec {log_fd}> >(relay_lines worker)
  worker_logger=$!
  setsid env -C "$WORKER_DIR" "${command[@]}" >&"$log_fd" 2>&1 {log_fd}>&- </dev/null &
  worker=$!
  exec {log_fd}>&-
  [[ -z "$ending" ]] || stop_worker
}

# TERM for the worker, KILL after the grace. The TERM goes to the worker's main process alone: with a TERM of its own,
# the SDK's ping process would stop reporting the job that still runs.
stop_worker() {
  [[ -z "$worker" ]] || stop_process "$worker" "$SHUTDOWN_GRACE"
}

# Wait until the worker has ended and all its log lines are written. Returns its status.
wait_for_worker() {
  local status=0
  wait_for_exit "$worker" || status=$?
  kill_group "$worker" # else the SDK's ping process would live on, and report a healthy worker for ever
  wait_at_most 1 "$worker_logger" || true
  return "$status"
}

# --- processes and time ---------------------------------------------------------------------------------------------

# handle_signal STATUS: what TERM and INT do. The worker is stopped here, inside the trap, so that no signal is missed.
handle_signal() {
  ending="$1"
  stop_worker
}

# stop_process PID GRACE: TERM, then KILL for its whole group if it has not ended after GRACE seconds.
stop_process() {
  kill -TERM "$1" 2>/dev/null || return 0
  wait_at_most "$2" "$1" || kill_group "$1"
}

# kill_group PID: KILL for whatever is left of its process group.
kill_group() {
  kill -KILL -- "-$1" 2>/dev/null || true
}

# wait_for_exit PID: return its exit status, however many signals arrive meanwhile. bash's own message about a killed
# process is not shown. If a child ends in the moment of a signal, `wait` of bash 5 never returns: so it waits again
# only if the child is still there.
wait_for_exit() {
  local status
  while :; do
    status=0
    wait "$1" 2>/dev/null || status=$?
    is_alive "$1" || return "$status"
  done
}

# wait_at_most SECONDS PID: return as soon as the process has ended. Fails if the time is up first. The worker ignores
# blanks around SHUTDOWN_GRACE, so this does too.
wait_at_most() {
  local -i until
  printf -v until '%.0f' "${1//[[:space:]]/}e2"
  until+="$(now)"
  while is_alive "$2"; do
    (($(now) < until)) || return 1
    sleep 0.02
  done
}

# pause SECONDS: like sleep, but it ends as soon as a signal has said that the container ends. It looks again and again:
# a `wait` would miss a signal that arrived just before it.
pause() {
  local -i until
  printf -v until '%.0f' "${1}e2"
  until+="$(now)"
  while [[ -z "$ending" ]] && (($(now) < until)); do
    sleep 0.05
  done
}

# is_alive PID: whether the process is there.
is_alive() { kill -0 "$1" 2>/dev/null; }

# Hundredths of a second since boot. Unlike the clock they never jump.
now() {
  local uptime
  read -r uptime _ </proc/uptime
  echo "${uptime/./}"
}

# relay_lines SOURCE: write the lines of the WebUI or the worker to the log, in the form that LOG_FORMAT asks for. No
# signal ends this process. It ends when its writers have ended, so that their last lines are not lost.
relay_lines() {
  trap '' TERM INT
  exec "$WORKER_PYTHON" -IS "$RELAY_PY" "$1" "${LOG_FORMAT:-text}"
}

# log LEVEL MESSAGE: a log line of start.sh itself.
log() {
  local message="$2"
  if [[ "${LOG_FORMAT:-}" != [Jj][Ss][Oo][Nn] ]]; then
    echo "start | $message" >&2
    return
  fi
  message="${message//\\/\\\\}"
  message="${message//\"/\\\"}"
  TZ=UTC0 printf '{"time": "%(%Y-%m-%dT%H:%M:%SZ)T", "level": "%s", "source": "start", "message": "%s"}\n' \
    -1 "$1" "${message//[[:cntrl:]]/ }" >&2
}

# --- the order of events --------------------------------------------------------------------------------------------

main() {
  local port status=0
  trap 'handle_signal 143' TERM
  trap 'handle_signal 130' INT
  set_defaults
  rm -f "$WEBUI_STATE_FILE" "${WORKER_STATE_FILE:-}" # left by an earlier start of this container
  if ! port="$(local_webui_port)"; then
    log INFO "WEBUI_URL is $WEBUI_URL: somebody else runs that WebUI, none is started here"
    unset WEBUI_STATE_FILE
  elif choose_gpu_flags; then
    tcmalloc="$(find_tcmalloc)" || tcmalloc=''
    [[ -z "$ending" ]] || exit "$ending"
    start_supervisor "$port"
  elif is_on_runpod; then
    set_failed "$gpu_problem" # the worker answers the jobs that wait with this reason
  else
    log ERROR "$gpu_problem"
    exit 1
  fi
  start_worker "$@"
  wait_for_worker || status=$?
  stop_supervisor
  exit "${ending:-$status}"
}

[[ "${BASH_SOURCE[0]}" != "$0" ]] || main "$@"
