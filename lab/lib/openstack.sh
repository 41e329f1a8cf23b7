# Keystone, Glance and Cinder: their databases and their processes.
# shellcheck shell=bash

# --- the processes ---------------------------------------------------------------------------------------------------

# The APIs are WSGI applications that read sys.argv themselves, so gunicorn's options travel in the environment.
launch_wsgi() { # NAME [VARIABLE=VALUE…]
  launch "$1" env HOME="$SERVICE_HOME" GUNICORN_CMD_ARGS="-c $DIR/etc/gunicorn/$1.py" "${@:2}" "$VENV/bin/gunicorn"
}
launch_keystone() { launch_wsgi keystone; }
launch_glance() { launch_wsgi glance; }
# Its cinder.conf is that of the other two, with a log_dir; left to itself it would log to gunicorn.log.
launch_cinder_api() { launch_wsgi cinder-api OS_DEFAULT__LOG_FILE="$DIR/log/cinder-api.log"; }

launch_cinder() { # NAME [VARIABLE=VALUE…]
  sql "update cinder.services set report_count = 0 where \`binary\` = '$1'"
  launch "$1" env HOME="$SERVICE_HOME" "${@:2}" "$VENV/bin/$1" --config-file "$DIR/etc/cinder/cinder.conf"
}
launch_cinder_scheduler() { launch_cinder cinder-scheduler; }
# The driver of `ceph-offload` comes from the tree.
launch_cinder_volume() { launch_cinder cinder-volume PYTHONPATH="$LAB_HERE/../integrations/cinder" PYTHONDONTWRITEBYTECODE=1; }

ready_keystone() { answers "http://127.0.0.1:$PORT_KEYSTONE/v3"; }
ready_glance() { answers "http://127.0.0.1:$PORT_GLANCE/"; }
ready_cinder_api() { answers "http://127.0.0.1:$PORT_CINDER/"; }
ready_cinder_scheduler() { cinder_reports cinder-scheduler 1; }
ready_cinder_volume() { cinder_reports cinder-volume 3; } # one report for each backend

# cinder_reports NAME COUNT: scheduler and volume have no port, but as soon as they take work they count their heartbeats
# in the database (set back when they are launched; `updated_at` alone changes earlier).
cinder_reports() {
  [ "$(sql "select count(*) from cinder.services where \`binary\` = '$1' and not deleted
      and report_count > 0 and updated_at > utc_timestamp() - interval 30 second")" = "$2" ]
}

logs_keystone() { printf '%s\n' "$DIR/log/keystone.out" "$DIR/log/keystone.log"; }
logs_glance() { printf '%s\n' "$DIR/log/glance.out" "$DIR/log/glance-api.log"; }
logs_cinder_api() { printf '%s\n' "$DIR/log/cinder-api.out" "$DIR/log/cinder-api.log"; }
logs_cinder_scheduler() { printf '%s\n' "$DIR/log/cinder-scheduler.out" "$DIR/log/cinder-scheduler.log"; }
logs_cinder_volume() { printf '%s\n' "$DIR/log/cinder-volume.out" "$DIR/log/cinder-volume.log"; }

# --- the databases, made once ----------------------------------------------------------------------------------------

setup_keystone() {
  local url=http://127.0.0.1:$PORT_KEYSTONE/v3/
  keystone_manage fernet_setup --keystone-user "$(id -un)" --keystone-group "$(id -gn)"
  keystone_manage credential_setup --keystone-user "$(id -un)" --keystone-group "$(id -gn)"
  keystone_manage db_sync
  keystone_manage bootstrap --bootstrap-password secret --bootstrap-region-id RegionOne \
    --bootstrap-admin-url "$url" --bootstrap-internal-url "$url" --bootstrap-public-url "$url"
}
keystone_manage() { manage keystone "$VENV/bin/keystone-manage" --config-file "$DIR/etc/keystone/keystone.conf" "$@"; }
setup_glance() { manage glance "$VENV/bin/glance-manage" --config-file "$DIR/etc/glance/glance-api.conf" db_sync; }
setup_cinder() { manage cinder "$VENV/bin/cinder-manage" --config-file "$DIR/etc/cinder/cinder.conf" db sync; }

# The variable turns on what goes to the service's own log otherwise: the reason of a failure belongs into the step's.
manage() { # NAME COMMAND…
  step "$1-setup" 180 env OS_DEFAULT__USE_STDERR=true "${@:2}"
}

# Projects, users, catalog, volume types. What fails says so on stderr, with the service in front.
setup_accounts() {
  local message
  message=$(timeout 400 "$VENV/bin/python" "$LAB_HERE/accounts.py" --password "$OFFLOAD_PASSWORD" \
    --keystone "http://127.0.0.1:$PORT_KEYSTONE" \
    --glance "http://127.0.0.1:$PORT_GLANCE" \
    --cinder "http://127.0.0.1:$PORT_CINDER" 2>&1) && return
  is_service "${message%%:*}" || die "accounts.py failed: $message"
  service_failed "${message%%:*}" "$message"
}
