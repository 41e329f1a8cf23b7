# Nova's part of the lab, which lab/nova-up adds: Nova, Placement, libvirt with QEMU (without KVM), the least Neutron, and a
# second Glance over the same database.
# shellcheck shell=bash

NOVA_HERE=$LAB_HERE/nova

# Each leans on those before it.
nova_services() {
  [ ! -e "$DIR/state/nova" ] ||
    printf '%s\n' glance-direct fake-neutron virtlogd libvirtd placement nova-conductor nova-scheduler nova-api nova-compute
}

# --- the processes ---------------------------------------------------------------------------------------------------


launch_nova_process() { # NAME [OPTION…]
  sql "update nova_cell1.services set report_count = 0 where \`binary\` = '$1'"
  launch "$1" env HOME="$SERVICE_HOME" PATH="$NOVA_VENV/bin:$PATH" "$NOVA_VENV/bin/$1" \
    --config-file "$DIR/etc/nova/nova.conf" "${@:2}"
}
launch_nova_conductor() { launch_nova_process nova-conductor; }
launch_nova_scheduler() { launch_nova_process nova-scheduler; }
# What lies in compute.d is for this one only: tests put the integration's configuration there.
launch_nova_compute() { launch_nova_process nova-compute --config-dir "$DIR/etc/nova/compute.d"; }

launch_nova_wsgi() { # NAME
  launch "$1" env HOME="$SERVICE_HOME" PATH="$NOVA_VENV/bin:$PATH" GUNICORN_CMD_ARGS="-c $DIR/etc/gunicorn/$1.py" \
    "$NOVA_VENV/bin/gunicorn"
}
launch_nova_api() { launch_nova_wsgi nova-api; }
launch_placement() { launch_nova_wsgi placement; }
launch_glance_direct() { launch_wsgi glance-direct; }
launch_fake_neutron() { launch fake-neutron /usr/bin/python3 "$NOVA_HERE/fake_neutron.py" "$PORT_NEUTRON"; }

launch_virtlogd() { launch_libvirt virtlogd; }
launch_libvirtd() { launch_libvirt libvirtd; }
launch_libvirt() { # NAME
  rm -f "$DIR/nova/libvirt/run/$1-sock"
  launch "$1" unshare --mount --propagation private "$NOVA_HERE/own-libvirt" "$DIR/nova/libvirt" \
    "/usr/sbin/$1" -f "/etc/libvirt/$1.conf" -p "$DIR/run/$1-own.pid"
}

ready_glance_direct() { answers "http://127.0.0.1:$PORT_GLANCE_DIRECT/"; }
ready_fake_neutron() { answers "http://127.0.0.1:$PORT_NEUTRON/"; }
ready_placement() { answers "http://127.0.0.1:$PORT_PLACEMENT/"; }
ready_nova_api() { answers "http://127.0.0.1:$PORT_NOVA/"; }
ready_virtlogd() { [ -S "$DIR/nova/libvirt/run/virtlogd-sock" ]; }
ready_libvirtd() { virsh_ list >/dev/null; }
ready_nova_conductor() { nova_reports nova-conductor; }
ready_nova_scheduler() { nova_reports nova-scheduler; }
ready_nova_compute() { nova_reports nova-compute; }

