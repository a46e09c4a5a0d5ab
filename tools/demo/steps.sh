# What both demos begin with: bash, told step by step; $MOONRAIL_BIN is the moonrail command. Every figure shown is from
# the run itself. A demo ends with 0 only if every byte was right.
set -euo pipefail

step() { echo; echo "=== $*"; }
show() { sed 's/^/    /'; }
run() { echo "\$ $*" | sed "s|$MOONRAIL_BIN|moonrail|"; "$@" 2>&1 | show; }
give_up() { echo "demo: $*" >&2; exit 1; }

# until_true SECONDS WHAT COMMAND…
until_true() {
  local limit=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" 2> /dev/null; do
    ((SECONDS < limit)) || give_up "$what"
    sleep 0.2
  done
}

