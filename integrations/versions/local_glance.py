"""A real Glance on loopback, of the release that this Python has: sqlite, images as files, known tokens.

And the daemon's part of a hand-over (docs/explanation/handover.md), played by the test.
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
BIN = os.path.dirname(sys.executable)

#: A token of each kind of user (glance_app.py).
TENANT, SERVICE = 'tenant', 'service'

#: Seconds for anything that is waited for. What is waited for takes a second or two; the machine may be busy.
PATIENCE = 120

CONFIGURATION = """
[DEFAULT]
enabled_backends = files:file, web:http
show_multiple_locations = {show_multiple_locations}
show_image_direct_url = true
transport_url = fake:/
log_file = {folder}/glance.log
worker_self_reference_url = {url}
[glance_store]
default_backend = files
[files]
filesystem_store_datadir = {folder}/images
[os_glance_staging_store]
filesystem_store_datadir = {folder}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {folder}/tasks
[database]
connection = sqlite:///{folder}/glance.sqlite
[paste_deploy]
config_file = {folder}/glance-api-paste.ini
[oslo_concurrency]
lock_path = {folder}/locks
[wsgi]
task_pool_threads = 1
[import_filtering_opts]
allowed_hosts = [127.0.0.1]
allowed_ports = []
"""

PASTE = """
[composite:glance-api]
paste.composite_factory = glance.api:root_app_factory
/: api
[pipeline:api]
pipeline = versionnegotiation context rootapp
[composite:rootapp]
paste.composite_factory = glance.api:root_app_factory
/: apiversions
/v2: apiv2app
[app:apiversions]
paste.app_factory = glance.api.versions:create_resource
[app:apiv2app]
paste.app_factory = glance.api.v2.router:API.factory
[filter:versionnegotiation]
paste.filter_factory = glance.api.middleware.version_negotiation:VersionNegotiationFilter.factory
[filter:context]
paste.filter_factory = glance.api.middleware.context:ContextMiddleware.factory
"""


def eventually(look, what):
    """What `look` returns once that is true."""
    until = time.monotonic() + PATIENCE
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() >= until:
            raise AssertionError('waited %s s for this in vain: %s' % (PATIENCE, what))
        time.sleep(0.1)


class Answer:
    def __init__(self, response):
        self.status = response.status
        self.data = response.read()

    @property
    def json(self):
        return json.loads(self.data)


class Glance:
    """`stop` ends it and removes its data."""

    def __init__(self, show_multiple_locations=False):
        self.folder = tempfile.mkdtemp(prefix='glance-')
        # made here and inherited, so no other program can take the port
        listener = socket.create_server(('127.0.0.1', 0))
        self.port = listener.getsockname()[1]
        self.url = 'http://127.0.0.1:%s' % self.port
        self._ended = os.path.join(self.folder, 'ended-tokens')
        self._write('ended-tokens', '')
        self._write('glance-api-paste.ini', PASTE)
        self._write('glance-api.conf', CONFIGURATION.format(
            folder=self.folder, url=self.url, show_multiple_locations=show_multiple_locations))
        environment = dict(os.environ, OS_GLANCE_CONFIG_DIR=self.folder, ENDED_TOKENS=self._ended, HOME=self.folder)
        with open(os.path.join(self.folder, 'output'), 'w') as output:
            subprocess.run([os.path.join(BIN, 'glance-manage'), '--config-file',
                            os.path.join(self.folder, 'glance-api.conf'), 'db_sync'],
                           env=environment, stdout=output, stderr=output, check=True)
            # one request at a time: two that write at once meet in a locked sqlite
            self._process = subprocess.Popen(
                [os.path.join(BIN, 'gunicorn'), '--chdir', HERE, '--bind', 'fd://%s' % listener.fileno(),
                 '--workers', '1', '--timeout', '120', 'glance_app:application'],
                env=environment, stdout=output, stderr=output, pass_fds=[listener.fileno()])
        listener.close()
        try:
            eventually(self._answers, 'Glance answers')
        except AssertionError:
            log = self.log()
            self.stop()
            raise AssertionError('Glance does not start:\n' + log)

    def _write(self, name, text):
        with open(os.path.join(self.folder, name), 'w') as file:
            file.write(text)

    def _answers(self):
        if self._process.poll() is not None:
            raise AssertionError('Glance has ended')
        try:
            return self.call('GET', '/v2/schemas/image').status == 200
        except OSError:
            return False

    def log(self):
        text = ''
        for name in ('output', 'glance.log'):
            path = os.path.join(self.folder, name)
            if os.path.exists(path):
                with open(path) as file:
                    text += file.read()[-20000:]
        return text

    def stop(self):
        self._process.terminate()
        self._process.wait(PATIENCE)
        shutil.rmtree(self.folder)

    def end_token(self, token):
        self._write('ended-tokens', token)

    def renew_tokens(self):
        self._write('ended-tokens', '')

    def call(self, method, path, body=None, token=SERVICE, kind='application/json', as_service=False):
        """`as_service`: with the token as that of a service too."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=PATIENCE)
        try:
            headers = {'X-Auth-Token': token}
            if as_service:
                headers['X-Service-Token'] = token
            if body is not None:
                headers['Content-Type'] = kind
            connection.request(method, path, body, headers)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def patch(self, image, operations, token=SERVICE):
        return self.call('PATCH', '/v2/images/' + image, operations, token,
                         'application/openstack-images-v2.1-json-patch')

    def must(self, wanted, answer):
        if answer.status != wanted:
            raise AssertionError('%s and not %s: %s\n%s' % (answer.status, wanted, answer.data, self.log()))
        return answer

    def create_image(self, token=TENANT, **attributes):
        return self.must(201, self.call('POST', '/v2/images', dict(attributes, name='image'), token)).json['id']

    def image(self, image):
        """Its record; None where there is none."""
        answer = self.call('GET', '/v2/images/' + image)
        return None if answer.status == 404 else self.must(200, answer).json

    def upload(self, image, data):
        self.must(204, self.call('PUT', '/v2/images/%s/file' % image, data, kind='application/octet-stream'))

    def download(self, image):
        return self.must(200, self.call('GET', '/v2/images/%s/file' % image)).data


