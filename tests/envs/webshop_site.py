"""A server that answers as WebShop's does, for a catalogue of four products: its routes, its marks, its habits.

Facts of princeton-nlp/WebShop's web_agent_site (app.py and templates/): what leads where, which ids and classes a page
has, that it forgets a search's words that begin with "<", redirects a search, and tells a goal by its session's name.
"""

import ast
import contextlib
import html
import http.server
import threading
import urllib.parse

PRODUCTS = {  # number -> title, price, options
    "B0RED1": ("Soft Red Shirt", 20, {"size": ["small", "large"], "color": ["red", "red | blue"]}),
    "B0BLU2": ("Blue Shirt & Tie", 30, {}),
    "B0MUG3": ("Mug <small>", 5, {"color": ["white"]}),
    "B0RED4": ("Red Mug", 7, {}),
}
GOALS = [  # instruction, product, options
    ("Find me a soft red shirt with size: large, and price lower than 25 dollars", "B0RED1", {"size": "large"}),
    ("Find me a red mug, and price lower than 10 dollars", "B0RED4", {}),
]
PAGE = 2  # products a page


def address(*parts):
    return "/" + "/".join(urllib.parse.quote(str(part), safe="") for part in parts)


def button(text, *parts):
    action = html.escape(address(*parts))
    return f'<form method="post" action="{action}"><button type="submit" class="btn btn-lg">{text}</button></form>'


class Site(http.server.BaseHTTPRequestHandler):
    """One request. `server.fails`: how many more are answered with status 500; `server.asked`: paths so far."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.answer(dict(urllib.parse.parse_qsl(body)))

    def answer(self, form):
        self.server.asked.append(self.path)
        if self.server.fails:
            self.server.fails -= 1
            return self.send(500, "a fault")
        if self.server.page is not None:
            return self.send(200, self.server.page)
        kind, *rest = [urllib.parse.unquote(part) for part in self.path.strip("/").split("/")]
        pages = {"search_results": self.results, "item_page": self.item, "item_sub_page": self.sub, "done": self.done}
        if kind in pages:
            return self.send(200, pages[kind](*rest))
        if "search_query" in form:
            self.send_response(302)
            words = form["search_query"].lower().split(" ")
            self.send_header("Location", address("search_results", kind, words, 1))
            return self.end_headers()
        return self.send(200, self.start(kind))

    def send(self, status, text):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def frame(self, session, inside, query=""):
        asked = html.escape(GOALS[int(session.split("_")[-1])][0])
        query = f"<h4>Current Query: {html.escape(str(query))}</h4>" if query else ""
        return f"""<!DOCTYPE html><html><head><title>WebShop</title><script>if (1 < 2) {{}}</script></head><body>
          <!-- a comment --><div id="instruction-text"><h4>Instruction: <br>{asked}</h4>{query}</div>
          {inside}<script>let options = JSON.parse(`{{}}`);</script></body></html>"""

    def start(self, session):
        return self.frame(
            session,
            f"""<form id="form-buscar" method="post" action="{address(session)}">
            <input id="search_input" type="text" name="search_query" required/>
            <button class="btn btn-success" type="submit"><i class="glyphicon"></i>Search</button></form>""",
        )

    def results(self, session, words, page):
        keywords, page = ast.literal_eval(words), int(page)
        found = [n for n, (title, *_) in PRODUCTS.items() if any(word in title.lower().split() for word in keywords)]
        shown = found[(page - 1) * PAGE : page * PAGE]

        def link(number):
            return html.escape(address("item_page", session, number, words, page, {}))

        items = "".join(
            f"""<div><img src="x"><h4><a class="product-link" href="{link(n)}">{n}</a></h4>
            <h4 class="product-title">{html.escape(PRODUCTS[n][0])}</h5><h5>${PRODUCTS[n][1]}</h6></div>"""
            for n in shown
        )
        moves = button("Back to Search", session)
        moves += button("&lt; Prev", "search_results", session, words, page - 1) if page > 1 else ""
        moves += button("Next &gt;", "search_results", session, words, page + 1) if page * PAGE < len(found) else ""
        head = f"<p>Page {page} of {len(found)} total results</p>"
        return self.frame(session, head + moves + items, " ".join(keywords))

    def item(self, session, number, words, page, options):
        title, price, offered = PRODUCTS[number]
        chosen, rest = ast.literal_eval(options), (number, words, page)
        radios = "".join(
            f"""<h4>{name}</h4><input type="radio" name="{name}" value="{value}"
            data-url="{html.escape(address("item_page", session, *rest, {**chosen, name: value}))}">
            <label>{value}</label>"""
            for name, values in offered.items()
            for value in values
        )
        moves = button("Back to Search", session) + button("&lt; Prev", "search_results", session, words, page)
        more = button("Description", "item_sub_page", session, *rest, "Description", chosen)
        buy = button("Buy Now", "done", session, number, chosen)
        return self.frame(session, f"{moves}{radios}<h2>{html.escape(title)}</h2>Price: ${price}{more}{buy}", words)

    def sub(self, session, number, words, page, _kind, options):
        back = button("&lt; Prev", "item_page", session, number, words, page, options)
        return self.frame(session, button("Back to Search", session) + back + "<p>No Description</p>", words)

    def done(self, session, number, options):
        _, wanted, needed = GOALS[int(session.split("_")[-1])]
        right = [number == wanted] + [ast.literal_eval(options).get(name) == value for name, value in needed.items()]
        score = sum(right) / len(right) if right[0] else 0.0
        return f"""<html><body><div id="thankyou"><h1>Thank you for shopping with us!</h1></div><div id="stats">
          <h3>Your code: </h3><p><pre>SECRET</pre> (Paste it.)</p><div style="display:none"><h4 id="asin">asin
          <pre>{wanted}</pre></p></div><h3 id="reward">Your score (min 0.0, max 1.0)<pre>{score}</pre></h3>
          <h4 hidden>Details<div id="reward_info"><pre>secret</pre></div></h4></div></body></html>"""


@contextlib.contextmanager
def serving():
    """The server, on a free port of 127.0.0.1; its address is `url`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.url, server.fails, server.asked, server.page = f"http://127.0.0.1:{server.server_port}", 0, [], None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
