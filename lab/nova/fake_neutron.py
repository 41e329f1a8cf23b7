"""fake_neutron.py PORT: the least Neutron that Nova needs for servers without networks: empty lists, no extensions."""

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
    if len(parts) == 2 or parts[1] == 'quotas':
        return 200, {parts[1].replace('-', '_'): []}
    return 404, {'NeutronError': {'type': 'NotFound', 'message': path, 'detail': ''}}


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
        self.give(404, {'NeutronError': {'type': 'NotFound', 'message': self.path, 'detail': ''}})

    def log_message(self, *args):
        pass


ThreadingHTTPServer(('127.0.0.1', PORT), Neutron).serve_forever()
