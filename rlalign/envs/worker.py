"""The process in which copies of an environment live: processes.py starts this file as a script, nothing imports it.

    parent -> worker    {"module", "qualname", "file", "path", "arguments", ...}        once
    parent -> worker    [copy, "reset", seed] | [copy, "step", action] | [copy, "replay", [seed, action, ...]]
    worker -> parent    [copy, what it returned, or null, reason]                       copy -1: loaded

One request, one answer, JSON lines; nothing is unpickled. A copy that raised is made anew at its next reset or replay.
"""

import json
import os
import socket
import sys
from typing import Any


def serve(channel, life):
    """Makes copies by what the first line names, then answers one request after the other until the end."""
    requests = channel.makefile("rb")
    setup = json.loads(requests.readline())
    sys.path[:] = setup["path"]
    from rlalign.envs.worlds import close
    from rlalign.rewards.worker import LOADED, describe, die_with, load

    def send(copy, value=None, reason=""):
        channel.sendall(json.dumps([copy, value, reason]).encode() + b"\n")

    die_with(life)
    try:
        make: Any = load(setup["module"], setup["qualname"], setup["file"])
        worlds = {setup["first"]: make(**setup["arguments"])}  # to see that it can be made
    except BaseException as error:  # noqa: BLE001
        return send(LOADED, reason=describe(error))
    send(LOADED)
    for line in requests:
        copy, what, given = json.loads(line)
        try:
            if copy not in worlds:
                worlds[copy] = make(**setup["arguments"])
            send(copy, do(worlds[copy], what, given))
        # SystemExit and KeyboardInterrupt too: here they come from the environment.
        except BaseException as error:  # noqa: BLE001
            close(worlds.pop(copy, None))
            send(copy, reason=f"raised {describe(error)}")


def do(world, what, given):
    """What a request asks of a copy."""
    from rlalign.envs.protocol import as_observation, as_transition

    if what == "reset":
        return as_observation(world.reset(given))
    if what == "step":
        return as_transition(world.step(given))
    seed, *actions = given
    last = as_observation(world.reset(seed))
    for action in actions:
        last = as_transition(world.step(action))
    return last


def main():
    """Serves on the descriptors given as arguments, which no child inherits."""
    channel, life = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(channel, False)
    os.set_inheritable(life, False)
    serve(socket.socket(fileno=channel), life)


if __name__ == "__main__":
    main()
