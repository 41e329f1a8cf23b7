# Debian's packages, and PyPI's in a virtual environment.
# shellcheck shell=bash

install_debian_packages() {
  local missing
  mapfile -t missing < <(missing_debian_packages "$LAB_HERE/packages.txt")
  [ ${#missing[@]} -gt 0 ] || return 0
  say "apt-get install ${missing[*]}"
  install_packages apt -- "${missing[@]}"
}

# install_packages LOG [OPTION…] -- PACKAGE…
install_packages() {
  local log=$DIR/log/$1.log options=()
  shift
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  # Another apt-get may be at work: its locks are waited for. `update` has no option for that.
  retry_for 300 update_package_lists "$log" "${options[@]}" || fail_with_log "apt-get update failed" "$log"
  without_package_services as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
    timeout 1200 apt-get "${options[@]}" -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends "$@" >>"$log" 2>&1 </dev/null ||
    fail_with_log "apt-get install failed" "$log"
}

update_package_lists() { # LOG [OPTION…]
  local log=$1
  shift
  without_package_services as_root apt-get "$@" update -qq >"$log" 2>&1 || { sleep 5; return 1; }
}

missing_debian_packages() { # LIST
  local package
  while read -r package; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
  done < <(grep -v '^#' "$1")
}

# The packages bring services of their own (a MariaDB on 3306, a RabbitMQ on 5672): they stay down, the lab starts its own.
# policy-rc.d is how Debian is told so; one that is there already is left alone.
without_package_services() {
  local policy=/usr/sbin/policy-rc.d status=0
  [ ! -e $policy ] || { "$@"; return; }
  printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
  as_root chmod 755 $policy
  "$@" || status=$?
  as_root rm -f $policy
  return $status
}

# A virtual environment holds what a folder's requirements.txt and constraints.txt say. The stamp is their checksum: a
# changed list installs again.
venv_wanted() { cat "$1/requirements.txt" "$1/constraints.txt" | sha256sum | cut -d' ' -f1; }
venv_ready() { # VENV LISTS
  [ -x "$1/bin/python" ] && [ "$(cat "$1/.installed" 2>/dev/null)" = "$(venv_wanted "$2")" ]
}

# --system-site-packages: the services need Debian's python3-rados, python3-rbd and python3-libvirt, which PyPI does not have
# or cannot build.
make_venv() { # VENV LISTS
  local log
  log=pip-$(basename "$1")
  step "$log" 300 /usr/bin/python3 -m venv --system-site-packages "$1"
  step "$log" 1200 "$1/bin/pip" install --disable-pip-version-check --progress-bar off \
    -c "$2/constraints.txt" -r "$2/requirements.txt"
  venv_wanted "$2" >"$1/.installed"
}
