#!/usr/bin/env bash
# The container's first process: it starts the WebUI and keeps it alive, starts the worker and ends with it.
#
#   start.sh [ARGUMENTS OF handler.py]
#
# Begin with `main` at the bottom. Sourcing this file defines its functions and runs nothing.
set -euo pipefail

readonly WEBUI_FLAGS=(
  --api --nowebui --server-name 127.0.0.1 # without a name --nowebui listens on every address
  --skip-prepare-environment --skip-install --skip-python-version-check --skip-version-check --skip-torch-cuda-test
  --no-download-sd-model --no-half-vae --disable-console-progressbars
)
readonly CPU_FLAGS=(--use-cpu all --no-half)
readonly SECRETS=(CIVITAI_API_KEY RUNPOD_AI_API_KEY BUCKET_ACCESS_KEY_ID BUCKET_SECRET_ACCESS_KEY) # not the WebUI's business
# Seconds between TERM and KILL for the WebUI, when the worker has ended: nothing is left in it that anyone waits for, and
# unloading torch alone takes it longer.
readonly WEBUI_GRACE=0.3

ending=''     # the exit status that a signal asked for
worker=''     # handler.py's pid, its process group too
webui=''      # the WebUI's, known to its supervisor alone
supervisor='' # the process that starts it again

# --- settings -------------------------------------------------------------------------------------------------------

# Give every setting that is not set its default. Those that the worker reads too have its defaults.
settle() {
  WEBUI_DIR="${WEBUI_DIR:-/opt/webui/app}"
  WEBUI_PYTHON="${WEBUI_PYTHON:-/opt/webui/bin/python}"
  WORKER_DIR="${WORKER_DIR:-/opt/worker/app}"
  WORKER_PYTHON="${WORKER_PYTHON:-/opt/worker/bin/python}"
  WEBUI_URL="${WEBUI_URL:-http://127.0.0.1:3000}"
  WEBUI_MODELS_DIR="${WEBUI_MODELS_DIR:-/tmp/webui-models}"
  MODELS_DIR="${MODELS_DIR:-$(default_models_dir)}"
  MODEL_SOURCES="${MODEL_SOURCES-/models}"
  CHECKPOINT_FILE="${CHECKPOINT_FILE:-jib_mix_illustrious_realistic_v2.safetensors}"
  SHUTDOWN_GRACE="${SHUTDOWN_GRACE:-8}"
  WEBUI_RESTARTS="${WEBUI_RESTARTS:-3}"               # so often
  WEBUI_RESTART_WINDOW="${WEBUI_RESTART_WINDOW:-600}" # in so many seconds,
  WEBUI_RESTART_BACKOFF="${WEBUI_RESTART_BACKOFF:-1}" # the first time after so many, then after twice as many each time
  export WEBUI_STATE_FILE="${WEBUI_STATE_FILE:-/tmp/webui.state}"
  export PYTHONUNBUFFERED=1
}

# The folder of the cache where MODELS_DIR is not set, as a1111_worker/config.py chooses it.
default_models_dir() {
  if [[ -d /runpod-volume ]]; then
    echo /runpod-volume/models
  elif [[ -w /models || (! -e /models && -w /) ]]; then
    echo /models
  else
    echo "$WORKER_DIR/models"
  fi
}

