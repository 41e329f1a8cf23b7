"""Glance's own WSGI application, with known tokens in place of Keystone. gunicorn loads it (local_glance.py).

A token is ended by its name in the file $ENDED_TOKENS: Glance answers 401 from then on.
"""

import os

from glance.common import wsgi_app

#: token: user, project, roles
TOKENS = {
    'tenant': ('tenant', 'project', 'member,reader'),
    'other-tenant': ('other-tenant', 'other-project', 'member,reader'),
    'service': ('service', 'service', 'admin,member,reader,service'),
}


class Identified:
    """Does what keystonemiddleware's `authtoken` does."""

    def __init__(self, application):
        self._application = application

    def __call__(self, environ, start_response):
        token = environ.get('HTTP_X_AUTH_TOKEN')
        if token not in TOKENS or token in self._ended():
            start_response('401 Unauthorized', [('Content-Type', 'text/plain'), ('Content-Length', '0')])
            return [b'']
        user, project, roles = TOKENS[token]
        environ.update(HTTP_X_IDENTITY_STATUS='Confirmed', HTTP_X_USER_ID=user, HTTP_X_PROJECT_ID=project,
                       HTTP_X_ROLES=roles)
        service_token = environ.get('HTTP_X_SERVICE_TOKEN')
        if service_token in TOKENS:
            environ['HTTP_X_SERVICE_ROLES'] = TOKENS[service_token][2]
        return self._application(environ, start_response)

    @staticmethod
    def _ended():
        with open(os.environ['ENDED_TOKENS']) as names:
            return names.read().split()


application = Identified(wsgi_app.init_app())
