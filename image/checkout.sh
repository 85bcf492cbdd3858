# Sourced by the Dockerfile.

export GIT_TERMINAL_PROMPT=0 # otherwise git waits for a password for ever if a repository is gone

# checkout FOLDER REPOSITORY COMMIT: the files of one commit, without its history.
checkout() {
  git init -q "$1"
  git -C "$1" fetch -q --depth 1 "$2" "$3" || {
    echo "cannot fetch $3 of $2" >&2
    exit 1
  }
  git -C "$1" -c advice.detachedHead=false checkout -q FETCH_HEAD
  rm -rf "$1/.git"
}
