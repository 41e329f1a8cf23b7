# Where a lab lives, its ports and its passwords.
# shellcheck shell=bash
# shellcheck disable=SC2034  # most of these names are read by other files and by the templates

say() { echo "[lab $(date +%T)] $*" >&2; }
die() { say "$*"; exit 1; }

# use_lab [DIR]: sets every setting of the lab in DIR (default: $RBDLAB_DIR, else ${TMPDIR:-/tmp}/rbdlab).
use_lab() {
  DIR=$(realpath -m -- "${1:-${RBDLAB_DIR:-${TMPDIR:-/tmp}/rbdlab}}")
  # The path goes into configuration files, and sockets below it have names of at most 107 bytes.
  [[ $DIR =~ ^/[A-Za-z0-9._/-]+$ ]] || die "$DIR: a lab's path may hold letters, digits and ._/- only"
  [ ${#DIR} -le 60 ] || die "$DIR: a lab's path may be 60 characters long at most (Unix sockets live in it)"

  # What a lab was made with stays: the environment only chooses for a new one.
  BASE=$(remembered base "${RBDLAB_BASE:-21000}")
  OSDS=$(remembered osds "${RBDLAB_OSDS:-3}")
  OSD_BYTES=$((${RBDLAB_OSD_GIB:-20} << 30))

  use_ports
  use_secrets

  VENV=$DIR/venv
  NOVA_VENV=$DIR/nova-venv
  SERVICE_HOME=$DIR/run/home
  CEPH_CONF=$DIR/ceph/ceph.conf
  export CEPH_CONF
  # names of keys: those of client.nova and of client.cinder
  LIBVIRT_SECRET=5d0b3a52-0c1a-4b5e-9b1e-6f1b7d8b1c11
  LIBVIRT_SECRET_CINDER=5d0b3a52-0c1a-4b5e-9b1e-6f1b7d8b1c12
  LIBVIRT_URI="qemu+unix:///system?socket=$DIR/nova/libvirt/run/libvirt-sock"

  # What the caller's shell has set must not reach the services.
  unset CEPH_ARGS PYTHONPATH PYTHONHOME CDPATH
  export PYTHONWARNINGS=ignore
  export no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}"
}

remembered() { # NAME DEFAULT
  if [ -s "$DIR/$1" ]; then cat "$DIR/$1"; else echo "$2"; fi
}

lab_exists() { [ -s "$DIR/base" ]; }
need_lab() { lab_exists || die "there is no lab in $DIR (lab/up makes one)"; }

# Every port is BASE + a small number, so that two labs with two bases never meet.
use_ports() {
  [[ $BASE =~ ^[0-9]{4,5}$ && $BASE -ge 1024 && $BASE -le 65000 ]] || die "RBDLAB_BASE=$BASE: not a port between 1024 and 65000"
  PORT_MON_V2=$((BASE + 1))
  PORT_MON_V1=$((BASE + 2))
  PORT_RABBIT=$((BASE + 10))
  PORT_RABBIT_DIST=$((BASE + 11))
  PORT_EPMD=$((BASE + 12))
  PORT_KEYSTONE=$((BASE + 20))
  PORT_GLANCE=$((BASE + 21))
  PORT_CINDER=$((BASE + 22))
  PORT_NOVA=$((BASE + 30))
  PORT_PLACEMENT=$((BASE + 31))
  PORT_NEUTRON=$((BASE + 32))
  PORT_GLANCE_DIRECT=$((BASE + 33))
  PORT_MARIADB=$((BASE + 35))
  PORT_CEPH_MIN=$((BASE + 100))
  PORT_CEPH_MAX=$((BASE + 299))
}

# The kernel gives ports of this range to connections, so a service may find its own port taken.
warn_of_taken_ports() {
  local first last
  read -r first last </proc/sys/net/ipv4/ip_local_port_range
  [ "$PORT_CEPH_MAX" -lt "$first" ] || [ "$BASE" -gt "$last" ] ||
    say "RBDLAB_BASE=$BASE: connections take ports from $first to $last; where a service does not start, take a lower base"
}

# All of it listens on loopback only. The daemon's own passwords are unusual on purpose: a log can be searched for them,
# and the broker's does not survive a URL unless it is percent-encoded.
use_secrets() {
  AMQP_URL="rabbit://openstack:secret@127.0.0.1:$PORT_RABBIT/"
  OFFLOAD_AMQP_PASSWORD='Rabb1t:p@ss/w0rd'
  OFFLOAD_AMQP_URL="rabbit://offload:Rabb1t%3Ap%40ss%2Fw0rd@127.0.0.1:$PORT_RABBIT/"
  OFFLOAD_PASSWORD='K3ystone-0ffl0ad-pw'
}

# as_root COMMAND…: only apt-get and the one file in /etc/ceph need it.
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}