# nova_reports NAME: they count their heartbeats in the database as soon as they take work.
nova_reports() {
  [ "$(sql "select count(*) from nova_cell1.services where \`binary\` = '$1' and not deleted
      and report_count > 0 and updated_at > utc_timestamp() - interval 30 second")" = 1 ]
}

logs_glance_direct() { printf '%s\n' "$DIR/log/glance-direct.out" "$DIR/log/glance-direct.log"; }
logs_fake_neutron() { echo "$DIR/log/fake-neutron.out"; }
logs_placement() { printf '%s\n' "$DIR/log/placement.out" "$DIR/log/placement.log"; }
logs_virtlogd() { printf '%s\n' "$DIR/log/virtlogd.out" "$DIR/log/virtlogd.log"; }
logs_libvirtd() { printf '%s\n' "$DIR/log/libvirtd.out" "$DIR/log/libvirtd.log"; }
logs_nova_api() { printf '%s\n' "$DIR/log/nova-api.out" "$DIR/log/nova-api.log"; }
logs_nova_conductor() { printf '%s\n' "$DIR/log/nova-conductor.out" "$DIR/log/nova-conductor.log"; }
logs_nova_scheduler() { printf '%s\n' "$DIR/log/nova-scheduler.out" "$DIR/log/nova-scheduler.log"; }
logs_nova_compute() { printf '%s\n' "$DIR/log/nova-compute.out" "$DIR/log/nova-compute.log"; }

virsh_() { timeout 60 virsh --connect "$LIBVIRT_URI" "$@"; }

# Guests outlive libvirtd, which leaves the pid of each in a file.
stop_guests() {
  local file pid
  for file in "$DIR"/nova/libvirt/run/qemu/*.pid; do
    pid=$(cat "$file" 2>/dev/null) || continue
    # not another process's, after a reboot
    ! grep -qs qemu-system "/proc/$pid/cmdline" || kill -KILL "$pid"
  done
}

# --- made once -------------------------------------------------------------------------------------------------------

install_virtualisation() {
  local missing
  mapfile -t missing < <(missing_debian_packages "$NOVA_HERE/packages.txt")
  [ ${#missing[@]} -gt 0 ] || return 0
  local codename options=() suite=()
  codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
  if [ "$codename" = bookworm ]; then
    use_backports "$codename"
    options=(-o "Dir::Etc::sourceparts=$DIR/nova/apt") suite=(-t "$codename-backports")
  fi
  say "apt-get install ${suite[*]} ${missing[*]}"
  # all of them, so that those which are there already come from the same suite
  mapfile -t missing < <(grep -v '^#' "$NOVA_HERE/packages.txt")
  install_packages nova-apt "${options[@]}" "${suite[@]}" -- "${missing[@]}"
}

# The machine's own sources and, beside them, the backports from the mirror that they name; /etc/apt is left as it is.
use_backports() { # CODENAME
  local mirror file
  # shellcheck disable=SC2016  # apt-get fills them in
  mirror=$(apt-get indextargets --format '$(CREATED_BY) $(RELEASE) $(COMPONENT) $(REPO_URI)' |
    awk -v codename="$1" '$1 == "Packages" && $2 == codename && $3 == "main" { print $4; exit }')
  [ -n "$mirror" ] || die "this machine has no apt source of Debian $1"
  rm -rf "$DIR/nova/apt"
  mkdir -p "$DIR/nova/apt"
  for file in /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    [ ! -e "$file" ] || cp -L "$file" "$DIR/nova/apt/"
  done
  echo "deb $mirror $1-backports main" >"$DIR/nova/apt/backports.list"
}

# As it is installed beside a real Nova: as a package. It is built from a copy, so that nothing is left in the tree.
install_nova_integration() {
  rm -rf "$DIR/nova/integration"
  cp -rL "$LAB_HERE/../integrations/nova" "$DIR/nova/integration"
  step nova-integration 300 "$NOVA_VENV/bin/pip" install --disable-pip-version-check --no-build-isolation --no-deps \
    --force-reinstall "$DIR/nova/integration"
}

render_nova_templates() {
  local file
  while read -r file; do
    case $file in
      libvirt/*) render "$NOVA_HERE/etc/$file" | put "$DIR/nova/libvirt/etc/${file#libvirt/}" ;;
      *) render "$NOVA_HERE/etc/$file" | put "$DIR/etc/$file" ;;
    esac
  done < <(cd "$NOVA_HERE/etc" && find . -type f -printf '%P\n')
  mkdir -p "$DIR/etc/nova/compute.d"
  # Glance's own configuration but for three lines
  cp -r "$DIR/etc/glance/." "$DIR/etc/glance-direct/"
  sed -e "s#^log_file = .*#log_file = $DIR/log/glance-direct.log#" \
    -e 's#^show_image_direct_url = .*#show_image_direct_url = true#' \
    -e "s#^worker_self_reference_url = .*#worker_self_reference_url = http://127.0.0.1:$PORT_GLANCE_DIRECT#" \
    "$DIR/etc/glance/glance-api.conf" | put "$DIR/etc/glance-direct/glance-api.conf"
}

# Nova makes its snapshots itself, so its user may write to Glance's pool.
create_nova_key() {
  step nova-setup 60 ceph --connect-timeout 20 auth get-or-create client.nova mon 'profile rbd' mgr 'profile rbd' \
    osd 'profile rbd pool=vms, profile rbd pool=images' -o "$DIR/ceph/client.nova.keyring"
}

create_nova_databases() {
  local name
  for name in nova_api nova_cell0 nova_cell1 placement; do
    sql "create database if not exists $name"
  done
  sql "create user if not exists 'nova'@'127.0.0.1' identified by 'secret'"
  for name in nova_api nova_cell0 nova_cell1 placement; do
    sql "grant all on $name.* to 'nova'@'127.0.0.1'"
  done
  cp "$NOVA_VENV/etc/nova/api-paste.ini" "$DIR/etc/nova/"
  manage placement "$NOVA_VENV/bin/placement-manage" --config-file "$DIR/etc/placement/placement.conf" db sync
  nova_manage api_db sync
  nova_manage cell_v2 map_cell0 \
    --database_connection "mysql+pymysql://nova:secret@127.0.0.1:$PORT_MARIADB/nova_cell0?charset=utf8"
  nova_manage db sync
  nova_manage cell_v2 create_cell --name cell1
}
nova_manage() { manage nova "$NOVA_VENV/bin/nova-manage" --config-file "$DIR/etc/nova/nova.conf" "$@"; }

# libvirt keeps them: guests reach their disks with the key of client.nova, and volumes with that of client.cinder.
define_libvirt_secrets() {
  define_libvirt_secret "$LIBVIRT_SECRET" client.nova
  define_libvirt_secret "$LIBVIRT_SECRET_CINDER" client.cinder
}

define_libvirt_secret() { # UUID CEPHX-USER
  local file=$DIR/nova/secret.xml
  cat >"$file" <<EOS
<secret ephemeral='no' private='no'><uuid>$1</uuid><usage type='ceph'><name>$2</name></usage></secret>
EOS
  step nova-setup 60 virsh --connect "$LIBVIRT_URI" secret-define "$file"
  step nova-setup 60 virsh --connect "$LIBVIRT_URI" secret-set-value "$1" --base64 "$(ceph_ auth get-key "$2")"
}

# catalog.py PART: users and catalog before Nova starts, flavors afterwards.
setup_nova_api() {
  local message
  message=$(timeout 180 "$VENV/bin/python" "$NOVA_HERE/catalog.py" "$1" --keystone "http://127.0.0.1:$PORT_KEYSTONE" \
    --nova "http://127.0.0.1:$PORT_NOVA/v2.1" --placement "http://127.0.0.1:$PORT_PLACEMENT" \
    --neutron "http://127.0.0.1:$PORT_NEUTRON" 2>&1) && return
  is_service "${message%%:*}" || die "catalog.py failed: $message"
  service_failed "${message%%:*}" "$message"
}

map_host() { retry_for 60 host_is_mapped || fail_with_log "Nova does not find its host" "$DIR/log/nova-setup.log"; }
host_is_mapped() {
  nova_manage cell_v2 discover_hosts
  [ "$(sql 'select count(*) from nova_api.host_mappings')" = 1 ]
}
