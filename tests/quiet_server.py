"""The base of the HTTP servers that stand in for others in tests."""

import sys
from http.server import ThreadingHTTPServer


class QuietServer(ThreadingHTTPServer):
    """Does not report clients that have gone, and answers nothing once it is closed.

    Otherwise a report may end up in the output of a later test.
    """

    daemon_threads = False

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
