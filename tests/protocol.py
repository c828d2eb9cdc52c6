"""A server of OpenAI's protocol on this machine."""

import contextlib
import http.server
import json
import threading


@contextlib.contextmanager
def served(server):
    """Serves server.answer(body) at server.path; `asked`, `headers` and `failures` (codes to give first) are lists."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            code = server.failures.pop() if server.failures else 200
            found = self.path == server.path
            out = json.dumps(server.answer(body) if code == 200 and found else {"error": "told so"}).encode()
            self.send_response(code if found else 404)
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        server.url = f"http://localhost:{listener.server_port}/v1"
        yield server
        listener.shutdown()
