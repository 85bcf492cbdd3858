#!/usr/bin/env bash
# Resolves what is installed, and writes it with versions and hashes: `make lock`.
#
#   locks/lock.sh pypi         everything, from PyPI, at the newest versions that are allowed
#   locks/lock.sh extensions   only what the extensions need
#   locks/lock.sh cu128 DIR    the WebUI's packages for PyTorch's cu128 index, into DIR; versions that are in use stay.
#                              TORCH_INDEX_URL in the environment is that index
#
#   uv.txt                  uv itself
#   worker.txt              requirements.txt; one list for all supported versions of Python
#   client.txt              the dependencies of pyproject.toml, likewise
#   dev.txt                 requirements-dev.txt and both of these, likewise
#   webui-*.txt             the WebUI's packages, without torch, torchvision and xformers; always from PyPI
#   torch-*.txt             these three: from PyPI (CUDA 12.6), or from PyTorch's index (cu128)
#   controlnet.txt, adetailer.txt   what these extensions need besides the WebUI's packages, or in another version
#
# A few packages are left out. triton (544 MB) only compiles kernels that A1111 does not use. opencv-python and
# opencv-contrib-python are there as opencv-python-headless. So these lists are installed with --no-deps.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly UV="${UV:-uv}"
readonly LEFT_OUT=(--no-emit-package triton --no-emit-package opencv-python --no-emit-package opencv-contrib-python)
readonly TORCH=(torch torchvision xformers)
readonly IMAGE=(--python-version 3.10 --python-platform x86_64-manylinux_2_28)

# compile OUTPUT ARGUMENTS…: resolve, and write the lock. No address of an index is in it.
compile() {
  "$UV" pip compile --quiet --no-header --no-annotate --no-emit-index-url "${@:2}" --output-file "$1" >/dev/null
}

# Everything that PyPI has.
lock_pypi() {
  compile locks/uv.txt --universal --generate-hashes --upgrade - <<<'uv'
  compile locks/dev.txt --universal --python-version 3.10 --generate-hashes --upgrade \
    requirements-dev.txt pyproject.toml
  compile locks/worker.txt --universal --python-version 3.10 --generate-hashes --upgrade \
    --constraint locks/dev.txt requirements.txt
  compile locks/client.txt --universal --python-version 3.10 --generate-hashes --upgrade \
    --constraint locks/dev.txt pyproject.toml
  compile locks/webui-pypi.txt "${IMAGE[@]}" --generate-hashes --upgrade \
    "${LEFT_OUT[@]}" "${TORCH[@]/#/--no-emit-package=}" requirements-webui.txt
  grep -E '^(torch|torchvision|xformers)==' requirements-webui.txt |
    compile locks/torch-pypi.txt "${IMAGE[@]}" --generate-hashes --upgrade --no-deps -
}

# What the extensions need, for any list of the WebUI's packages: only NVIDIA's libraries differ between those. mediapipe
# wants a newer protobuf than open-clip allows (A1111 1.10.1 with both extensions works with it), ControlNet an older timm.
lock_extensions() {
  local folder extension name
  local -a there=()
  folder="$(mktemp -d)"
  cat locks/webui-pypi.txt locks/torch-pypi.txt | grep -oE '^[a-z0-9._-]+==[^ ]+' >"$folder/webui.txt"
  grep -vE '^(protobuf|timm)==' "$folder/webui.txt" >"$folder/fixed.txt"
  echo 'protobuf>=4.25.3,<5' >"$folder/override.txt"
  compile "$folder/resolved.txt" "${IMAGE[@]}" --upgrade --constraint "$folder/fixed.txt" --override "$folder/override.txt" \
    requirements-controlnet.txt requirements-adetailer.txt
  while read -r name; do there+=(--no-emit-package "$name"); done < <(
    grep -xFf "$folder/webui.txt" "$folder/resolved.txt" | sed 's/==.*//'
  )
  for extension in controlnet adetailer; do
    compile "locks/$extension.txt" "${IMAGE[@]}" --generate-hashes --upgrade "${LEFT_OUT[@]}" "${there[@]}" \
      --constraint "$folder/resolved.txt" --override "$folder/override.txt" "requirements-$extension.txt"
  done
  rm -r "$folder"
}

# lock_cu128 DIR: resolve with PyTorch's builds. Their index has copies of some packages of PyPI, which are not used: so
# the versions are resolved first, and then their hashes are taken from the index that the image installs them from.
lock_cu128() {
  local list
  list="$(sed -E 's/^(torch|torchvision)==.*/&+cu128/' requirements-webui.txt)"
  mkdir -p "$1"
  cat locks/webui-cu128.txt locks/torch-cu128.txt >"$1/resolved.txt"
  compile "$1/resolved.txt" "${IMAGE[@]}" --index "$TORCH_INDEX_URL" --index-strategy unsafe-best-match \
    "${LEFT_OUT[@]}" - <<<"$list"
  grep -vE '^(torch|torchvision|xformers)==' "$1/resolved.txt" |
    compile "$1/webui-cu128.txt" "${IMAGE[@]}" --generate-hashes --no-deps -
  grep -E '^(torch|torchvision|xformers)==' "$1/resolved.txt" |
    compile "$1/torch-cu128.txt" "${IMAGE[@]}" --generate-hashes --no-deps --default-index "$TORCH_INDEX_URL" -
  rm "$1/resolved.txt"
}

case "${1:-}" in
  pypi) lock_pypi && lock_extensions ;;
  extensions) lock_extensions ;;
  cu128) lock_cu128 "${2:?a folder}" ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 2 ;;
esac
