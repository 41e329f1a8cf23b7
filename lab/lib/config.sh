# Configuration files: the lab's own templates from etc/, and the services' stock files from the installed packages.
# shellcheck shell=bash

# render FILE: FILE with every @NAME@ replaced by the setting of that name.
render() {
  local text name
  text=$(<"$1")
  while [[ $text =~ @([A-Z][A-Z0-9_]*)@ ]]; do
    name=${BASH_REMATCH[1]}
    [ -n "${!name:-}" ] || die "$1: there is no setting @$name@"
    text=${text//"@$name@"/"${!name}"}
  done
  printf '%s\n' "$text"
}

# put FILE: standard input becomes FILE at once, and only if it differs (a running service may be reading it).
put() {
  mkdir -p "$(dirname "$1")"
  cat >"$1.new"
  if cmp -s "$1.new" "$1"; then rm "$1.new"; else mv "$1.new" "$1"; fi
}

# etc/X/Y → DIR/etc/X/Y, except Ceph's: ceph.conf needs the cluster's fsid and has its place in DIR/ceph.
render_templates() {
  local file
  while read -r file; do
    render "$LAB_HERE/etc/$file" | put "$DIR/etc/$file"
  done < <(cd "$LAB_HERE/etc" && find . -type f ! -path './ceph/*' -printf '%P\n')
  ln -sfn "$DIR/etc/cinder/cinder.conf" "$SERVICE_HOME/.cinder/cinder.conf" # where cinder-api looks for it under gunicorn
}

# The paste pipelines, rootwrap filters and the like come with the packages; a copy in etc/ would grow stale.
take_stock_files() {
  local stock=$VENV/etc
  cp -r "$stock/glance/glance-api-paste.ini" "$stock/glance/metadefs" "$DIR/etc/glance/"
  cp -r "$stock/cinder/api-paste.ini" "$stock/cinder/resource_filters.json" "$stock/cinder/rootwrap.d" "$DIR/etc/cinder/"
  sed "s#/etc/cinder/rootwrap.d#$DIR/etc/cinder/rootwrap.d#" "$stock/cinder/rootwrap.conf" | put "$DIR/etc/cinder/rootwrap.conf"
}
