# Debian's packages, and PyPI's in a virtual environment.
# shellcheck shell=bash

install_debian_packages() {
  local missing
  mapfile -t missing < <(missing_debian_packages)
  [ ${#missing[@]} -gt 0 ] || return 0
  say "apt-get install ${missing[*]}"
  without_package_services as_root apt-get update -qq >"$DIR/log/apt.log" 2>&1 ||
    fail_with_log "apt-get update failed" "$DIR/log/apt.log"
  without_package_services as_root env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
    timeout 1200 apt-get install -y -qq --no-install-recommends "${missing[@]}" >>"$DIR/log/apt.log" 2>&1 </dev/null ||
    fail_with_log "apt-get install failed" "$DIR/log/apt.log"
}

missing_debian_packages() {
  local package
  while read -r package; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
  done < <(grep -v '^#' "$LAB_HERE/packages.txt")
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

# The stamp holds the checksum of what was asked for: a changed list installs again.
venv_wanted() { cat "$LAB_HERE/requirements.txt" "$LAB_HERE/constraints.txt" | sha256sum | cut -d' ' -f1; }
venv_ready() { [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.installed" 2>/dev/null)" = "$(venv_wanted)" ]; }

# --system-site-packages: Glance and Cinder need Debian's python3-rados and python3-rbd, which PyPI does not have.
make_venv() {
  step pip 300 /usr/bin/python3 -m venv --system-site-packages "$VENV"
  step pip 1200 "$VENV/bin/pip" install --disable-pip-version-check --progress-bar off \
    -c "$LAB_HERE/constraints.txt" -r "$LAB_HERE/requirements.txt"
  venv_wanted >"$VENV/.installed"
}
