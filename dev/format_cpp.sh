#!/usr/bin/env bash
# format_cpp.sh [OPTIONS of git-clang-format] — clang-format on the lines of csrc/ that differ from the
# last commit. `--force` also where they are not staged; `--staged --diff` shows what it would change
# in the index, and fails if there is something.
#
# Changed lines only: a run over the whole tree would rewrite code that was never touched, and hide
# who wrote a line and why.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
exec "$bin/python" "$bin/git-clang-format" --binary "$bin/clang-format" \
  --extensions h,cpp,inl,cu,cuh "$@" HEAD -- csrc