class Daemon(threading.Thread):
    """The daemon's part for one image, in a thread: `part` is one of the methods below, with its arguments.

    In a process that eventlet has patched, this is a green thread: it runs while the service waits only if the wait
    lets others run.
    """

    #: What it publishes.
    DATA = b'copied inside the cluster' * 40

    def __init__(self, glance, image, part, *arguments):
        super().__init__(daemon=True)
        self._glance, self._image, self._part, self._arguments = glance, image, part, arguments
        self._error = None
        #: the offer that was on the record
        self.offer = None
        self.start()

    def run(self):
        try:
            self._part(self, *self._arguments)
        except BaseException as error:
            self._error = error

    def done(self):
        """Waits for its end, and raises what it has met."""
        self.join(PATIENCE)
        if self._error:
            raise self._error
        assert not self.is_alive()

    def publish(self, data=DATA):
        self._take()
        self._finish(data)

    def publish_after(self, other, data=DATA):
        """`other`: another image's Daemon."""
        self._take()
        other.done()
        self._finish(data)

    def publish_after_the_token_has_ended(self, token, data=DATA):
        self._take()
        self._glance.end_token(token)
        self._finish(data)

    def decline(self, message='the disk is elsewhere'):
        self._take()
        self._show('declined', message=message)
        self._glance.must(204, self._glance.call('DELETE', self._tag_path(self.offer)))

    def delete_the_image(self):
        self._take()
        self._glance.must(204, self._glance.call('DELETE', '/v2/images/' + self._image))

    def _take(self):
        self.offer = eventually(lambda: self._tag('rbd-offload-handover:'), 'the offer')
        self._show('copying', '50')

    def _finish(self, data):
        self._show('publishing', '100')
        eventually(lambda: self._tag('rbd-offload-handover:go'), 'go')
        record = self._glance.image(self._image)
        tags = [tag for tag in record['tags'] if not tag.startswith('rbd-offload-handover:')]
        operations = [{'op': 'remove', 'path': '/' + name} for name in record if name.startswith('rbd_offload_')]
        operations.append({'op': 'replace', 'path': '/tags', 'value': tags})
        self._glance.must(200, self._glance.patch(self._image, operations))
        self._glance.upload(self._image, data)

    def _tag(self, start):
        record = self._glance.image(self._image)
        return next((tag for tag in (record or {}).get('tags', ()) if tag.startswith(start)), None)

    def _tag_path(self, tag):
        return '/v2/images/%s/tags/%s' % (self._image, tag)

    def _show(self, status, progress=None, message=None):
        values = {'status': status, 'progress': progress, 'message': message}
        self._glance.must(200, self._glance.patch(self._image, [
            {'op': 'add', 'path': '/rbd_offload_' + name, 'value': value} for name, value in values.items() if value]))
