"""Stands in the place of a command: hands it to the warm server (warm.py) with its descriptors, ends as it ends."""

import array
import json
import os
import signal
import socket
import sys


def main() -> None:
    server = socket.socket(socket.AF_UNIX)
    server.connect(sys.argv[1])
    request = {"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
    text = json.dumps(request).encode()
    descriptors = array.array("i", [0, 1, 2])
    server.sendmsg([b"%d\n" % len(text)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    server.sendall(text)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda given, _: server.sendall(bytes([given])))
    code = int(server.recv(64) or b"1")
    if code < 0:
        if -code != signal.SIGKILL:  # it takes no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
