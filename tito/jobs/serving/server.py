"""Where the server listens, and how it comes to its end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import sys

import uvicorn

GRACE = 3.0  # seconds that running requests have to come to their end when the server is told to stop
CLOSE = 2.0  # and that their clients have to read the last of it


class Server(uvicorn.Server):
    """uvicorn with an application over an engine; one way through it, the same wherever it runs. It prints nothing.

    On Ctrl-C or SIGTERM it takes no more connections, and what runs has a while to come to its end.
    """

    def __init__(self, application, engine):
        super().__init__(uvicorn.Config(
            application, http="h11", loop="asyncio", ws="none", lifespan="off", log_config=None, log_level="critical",
            access_log=False, server_header=False, timeout_graceful_shutdown=GRACE + CLOSE,
        ))  # fmt: skip
        self.engine = engine
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # a warning would tell of each client that left

    async def startup(self, sockets=None) -> None:
        asyncio.get_running_loop().set_exception_handler(self.report)
        await super().startup(sockets)

    def report(self, loop, context: dict) -> None:
        """As asyncio does, but for a connection beyond what a process may have open: it waits until another ends.

        asyncio says that a thousand times a second, and again about its next try where the server stops before that.
        """
        if not (self.should_exit or getattr(context.get("exception"), "errno", None) in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)

    async def shutdown(self, sockets=None) -> None:
        timer = asyncio.get_running_loop().call_later(GRACE, self.engine.close)
        await super().shutdown(sockets)
        timer.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, or the end of the program with one sentence."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=512)
    except socket.gaierror as error:
        sys.exit(f"tito: there is no host {host!r}: {error.strerror}.")
    except UnicodeError:  # empty between two dots, or more than 63 letters
        sys.exit(f"tito: there is no host {host!r}: no host can have such a name.")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            sys.exit(f"tito: port {port} of {host} is in use already. Give another --port; 0 takes a free one.")
        sys.exit(f"tito: port {port} of {host} cannot be opened: {os.strerror(error.errno)}.")


def reachable(address: str) -> bool:
    """Can other machines reach this address?"""
    return not ipaddress.ip_address(address).is_loopback
