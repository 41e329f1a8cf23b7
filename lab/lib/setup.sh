# What `up` and `nova-up` are made of: parts that are done once, services that start together, work in the background.
# shellcheck shell=bash

# once STEP FUNCTION: a part of the set-up that is done one time for each lab.
once() {
  [ -e "$DIR/state/$1" ] && return
  "$2"
  touch "$DIR/state/$1"
}

# start NAME…: all at once, then wait for each.
start() {
  local name
  for name in "$@"; do service_launch "$name"; done
  for name in "$@"; do service_await "$name"; done
}

# in_background FUNCTION, then join: what runs meanwhile. A failure has been told by its `step` when join sees it.
background=()
in_background() {
  "$@" &
  background+=($!)
}
join() {
  local pid
  for pid in "${background[@]}"; do wait "$pid" || exit 1; done
  background=()
}
# Leaving early must not leave the background work behind: for `trap stop_background EXIT`.
stop_background() {
  local pid
  for pid in "${background[@]}"; do
    # shellcheck disable=SC2046  # one pid a line
    kill "$pid" $(pgrep -P "$pid") 2>/dev/null || true
  done
}
