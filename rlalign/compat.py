"""What differs between JAX releases, and what is read from its internals, in one place. Supported: 0.10, 0.11, 0.12."""

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Programs that XLA compiled in this process since the counter was made."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        self.count += event == _COMPILE_EVENT

    def take(self) -> int:
        """The count since the last call."""
        count, self.count = self.count, 0
        return count
