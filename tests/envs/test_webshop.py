"""WebShop's adapter against a small server that answers as WebShop's."""

import re
import socket
import threading
import time

import pytest

from rlalign.envs.protocol import Info
from rlalign.envs.webshop import WebShop
from tests.envs.webshop_site import serving


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture
def world(server):
    server.fails, server.page = 0, None
    server.asked.clear()
    return WebShop(server.url, goals=2)


def done(world, *actions):
    for action in actions:
        last = world.step(action)
        assert last.info.valid, action
    return last


def test_an_episode(world):
    seen = world.reset(2)  # goal 0
    assert seen.task == "Find me a soft red shirt with size: large, and price lower than 25 dollars"
    assert seen.text == "Search [SEP] Search with search[words]."
    assert seen.admissible == ()
    seen = done(world, "search[red shirt]").observation
    assert seen.text == (
        "Current Query: red shirt [SEP] Page 1 of 3 total results [SEP] Back to Search [SEP] Next > [SEP] "
        "B0RED1 [SEP] Soft Red Shirt [SEP] $20 [SEP] B0BLU2 [SEP] Blue Shirt & Tie [SEP] $30"
    )
    assert seen.admissible == ("click[back to search]", "click[next >]", "click[b0red1]", "click[b0blu2]")
    seen = done(world, "click[next >]").observation
    assert seen.admissible == ("click[back to search]", "click[< prev]", "click[b0red4]")
    seen = done(world, "Click[< Prev]", "click[B0RED1]").observation
    assert seen.admissible[2:] == (
        *("click[small]", "click[large]", "click[red]", "click[red | blue]", "click[description]", "click[buy now]"),
    )
    seen = done(world, "click[large]", "click[red | blue]").observation
    assert seen.text.startswith("You have clicked red | blue. [SEP] You have clicked large. [SEP] Current Query:")
    assert "No Description" in done(world, "click[description]").observation.text
    assert done(world, "click[< prev]").observation == seen
    last = done(world, "click[buy now]")
    assert last.observation.text == "Thank you for shopping with us! [SEP] Your score (min 0.0, max 1.0) [SEP] 1.0"
    assert last[1:] == (10.0, True, False, Info(won=True, score=1.0))
    assert last.observation.admissible == ()
    with pytest.raises(RuntimeError, match="after the end of the episode: call reset"):
        world.step("search[mug]")


def test_half_a_purchase_scores_without_reward(world):
    world.reset(0)
    last = done(world, "search[shirt]", "click[b0red1]", "click[small]", "click[buy now]")
    assert last[1:] == (0.0, True, False, Info(won=False, score=0.5))


def test_the_anchor_is_the_state(world, server):
    other = WebShop(server.url, goals=2)
    world.reset(0), other.reset(0)
    one = done(world, "search[red]", "click[b0red1]", "click[large]", "click[red]").observation
    same = done(other, "search[red]", "click[b0red1]", "click[red]", "click[small]", "click[large]").observation
    assert one == same
    here = done(world, "click[description]").observation
    there = done(other, "click[back to search]", "search[blue]", "click[b0blu2]", "click[description]").observation
    assert here.anchor != there.anchor
    assert done(other, "click[< prev]").observation.anchor != there.anchor


@pytest.mark.parametrize(
    "action",
    [
        *("", "buy", "look[mug]", "search[]", "search[ ]", "search[<r>]", "search[<c> mug]", f"search[{'a' * 201}]"),
        *("click[buy now]", "click[search]", "search[a]\nsearch[b]"),
    ],
)
def test_what_the_page_does_not_offer_changes_nothing(world, server, action):
    seen = world.reset(0)
    asked = len(server.asked)
    assert world.step(action) == (seen, 0.0, False, False, Info(valid=False))
    assert len(server.asked) == asked


def test_no_search_away_from_the_search_page(world):
    world.reset(0)
    done(world, "search[mug]")
    assert not world.step("search[shirt]").info.valid


def test_odd_words_reach_the_server(world, server):
    world.reset(1)
    assert WebShop(server.url, goals=1, first=1).reset(5) == world.reset(3)
    seen = done(world, "search[Mug/cup it's \"5% 'off'\" #1 ?ü ]]").observation
    assert seen.text.startswith("Current Query: mug cup it's \"5% 'off'\" #1 ?ü ] [SEP] Page 1 of 2")


def test_the_horizon(server):
    world = WebShop(server.url, goals=1, horizon=2)
    world.reset(0)
    assert not world.step("nothing").truncated
    assert world.step("search[mug]").truncated
    with pytest.raises(RuntimeError, match="call reset"):
        world.step("click[b0mug3]")


def test_a_fault_is_asked_about_again(world, server):
    world.reset(0)
    server.fails = 2
    assert done(world, "search[mug]").observation.text.startswith("Current Query: mug")
    server.fails = 3
    with pytest.raises(RuntimeError, match=r"no page of .*item_page.* status 500; is WebShop running there"):
        world.step("click[b0mug3]")
    with pytest.raises(RuntimeError, match="call reset"):
        world.step("click[b0mug3]")


def test_other_servers(world, server):
    server.page = "<html><body>Welcome</body></html>"
    with pytest.raises(RuntimeError, match="shows no instruction: is a WebShop server at"):
        world.reset(0)
    server.page = (
        '<div id="instruction-text">Instruction: go</div><a class="product-link" href="http://127.0.0.2/">out</a>'
    )
    assert world.reset(0).admissible == ("click[out]",)
    with pytest.raises(RuntimeError, match=r"leads to http://127\.0\.0\.2/, which is another server's"):
        world.step("click[out]")
    server.page = '<h3 id="reward"><pre>much</pre></h3>'
    with pytest.raises(RuntimeError, match="gives the score 'much', not a number"):
        world.reset(0)
    server.page = "a" * (1 << 22) + "a"
    with pytest.raises(RuntimeError, match="a page of more than 4194304 bytes"):
        world.reset(0)


def test_a_server_that_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match=r"no page of .* in 0\.3 s: .*timed out"):
            WebShop(url, seconds=0.3).reset(0)
        assert time.monotonic() - begun < 5
    with pytest.raises(RuntimeError, match="refused; is WebShop running there"):
        WebShop(url, seconds=5).reset(0)


def test_a_server_that_drips():
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def drip():
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                while not stop.wait(0.05):
                    connection.sendall(b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(RuntimeError, match="came too slowly"):
                WebShop(f"http://127.0.0.1:{server.getsockname()[1]}", seconds=0.3, attempts=1).reset(0)
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "127.0.0.1:3000"}, "url is '127.0.0.1:3000': give the server's address, such as http://127"),
        ({"url": "file:///etc/passwd"}, "url is 'file:///etc/passwd'"),
        ({"goals": 0}, "goals is 0, first is 0: must be at least 1, and at least 0"),
        ({"session": "mine"}, "session is 'mine': WebShop knows a goal by a name such as 'fixed_{goal}'"),
        ({"attempts": 0}, "attempts is 0, seconds is 30.0: must be at least 1, and above 0"),
        ({"seconds": 0}, "attempts is 3, seconds is 0"),
        ({"horizon": 0}, "WebShop: horizon is 0, must be at least 1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WebShop(**arguments)


def test_seeds(world):
    with pytest.raises(ValueError, match=r"WebShop\.reset: seed is -1, must be at least 0"):
        world.reset(-1)
    with pytest.raises(RuntimeError, match="before reset: call reset"):
        world.step("search[mug]")
