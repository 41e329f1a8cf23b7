"""fake_neutron.py PORT: the least Neutron that Nova needs for servers without networks.

It has empty lists, no extensions and no limits.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT = int(sys.argv[1])


def answer_to(path):
    """Status and body of a GET."""
    parts = path.split('?')[0].strip('/').split('/')
    if parts == ['']:
        link = {'rel': 'self', 'href': 'http://127.0.0.1:%d/v2.0/' % PORT}
        return 200, {'versions': [{'id': 'v2.0', 'status': 'CURRENT', 'links': [link]}]}
    if parts == ['v2.0']:
        return 200, {'resources': []}
    if len(parts) == 2:
        return 200, {parts[1].replace('-', '_'): []}
    if parts[1] == 'quotas':
        # no limit: Nova asks before it looks for networks
        return 200, {'quota': {'network': -1, 'port': -1}}
    if parts[1] == 'auto-allocated-topology':
        return 409, error('Conflict', 'there is no network to allocate')
    return 404, error('NotFound', path)


def error(kind, message):
    return {'NeutronError': {'type': kind, 'message': message, 'detail': ''}}


class Neutron(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def give(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.give(*answer_to(self.path))

    def do_DELETE(self):
        self.give(404, error('NotFound', self.path))

    def log_message(self, *args):
        pass


ThreadingHTTPServer(('127.0.0.1', PORT), Neutron).serve_forever()
