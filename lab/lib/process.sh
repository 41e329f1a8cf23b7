# Processes: start one in the background, know whether it lives, end it. Nothing here knows what the services are.
# shellcheck shell=bash

# launch NAME COMMAND…: runs COMMAND in a session of its own; its pid goes to run/NAME.pid, its output to log/NAME.out.
# COMMAND must stay in the foreground. Descriptor 9 is the lock of lab/up, which no service may inherit.
launch() {
  local name=$1 pid
  shift
  (
    cd "$DIR" || exit 1
    exec setsid "$@" >>"$DIR/log/$name.out" 2>&1 </dev/null 9>&-
  ) &
  pid=$!
  echo "$pid" >"$DIR/run/$name.pid"
  start_time "$pid" >"$DIR/run/$name.start-time" || true
}

# start_time PID: when the process started, in ticks since boot; fails when there is none or it is a zombie.
start_time() {
  local stat fields
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  read -ra fields <<<"${stat##*) }" # what follows "pid (name) "; a name may hold blanks
  [ "${fields[0]}" != Z ] || return 1
  echo "${fields[19]}"
}

pid_of() { cat "$DIR/run/$1.pid" 2>/dev/null; }

# A pid alone is not enough: after a reboot it may be another process's.
alive() {
  local pid
  pid=$(pid_of "$1") && [ -n "$pid" ] && [ "$(start_time "$pid")" = "$(cat "$DIR/run/$1.start-time" 2>/dev/null)" ] && start_time "$pid" >/dev/null
}

# end NAME [KILL]: asks the process to stop (20 s), then kills it and what it left behind in its process group.
end() {
  local name=$1 signal=${2:-TERM} pid
  if alive "$name"; then
    pid=$(pid_of "$name")
    if [ "$signal" != KILL ]; then
      kill -"$signal" "$pid" 2>/dev/null || true
      retry_for 20 gone "$name" || say "$name does not stop within 20 s: killed"
    fi
    kill -KILL -- "-$pid" 2>/dev/null || true
    retry_for 10 gone "$name" || say "$name (pid $pid) cannot be killed"
    rm -f "$DIR"/run/*".$pid.asok"
  fi
  rm -f "$DIR/run/$name.pid" "$DIR/run/$name.start-time"
}

gone() { ! alive "$1"; }

# retry_for SECONDS COMMAND…: repeats COMMAND until it succeeds; fails when the time is over.
retry_for() {
  local until=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$until" ] || return 1
    sleep 0.2
  done
}

listening() { [ -n "$(ss -ltnH "sport = :$1")" ]; }
not_listening() { ! listening "$1"; }

# answers URL: an HTTP server is there and its application works (a gunicorn whose workers crash accepts, but never answers).
answers() {
  local code
  code=$(curl -s -o /dev/null -w '%{http_code}' --noproxy '*' --max-time 5 "$1") || return 1
  [[ $code == [23]* ]]
}

# step NAME SECONDS COMMAND…: one command of the set-up, with a limit, its output in log/NAME.log, shown when it fails.
step() {
  local name=$1 limit=$2 status=0
  shift 2
  timeout -k 5 "$limit" "$@" >>"$DIR/log/$name.log" 2>&1 </dev/null 9>&- || status=$?
  [ $status = 0 ] && return
  [ $status != 124 ] || say "$name: not done after $limit s"
  fail_with_log "$name failed, with exit status $status" "$DIR/log/$name.log"
}

# fail_with_log MESSAGE FILE…: MESSAGE and the end of the logs, then out. The first file gets more lines: a service that
# dies ends it with a traceback, and its reason stands above that.
fail_with_log() {
  local message=$1 file lines=40
  shift
  say "$message"
  for file in "$@"; do
    [ -s "$file" ] || continue
    echo "---- the end of $file" >&2
    tail -n $lines "$file" >&2
    lines=20
  done
  exit 1
}
