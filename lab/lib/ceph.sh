# Ceph: one monitor, one manager, a few OSDs, each on a sparse file. Three OSDs by default: the EC pool wants three.
# shellcheck shell=bash

# ceph_ …: the ceph command with limits, since it waits for a monitor without end.
ceph_() { timeout 60 ceph --connect-timeout 20 "$@"; }

# --- the processes ---------------------------------------------------------------------------------------------------

# In /: Debian's Ceph 20 looks for the classes of its OSDs in a relative directory.
launch_mon() { launch mon env -C / ceph-mon -f -c "$CEPH_CONF" -i a; }
launch_mgr() { launch mgr env -C / ceph-mgr -f -c "$CEPH_CONF" -i x; }
launch_osd() { launch "osd.$1" env -C / ceph-osd -f -c "$CEPH_CONF" -i "$1" --osd-data "$DIR/ceph/osd.$1"; }

# The daemons are asked themselves, through their admin sockets: the cluster notices a death only after a while.
ask_daemon() { timeout 20 ceph --admin-daemon "$DIR/run/$1.$2.asok" "$3"; }
ready_mon() { [[ $(ask_daemon mon.a "$(pid_of mon)" mon_status) == *'"state": "leader"'* ]]; }
ready_osd() { [[ $(ask_daemon "osd.$1" "$(pid_of "osd.$1")" status) == *'"state": "active"'* ]]; }
ready_mgr() { [[ $(ceph_ mgr stat) == *'"available": true'* ]]; }

logs_mon() { printf '%s\n' "$DIR/log/mon.out" "$DIR/log/ceph-mon.a.log"; }
logs_mgr() { printf '%s\n' "$DIR/log/mgr.out" "$DIR/log/ceph-mgr.x.log"; }
logs_osd() { printf '%s\n' "$DIR/log/osd.$1.out" "$DIR/log/ceph-osd.$1.log"; }

# --- the cluster, made once ------------------------------------------------------------------------------------------

# The new monitor knows all accounts from the start: those of the daemons (one keyring for all) and those of the clients.
create_cluster() {
  local keyring=$DIR/ceph/keyring osd
  rm -rf "$DIR/ceph"
  mkdir -p "$DIR/ceph/mon" "$DIR/ceph/mgr"
  FSID=$(uuidgen)
  render "$LAB_HERE/etc/ceph/ceph.conf" | put "$CEPH_CONF"

  new_key "$keyring" mon. mon 'allow *'
  new_key "$keyring" mgr.x mon 'allow profile mgr' osd 'allow *' mds 'allow *'
  for osd in $(osd_names); do
    new_key "$keyring" "$osd" mon 'allow profile osd' mgr 'allow profile osd' osd 'allow *'
  done
  new_key "$DIR/ceph/client.admin.keyring" client.admin mon 'allow *' osd 'allow *' mgr 'allow *' mds 'allow *'
  create_client_keys

  cp "$keyring" "$DIR/ceph/all.keyring"
  local client
  for client in "$DIR"/ceph/client.*.keyring; do
    ceph-authtool "$DIR/ceph/all.keyring" --import-keyring "$client" >/dev/null
  done
  step ceph-setup 30 monmaptool --create --clobber --fsid "$FSID" "$DIR/ceph/monmap" \
    --addv a "[v2:127.0.0.1:$PORT_MON_V2,v1:127.0.0.1:$PORT_MON_V1]"
  step ceph-setup 60 ceph-mon -c "$CEPH_CONF" --mkfs -i a --monmap "$DIR/ceph/monmap" --keyring "$DIR/ceph/all.keyring"
  rm "$DIR/ceph/all.keyring"
}

# Glance and Cinder have the capabilities that Ceph's manual gives them; what the daemon makes must be readable by
# them. Cinder reads images, and may not write to them.
# The daemon has `profile rbd` on the pools it reads from and writes to, and no other. `nocaps` is for checks that must
# fail.
create_client_keys() {
  local sources='profile rbd pool=volumes, profile rbd pool=volumes2, profile rbd pool=vms, profile rbd pool=ecdata'
  client_key glance 'profile rbd pool=images, profile rbd pool=ecdata'
  client_key cinder "$sources, profile rbd-read-only pool=images"
  client_key rbd-offload "profile rbd pool=images, $sources"
  client_key rbd-offload-nocaps 'profile rbd pool=images, profile rbd-read-only pool=volumes'
}

client_key() { # NAME OSD-CAPABILITIES
  new_key "$DIR/ceph/client.$1.keyring" "client.$1" mon 'profile rbd' mgr 'profile rbd' osd "$2"
}

new_key() { # KEYRING NAME {DAEMON CAPABILITIES}…
  local keyring=$1 name=$2 caps=()
  shift 2
  while [ $# -gt 0 ]; do
    caps+=(--cap "$1" "$2")
    shift 2
  done
  [ -e "$keyring" ] || ceph-authtool --create-keyring "$keyring" >/dev/null
  ceph-authtool "$keyring" --gen-key -n "$name" "${caps[@]}" >/dev/null
}

# The cluster hands out the numbers 0, 1, 2… in order, so the OSDs are announced one after the other.
create_osds() {
  local osd uuid
  for osd in $(osd_names); do
    rm -rf "$DIR/ceph/$osd"
    mkdir -p "$DIR/ceph/$osd"
    uuid=$(uuidgen)
    step ceph-setup 60 ceph --connect-timeout 20 osd new "$uuid"
    step "$osd-mkfs" 120 ceph-osd -c "$CEPH_CONF" -i "${osd#osd.}" --mkfs --osd-uuid "$uuid" --osd-data "$DIR/ceph/$osd"
  done
}

create_pools() {
  local pool inits=() pid
  for pool in images volumes volumes2 vms; do
    step ceph-setup 60 ceph --connect-timeout 20 osd pool create "$pool" 16 16
    step ceph-setup 120 rbd pool init "$pool" &
    inits+=($!)
  done
  # An erasure-coded pool can hold an image's data only when it takes overwrites.
  step ceph-setup 60 ceph --connect-timeout 20 osd erasure-code-profile set ec21 k=2 m=1 crush-failure-domain=osd --force
  step ceph-setup 60 ceph --connect-timeout 20 osd pool create ecdata 8 8 erasure ec21
  step ceph-setup 60 ceph --connect-timeout 20 osd pool set ecdata allow_ec_overwrites true
  step ceph-setup 60 ceph --connect-timeout 20 osd pool application enable ecdata rbd
  for pid in "${inits[@]}"; do wait "$pid" || exit 1; done
}

# Placement groups have to serve before anything else can work.
pgs_active() {
  local stat
  stat=$(ceph_ pg stat) || return 1
  [[ $stat != 0\ pgs* ]] && ! grep -qE 'unknown|creating|peering|inactive|stale|down|activating|incomplete' <<<"$stat"
}

# os-brick, through which Cinder's own upload goes, looks for a keyring in /etc/ceph and nowhere else.
# The cluster's name there is the lab's own (rbd_cluster_name in cinder.conf), so no other file is in its way.
etc_ceph_keyring() { echo "/etc/ceph/rbdlab$BASE.client.cinder.keyring"; }
install_etc_ceph_keyring() {
  cmp -s "$DIR/ceph/client.cinder.keyring" "$(etc_ceph_keyring)" && return
  as_root mkdir -p /etc/ceph
  as_root install -m 644 "$DIR/ceph/client.cinder.keyring" "$(etc_ceph_keyring)"
}
