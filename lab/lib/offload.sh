# The daemon beside a lab, for scripts that use one: its configuration and its process. It is no service of the lab.
# shellcheck shell=bash

offload_metrics() { echo "127.0.0.1:$((BASE + 50))"; }

# What it needs to reach the lab, for standard output; sections that a script adds may follow. `lab/env` must be known.
offload_configuration() {
  cat <<CONF
[messaging]
transport_url = $RBDLAB_OFFLOAD_AMQP

[keystone]
auth_url = $RBDLAB_KEYSTONE
username = offload
password = $RBDLAB_OFFLOAD_PASSWORD
project_name = service

[ceph]
conf = $CEPH_CONF

[backend:ceph]
pool = volumes

[backend:ceph2]
pool = volumes2

[backend:ceph-offload]
pool = volumes

[metrics]
listen = $(offload_metrics)
CONF
}

# start_offload PROGRAM CONFIGURATION: returns when the daemon is ready.
start_offload() {
  launch rbd-offload "$1" --config "$2" run
  retry_for 120 offload_is_well || offload_failed "the daemon is not ready after 120 s"
}

offload_is_well() {
  alive rbd-offload || offload_failed "the daemon ended"
  curl -sf -o /dev/null --noproxy '*' --max-time 5 "http://$(offload_metrics)/healthz"
}

offload_failed() { fail_with_log "$1" "$DIR/log/rbd-offload.out"; }

# stop_offload: by the script that started it. The daemon must have run until now, without a panic, and must end well.
stop_offload() {
  local pid status=0
  alive rbd-offload || offload_failed "the daemon ended"
  pid=$(pid_of rbd-offload)
  kill "$pid"
  wait "$pid" || status=$?
  end rbd-offload
  [ $status = 0 ] || offload_failed "the daemon ended with status $status"
  ! grep -q panicked "$DIR/log/rbd-offload.out" || offload_failed "the daemon panicked"
}
