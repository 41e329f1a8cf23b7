# The services by name: start, stop, status, log. What is particular to one stands in its own file as
#   launch_NAME   starts its process (with `launch`)
#   ready_NAME    succeeds when it does its work
#   logs_NAME     the files it writes, the most telling first
# with `-` as `_`, and `osd N` for osd.N. To add a service: add its name here and those three functions.
# shellcheck shell=bash

osd_names() { seq -f 'osd.%g' 0 $((OSDS - 1)); }
openstack_services() { printf '%s\n' keystone glance cinder-api cinder-scheduler cinder-volume; }
all_services() {
  printf '%s\n' mon mgr
  osd_names
  printf '%s\n' mariadb rabbit
  openstack_services
  nova_services
}

is_service() { [[ $'\n'$(all_services)$'\n' == *$'\n'"$1"$'\n'* ]]; }
need_service() { is_service "$1" || die "no such service: $1 (there are: $(all_services | xargs))"; }

# call ACTION NAME: launch_keystone, ready_cinder_volume, logs_osd 2, …
call() {
  case $2 in
    osd.*) "$1_osd" "${2#osd.}" ;;
    *) "$1_${2//-/_}" ;;
  esac
}

port_of() {
  case $1 in
    mon) echo "$PORT_MON_V2" ;;
    mariadb) echo "$PORT_MARIADB" ;;
    rabbit) echo "$PORT_RABBIT" ;;
    keystone) echo "$PORT_KEYSTONE" ;;
    glance) echo "$PORT_GLANCE" ;;
    cinder-api) echo "$PORT_CINDER" ;;
    glance-direct) echo "$PORT_GLANCE_DIRECT" ;;
    fake-neutron) echo "$PORT_NEUTRON" ;;
    placement) echo "$PORT_PLACEMENT" ;;
    nova-api) echo "$PORT_NOVA" ;;
  esac
}

# How long a service may take to become ready, in seconds. Ten times what it takes on a quiet machine.
SERVICE_LIMIT=${RBDLAB_SERVICE_LIMIT:-120}

service_start() {
  service_launch "$1"
  service_await "$1"
}

service_launch() {
  local name=$1 port
  alive "$name" && return
  port=$(port_of "$name")
  if [ -n "$port" ] && ! retry_for 5 not_listening "$port"; then
    die "$name cannot start: port $port is taken by another program (RBDLAB_BASE chooses other ports for a new lab)"
  fi
  end "$name"
  call launch "$name"
}

service_await() {
  local name=$1 until=$((SECONDS + SERVICE_LIMIT))
  until call ready "$name" 2>/dev/null; do
    alive "$name" || service_failed "$name" "$name died while it started"
    [ "$SECONDS" -lt "$until" ] || service_failed "$name" "$name is not ready after $SERVICE_LIMIT s"
    sleep 0.2
  done
}

service_failed() { # NAME MESSAGE
  local file files=()
  # What was not written since the start would only mislead.
  while read -r file; do
    [ "$file" -ot "$DIR/run/$1.pid" ] || files+=("$file")
  done < <(service_logs "$1")
  fail_with_log "$2" "${files[@]}"
}

service_logs() { call logs "$1"; }
service_stop() { end "$1" "${2:-TERM}"; }
