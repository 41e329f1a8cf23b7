# One MariaDB for Keystone, Glance and Cinder. (On SQLite they answer 500 "database is locked" under load.)
# Its databases and accounts are in etc/mariadb/init.sql, which the server reads at every start.
# shellcheck shell=bash

create_mariadb() {
  rm -rf "$DIR/mariadb"
  mkdir -p "$DIR/mariadb"
  # The lab's own user is the administrator, known by the socket: no password.
  step mariadb-setup 120 mariadb-install-db --no-defaults --datadir="$DIR/mariadb" --user="$(id -un)" --skip-test-db \
    --auth-root-authentication-method=socket --auth-root-socket-user="$(id -un)" --innodb-log-file-size=32M --innodb-use-native-aio=0
}

launch_mariadb() { launch mariadb /usr/sbin/mariadbd --defaults-file="$DIR/etc/mariadb/my.cnf" --user="$(id -un)"; }

# Several rounds of init.sql are done before the server listens.
ready_mariadb() { [ "$(sql 'select 1')" = 1 ]; }

logs_mariadb() { echo "$DIR/log/mariadb.out"; }

sql() { timeout 20 mariadb --no-defaults --socket="$DIR/run/mariadb.sock" --user="$(id -un)" --skip-column-names --batch --execute "$1"; }
