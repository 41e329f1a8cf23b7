"""Nova's and Placement's users and catalog entries (`accounts`), and Nova's flavors (`flavors`)."""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from accounts import Api, ensure, login, make_catalog  # noqa: E402

#: Name, and GiB of the disk.
FLAVORS = (('d1', 1), ('d4', 4))


def make_users(keystone):
    project = ensure(keystone, 'project', 'service', domain_id='default')
    for name in ('nova', 'placement'):
        user = ensure(keystone, 'user', name, domain_id='default', password='secret', default_project_id=project)
        for role in ('service', 'admin'):
            keystone.put('/projects/%s/users/%s/roles/%s' % (project, user, ensure(keystone, 'role', role)))


def make_flavors(nova):
    present = {flavor['name'] for flavor in nova.get('/flavors')['flavors']}
    for name, disk in FLAVORS:
        if name not in present:
            nova.post('/flavors', {'flavor': {'name': name, 'ram': 128, 'vcpus': 1, 'disk': disk}})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('part', choices=('accounts', 'flavors'))
    for name in ('keystone', 'nova', 'placement', 'neutron'):
        parser.add_argument('--' + name, required=True, metavar='URL')
    options = parser.parse_args()

    keystone, token, _ = login(options.keystone)
    if options.part == 'flavors':
        make_flavors(Api('nova-api', options.nova, token))
        return
    make_users(keystone)
    make_catalog(keystone, (('nova', 'compute', options.nova), ('placement', 'placement', options.placement),
                            ('neutron', 'network', options.neutron)))


if __name__ == '__main__':
    main()
