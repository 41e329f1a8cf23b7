# Everything that the commands of the lab share. Sourcing it defines functions only; `use_lab [DIR]` then picks the lab.
# shellcheck shell=bash

LAB_HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# shellcheck source=settings.sh
. "$LAB_HERE/lib/settings.sh"
# shellcheck source=process.sh
. "$LAB_HERE/lib/process.sh"
# shellcheck source=services.sh
. "$LAB_HERE/lib/services.sh"
# shellcheck source=packages.sh
. "$LAB_HERE/lib/packages.sh"
# shellcheck source=config.sh
. "$LAB_HERE/lib/config.sh"
# shellcheck source=ceph.sh
. "$LAB_HERE/lib/ceph.sh"
# shellcheck source=mariadb.sh
. "$LAB_HERE/lib/mariadb.sh"
# shellcheck source=rabbit.sh
. "$LAB_HERE/lib/rabbit.sh"
# shellcheck source=openstack.sh
. "$LAB_HERE/lib/openstack.sh"
# shellcheck source=nova.sh
. "$LAB_HERE/lib/nova.sh"
# shellcheck source=setup.sh
. "$LAB_HERE/lib/setup.sh"
