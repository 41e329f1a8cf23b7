"""Projects, users, roles, catalog, volume types and quotas of the lab. What is there already is left as it is."""

import argparse
import sys
import time

import requests

TIMEOUT = 60

#: Seconds for which a service that has just started may answer 503 (it cannot reach Keystone yet, say), or refuse the
#: connection.
STARTING = 90


def fail(service, text):
    """lab/up shows the log of the service that the message starts with."""
    sys.exit('%s: %s' % (service, text))


class Api:
    """One service, seen with one token."""

    def __init__(self, service, url, token=None, **headers):
        self.service = service
        self.url = url
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy on the way to loopback
        self.session.headers.update(headers)
        if token:
            self.session.headers['X-Auth-Token'] = token

    def call(self, method, path, **kwargs):
        where = '%s %s%s' % (method, self.url, path)
        end = time.monotonic() + STARTING
        while True:
            late = time.monotonic() > end
            try:
                answer = self.session.request(method, self.url + path, timeout=TIMEOUT, **kwargs)
            except requests.ConnectionError as error:
                if late:
                    fail(self.service, '%s: %s' % (where, error))
            except requests.RequestException as error:
                fail(self.service, '%s: %s' % (where, error))
            else:
                if answer.status_code != 503 or late:
                    break
            time.sleep(1)
        if not answer.ok:
            fail(self.service, '%s answers %s: %s' % (where, answer.status_code, answer.text[:500]))
        return answer

    def get(self, path, **query):
        return self.call('GET', path, params=query).json()

    def put(self, path, body=None):
        return self.call('PUT', path, json=body)

    def post(self, path, body):
        return self.call('POST', path, json=body)


def login(keystone_url):
    """The administrator that `keystone-manage bootstrap` made: an Api of Keystone, the token, the project's id."""
    default = {'id': 'default'}
    answer = Api('keystone', keystone_url).post('/v3/auth/tokens', {'auth': {
        'identity': {
            'methods': ['password'],
            'password': {'user': {'name': 'admin', 'domain': default, 'password': 'secret'}},
        },
        'scope': {'project': {'name': 'admin', 'domain': default}},
    }})
    token = answer.headers['X-Subject-Token']
    return Api('keystone', keystone_url + '/v3', token), token, answer.json()['token']['project']['id']


def ensure(keystone, kind, name, **attributes):
    """The id of the project, user, role or service of that name, which is made if it is missing."""
    found = keystone.get('/%ss' % kind, name=name)['%ss' % kind]
    if found:
        return found[0]['id']
    return keystone.post('/%ss' % kind, {kind: dict(name=name, **attributes)}).json()[kind]['id']


def make_identities(keystone, offload_password):
    roles = {name: ensure(keystone, 'role', name) for name in ('admin', 'member', 'reader', 'service')}
    projects = {name: ensure(keystone, 'project', name, domain_id='default') for name in ('demo', 'demo2', 'service')}

    def user(name, project, *granted, password='secret'):
        user_id = ensure(keystone, 'user', name, domain_id='default', password=password,
                         default_project_id=projects[project])
        for role in granted:
            keystone.put('/projects/%s/users/%s/roles/%s' % (projects[project], user_id, roles[role]))

    user('demo', 'demo', 'member')
    user('demo2', 'demo2', 'member')
    user('glance', 'service', 'service', 'admin')
    user('cinder', 'service', 'service', 'admin')
    # The daemon: `service` to register locations, `admin` to see images of other projects.
    user('offload', 'service', 'service', 'admin', password=offload_password)
    # Two that lack something, for checks that must fail.
    user('offload-noservice', 'service', 'admin', password=offload_password)
    user('offload-reader', 'service', 'reader', password=offload_password)
    return projects


def make_catalog(keystone, services):
    """Of each service the name, the type and the URL."""
    for name, kind, url in services:
        service_id = ensure(keystone, 'service', name, type=kind)
        present = {e['interface'] for e in keystone.get('/endpoints', service_id=service_id)['endpoints']}
        for interface in {'public', 'internal', 'admin'} - present:
            keystone.post('/endpoints', {'endpoint': {
                'interface': interface, 'region_id': 'RegionOne', 'service_id': service_id, 'url': url}})


def make_volume_types(cinder):
    """A type for each backend, and one that encrypts (with the fixed key of cinder.conf: there is no Barbican)."""
    present = {t['name'] for t in cinder.get('/types')['volume_types']}
    for name, backend in (('ceph', 'ceph'), ('ceph2', 'ceph2'), ('luks', 'ceph'),
                          ('ceph-offload', 'ceph-offload'), ('luks-offload', 'ceph-offload')):
        if name in present:
            continue
        made = cinder.post('/types', {'volume_type': {'name': name, 'extra_specs': {'volume_backend_name': backend}}})
        if name.startswith('luks'):
            cinder.post('/types/%s/encryption' % made.json()['volume_type']['id'], {'encryption': {
                'provider': 'luks', 'cipher': 'aes-xts-plain64', 'key_size': 256, 'control_location': 'front-end'}})


def set_quotas(cinder, project_ids):
    for project_id in project_ids:
        cinder.put('/os-quota-sets/%s' % project_id,
                   {'quota_set': {'volumes': 2000, 'gigabytes': 50000, 'snapshots': 2000}})


def await_cinder(cinder, seconds=60):
    """cinder-api itself must see all backends and the scheduler as up."""
    wanted = {('cinder-scheduler', 'lab'), ('cinder-volume', 'lab@ceph'), ('cinder-volume', 'lab@ceph2'),
              ('cinder-volume', 'lab@ceph-offload')}
    end = time.monotonic() + seconds
    while True:
        up = {(s['binary'], s['host']) for s in cinder.get('/os-services')['services'] if s['state'] == 'up'}
        if wanted <= up:
            return
        if time.monotonic() > end:
            missing = sorted(wanted - up)
            fail(missing[-1][0], 'not up after %d s, says cinder-api: %s' % (seconds, missing))
        time.sleep(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ('keystone', 'glance', 'cinder'):
        parser.add_argument('--' + name, required=True, metavar='URL')
    parser.add_argument('--password', required=True, help='of the daemon\'s own Keystone users')
    options = parser.parse_args()

    keystone, token, admin_project = login(options.keystone)
    projects = make_identities(keystone, options.password)
    make_catalog(keystone, (('glance', 'image', options.glance), ('cinder', 'block-storage', options.cinder + '/v3'),
                            ('cinderv3', 'volumev3', options.cinder + '/v3')))

    cinder = Api('cinder-api', '%s/v3/%s' % (options.cinder, admin_project), token,
                 **{'OpenStack-API-Version': 'volume 3.60'})
    make_volume_types(cinder)
    set_quotas(cinder, (projects['demo'], projects['demo2']))
    await_cinder(cinder)
    # what `rbd-offload check` asks, which goes through cinder-api and the scheduler
    cinder.get('/scheduler-stats/get_pools', detail='true')

    # Glance answers a bare GET / without its database. It declares its exchange with its first notification, and a
    # cloud that is in use has sent one.
    glance = Api('glance', options.glance, token)
    image = glance.call('POST', '/v2/images', json={'name': 'first'}).json()
    glance.call('DELETE', '/v2/images/%s' % image['id'])


if __name__ == '__main__':
    main()