# The port of a WebUI that start.sh is to run; fails where WEBUI_URL names somebody else's.
own_webui_port() {
  [[ "$WEBUI_URL" =~ ^http://(127\.0\.0\.1|localhost)(:([0-9]+))?/?$ ]] && echo "${BASH_REMATCH[3]:-80}"
}

# --- the GPU --------------------------------------------------------------------------------------------------------

# Set `gpu_flags` to what the WebUI needs on this GPU, or on none where ALLOW_CPU=1; fails without a GPU otherwise.
look_at_gpu() {
  local capability
  if capability="$(compute_capability)"; then
    gpu_flags=("$(attention_flag "$capability" "$(has_xformers && echo yes)")")
    say "a GPU of compute capability $capability: ${gpu_flags[*]}"
  elif [[ "${ALLOW_CPU:-0}" == 1 ]]; then
    gpu_flags=("${CPU_FLAGS[@]}")
    say "no GPU, and ALLOW_CPU=1: ${gpu_flags[*]}"
  else
    say 'no GPU found: run the container with --gpus all, or with ALLOW_CPU=1 to draw (very slowly) without one'
    return 1
  fi
}

# The first GPU's, such as 8.9: from nvidia-smi, or from torch where nvidia-smi is too old to know.
compute_capability() {
  local found=''
  command -v nvidia-smi >/dev/null || [[ -e /dev/nvidiactl || -e /dev/dxg ]] || return 1
  read -r found < <(timeout 10 nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || true
  [[ "$found" =~ ^[0-9]+\.[0-9]+$ ]] ||
    found="$("$WEBUI_PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null)" ||
    return 1
  [[ "$found" =~ ^[0-9]+\.[0-9]+$ ]] && echo "$found"
}

# attention_flag CAPABILITY XFORMERS: A1111 1.10.1 ignores --xformers without a word outside of 6.0 to 9.0.
attention_flag() {
  local number="${1/./}"
  if [[ "$2" == yes ]] && ((number >= 60 && number <= 90)); then
    echo --xformers
  else
    echo --opt-sdp-attention
  fi
}

# Whether the WebUI's environment has xformers; looked for, not imported, which would take seconds.
has_xformers() {
  "$WEBUI_PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("xformers") is None)' 2>/dev/null
}

# --- the WebUI ------------------------------------------------------------------------------------------------------

# start_supervisor PORT: start it, and wait until it has written the WebUI's pid, which the worker reads.
start_supervisor() {
  local log
  exec {log}> >(prefix 'webui | ')
  webui_lines=$!
  supervise_webui "$1" "$log" &
  supervisor=$!
  exec {log}>&-
  until [[ -s "$WEBUI_STATE_FILE" ]] || ! alive "$supervisor"; do sleep 0.01; done
}

# supervise_webui PORT LOG: run the WebUI, again whenever it ends, until told to stop or it has ended too often.
supervise_webui() {
  local -a restarts=()
  local delay status
  trap '' INT # a terminal's; what is to be done about it comes as TERM
  trap 'ending=yes && stop_webui' TERM
  while :; do
    start_webui "$1" "$2"
    status=0
    await "$webui" || status=$?
    end_group "$webui"
    [[ -z "$ending" ]] || return 0
    say "the WebUI (pid $webui) ended with status $status"
    delay="$(restart_delay "$(now)" "${restarts[@]}")" ||
      give_up "it was restarted $WEBUI_RESTARTS times in $WEBUI_RESTART_WINDOW s"
    restarts+=("$(now)")
    say "the WebUI is started again in $delay s"
    pause "$delay"
    [[ -z "$ending" ]] || return 0
  done
}

# give_up WHY: end the supervisor, and let the worker know, which answers the jobs that wait.
give_up() {
  publish failed
  say "given up on the WebUI: $1"
  exit 0
}

# restart_delay NOW RESTARTS…: the seconds to wait before one more; fails where the window has had enough of them.
restart_delay() {
  local now="$1" at recent=0
  shift
  for at in "$@"; do
    ((now - at >= WEBUI_RESTART_WINDOW * 100)) || recent=$((recent + 1))
  done
  ((recent < WEBUI_RESTARTS)) && awk -v first="$WEBUI_RESTART_BACKOFF" -v n="$recent" 'BEGIN { print first * 2 ^ n }'
}

# start_webui PORT LOG: start it in a process group of its own, and write its pid.
start_webui() {
  local log="$2" secret
  local -a flags changes=()
  mapfile -d '' -t flags < <(webui_flags "$1")
  [[ ${#flags[@]} != 0 ]] || give_up "WEBUI_MODELS_DIR=$WEBUI_MODELS_DIR cannot be made"
  for secret in "${SECRETS[@]}"; do changes+=(-u "$secret"); done
  [[ -z "$tcmalloc" ]] || changes+=("LD_PRELOAD=$tcmalloc")
  setsid env -C "$WEBUI_DIR" "${changes[@]}" "$WEBUI_PYTHON" launch.py "${flags[@]}" \
    >&"$log" 2>&1 {log}>&- </dev/null &
  webui=$!
  publish "$webui"
  [[ -z "$ending" ]] || stop_webui
}

# webui_flags PORT: its arguments, each ended by NUL; none where its folders cannot be made. The checkpoint is loaded at
# once where it is on disk already, else nothing is: any other model would only be loaded to be thrown away.
webui_flags() {
  local checkpoint
  local -a more=()
  read -r -d '' -a more <<<"${WEBUI_ARGS:-}" || true
  mkdir -p "$WEBUI_MODELS_DIR"/{Stable-diffusion,Lora,VAE}
  if checkpoint="$(linked_checkpoint)"; then
    more=(--ckpt "$checkpoint" "${more[@]}")
  else
    more=(--skip-load-model-at-start "${more[@]}")
  fi
  printf '%s\0' "${WEBUI_FLAGS[@]}" --port "$1" --ckpt-dir "$WEBUI_MODELS_DIR/Stable-diffusion" \
    --lora-dir "$WEBUI_MODELS_DIR/Lora" --vae-dir "$WEBUI_MODELS_DIR/VAE" "${gpu_flags[@]}" "${more[@]}"
}

# The checkpoint's link in the WebUI's folder, which the worker keeps. It is made here where the WebUI starts before the
# worker, because A1111 must know the file by one path from its first load on. Fails where there is no checkpoint on disk
# that was proven before (its sidecar lies beside it: docs/subsystems/resource-management.md).
linked_checkpoint() {
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

# The library of tcmalloc, if there is one that can be preloaded: with it six model loads left 3.7 GB resident, with
# glibc's allocator 5.6 GB.
find_tcmalloc() {
  local library
  while read -r library; do
    [[ -z "$(LD_PRELOAD="$library" /bin/true 2>&1)" ]] && echo "$library" && return 0
  done < <(ldconfig -p | sed -nE 's/^\s*libtcmalloc(_minimal)?\.so\.4 .*=> //p')
}

# publish PID|failed: what the worker reads, never half of it.
publish() {
  echo "$1" >"$WEBUI_STATE_FILE.new"
  mv -f "$WEBUI_STATE_FILE.new" "$WEBUI_STATE_FILE"
}

# End the WebUI that runs now, if there is one.
stop_webui() {
  [[ -z "$webui" ]] || end_process "$webui" "$WEBUI_GRACE"
}

# End the supervisor, and with it the WebUI.
stop_supervisor() {
  [[ -n "$supervisor" ]] || return 0
  kill -TERM "$supervisor" 2>/dev/null || true
  await_within 2 "$supervisor" || kill -KILL "$supervisor" 2>/dev/null || true
  end_group "$(<"$WEBUI_STATE_FILE")" # where the supervisor did not come to it
  await_within 1 "$webui_lines" || true
}

# --- the worker -----------------------------------------------------------------------------------------------------

# start_worker [ARGUMENTS]: start handler.py in a process group of its own.
start_worker() {
  local log
  if [[ $# == 0 && -z "${RUNPOD_WEBHOOK_GET_JOB:-}" ]]; then
    set -- --rp_serve_api --rp_api_host 127.0.0.1 # not on RunPod: its API, for this machine alone unless asked
  fi
  exec {log}> >(prefix 'worker | ')
  worker_lines=$!
  setsid env -C "$WORKER_DIR" "$WORKER_PYTHON" handler.py "$@" >&"$log" 2>&1 {log}>&- </dev/null &
  worker=$!
  exec {log}>&-
  [[ -z "$ending" ]] || stop_worker
}

# TERM for the worker, KILL after the grace. Its process group is spared the TERM: the SDK's ping process would stop
# reporting the job that is still running.
stop_worker() {
  [[ -z "$worker" ]] || end_process "$worker" "$SHUTDOWN_GRACE"
}

# Wait for the worker's end and return its status, once all that it wrote has been passed on.
follow_worker() {
  local status=0
  await "$worker" || status=$?
  end_group "$worker" # the SDK's ping process outlives its parent and would report a healthy worker for ever
  await_within 1 "$worker_lines" || true
  return "$status"
}

# --- processes and time ---------------------------------------------------------------------------------------------

# take_signal STATUS: what TERM and INT do. The worker is ended here, inside the trap: no signal can be missed.
take_signal() {
  ending="$1"
  stop_worker
}

# end_process PID GRACE: TERM, then KILL for its whole group when the grace is over.
end_process() {
  kill -TERM "$1" 2>/dev/null || return 0
  await_within "$2" "$1" || end_group "$1"
}

# end_group PID: nothing of its process group is left.
end_group() {
  kill -KILL -- "-$1" 2>/dev/null || true
}

# await PID: its exit status, however many signals arrive meanwhile. What bash itself says of a killed process is left
# out. bash 5 waits for ever for a child whose end it met in the moment of a signal, so nobody waits for one that is gone.
await() {
  local status
  while :; do
    status=0
    wait "$1" 2>/dev/null || status=$?
    alive "$1" || return "$status"
  done
}

# await_within SECONDS PID: return as soon as the process has ended; fails when the time is up first. A blank around the
# seconds is none to the worker either.
await_within() {
  local -i until
  printf -v until '%.0f' "${1//[[:space:]]/}e2"
  until+="$(now)"
  while alive "$2"; do
    (($(now) < until)) || return 1
    sleep 0.02
  done
}

# pause SECONDS: as sleep, but a signal ends it.
pause() {
  sleep "$1" &
  wait $! || true
  kill $! 2>/dev/null || true
}

# Whether the process is there.
alive() { kill -0 "$1" 2>/dev/null; }

# Hundredths of a second since boot: unlike the date they never jump.
now() {
  local uptime
  read -r uptime _ </proc/uptime
  echo "${uptime/./}"
}

# prefix TEXT: pass lines on, each behind TEXT; an object of JSON stays one, so that log readers know it. No signal ends
# it: it ends with its writers, and their last lines are not lost.
prefix() {
  trap '' TERM INT
  exec stdbuf -oL sed "/^{/!s/^/$1/"
}

# What start.sh itself has to say.
say() { echo "start | $*" >&2; }

# --- the order of events --------------------------------------------------------------------------------------------

main() {
  local port status=0
  trap 'take_signal 143' TERM
  trap 'take_signal 130' INT
  settle
  rm -f "$WEBUI_STATE_FILE" "${WORKER_STATE_FILE:-}" # a container that is started again still has them
  if port="$(own_webui_port)"; then
    look_at_gpu || exit 1
    tcmalloc="$(find_tcmalloc)" || tcmalloc=''
    [[ -z "$ending" ]] || exit "$ending"
    start_supervisor "$port"
  else
    say "WEBUI_URL is $WEBUI_URL: that one is somebody else's, none is started here"
    unset WEBUI_STATE_FILE
  fi
  start_worker "$@"
  follow_worker || status=$?
  stop_supervisor
  exit "${ending:-$status}"
}

[[ "${BASH_SOURCE[0]}" != "$0" ]] || main "$@"
