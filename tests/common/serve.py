"""Runs the requests of the tests, one JSON line each, in processes of their own.

Loading the bindings of Ceph takes longer than most requests. So they are loaded once, and each request runs in a fork
of that process. The fork makes its own connection: librados has threads, which a fork does not inherit.
"""

import json
import os
import sys
import traceback

import rados
import rbd


def connect(conf, keyring):
    """A connection as the cluster's administrator."""
    cluster = rados.Rados(conffile=conf, name='client.admin', conf=dict(keyring=keyring, rbd_cache='false'))
    cluster.connect()
    return cluster


def serve(run):
    """Calls `run` with each request. Answers with a line of two numbers, the exit status (0: success) and a length, and
    then with as many bytes: the request's standard output, or its standard error after a failure."""
    for line in sys.stdin.buffer:
        output, errors = os.memfd_create('output'), os.memfd_create('errors')
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(output, 1)
                os.dup2(errors, 2)
                run(json.loads(line))
                sys.stdout.flush()
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                # without the end of the interpreter, in which librados may still be at work
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        written = errors if status else output
        os.lseek(written, 0, os.SEEK_SET)
        with open(written, 'rb') as file:
            said = file.read()
        os.close(output if status else errors)
        sys.stdout.buffer.write(b'%d %d\n' % (status, len(said)) + said)
        sys.stdout.buffer.flush()
