"""What an iteration needs of its reference, found once and kept on disk: generated answers and log-probs.

    iterations/0/00000064.npz       examples 64 to 64 + prepare_size of the first iteration

The reference of an iteration is the policy that it begins with. It answers the prompts of demonstrations, gives the
log-probs of both answers, and is then needed no more: no second model is held while the policy learns, and no epoch
computes a log-prob of it again. Each file names what it was made from (a hash of the reference's parameters, the
examples and the settings), so that a run that is continued takes what belongs to it and finds the rest anew.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rlalign import hosts
from rlalign.algorithms import Algorithm
from rlalign.io.canary import Canary
from rlalign.io.config import OfflineConfig
from rlalign.io.files import write_atomic
from rlalign.models.decoder import Decoder
from rlalign.train.mesh import row_shards
from rlalign.train.offline import RESPONSES, pack_examples
from rlalign.train.score import make_scorer
from rlalign.types import Demonstration, Params, Preference, StopReason

CHECKSUM = 8  # hexadecimal digits of a CRC-32
Examples = Sequence[Demonstration | Preference]


class Prepared(NamedTuple):
    """The examples of an iteration as they are learnt from, by their number.

    Attributes:
      examples: number -> example; of demonstrations, with the generated answer as the rejected one.
      ref_logp: number -> f[k, R] of its k responses; empty where the algorithm needs none.
      stop: number -> StopReason of the generated answer; empty where none was.
    """

    examples: dict[int, Demonstration | Preference]
    ref_logp: dict[int, np.ndarray]
    stop: dict[int, int]

    def pair(self, number: int) -> Preference:
        """An example that was answered: the demonstration and the answer."""
        found = self.examples[number]
        assert isinstance(found, Preference)
        return found


class Iterations:
    """Prepares the examples of iterations, from the files of earlier attempts where they fit.

    Args:
      config: the run.
      folder: created with the first file.
      decoder, algorithm, mesh, sampler: of the run.
      response_length: R.
      canary: looks at the answers; `alarms` counts what it finds.
    """

    def __init__(
        self,
        config: OfflineConfig,
        folder: Path,
        decoder: Decoder,
        algorithm: Algorithm,
        *,
        response_length: int,
        mesh: Mesh | None,
        sampler: Callable,
        canary: Canary | None = None,
    ):
        self.config, self.folder, self.decoder, self.mesh, self.sampler = config, folder, decoder, mesh, sampler
        self.response_length = response_length
        self.score = None
        if algorithm.needs_reference:
            self.score = make_scorer(decoder, temperature=algorithm.temperature, mesh=mesh)
        self.canary = canary
        generation = config.generation
        # Else the sampler's log-probs are not to be the reference's.
        self.comparable = generation is not None and generation.temperature == algorithm.temperature
        self.forwards = self.alarms = 0

    def prepare(
        self, number: int, examples: Examples, chosen: Sequence[int], reference: str, params: Callable[[], Params]
    ) -> Prepared:
        """The iteration's `chosen` examples.

        Args:
          number: of the iteration.
          examples: of the run.
          chosen: which of them the iteration sees.
          reference: hash of the reference's parameters.
          params: gives those parameters; called where a file is missing or made from something else.

        Returns:
          Prepared; self.forwards counts how many packed batches the reference has scored since the run began.
        """
        done = Prepared({}, {}, {})
        if self.config.generation is None and self.score is None:
            return done._replace(examples={i: examples[i] for i in chosen})
        for first in range(0, len(chosen), self.config.prepare_size):
            block = list(chosen[first : first + self.config.prepare_size])
            path = self.folder / str(number) / f"{block[0]:08d}.npz"
            made_from = self._made_from(number, [examples[i] for i in block], block, reference)
            found = _read(path, made_from)
            if hosts.agree(found is None):  # so that all processes find it anew together
                found = self._find(number, [examples[i] for i in block], block, params())
                if hosts.first():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _write(path, made_from, found)
            assert found is not None
            self._take(done, block, examples, found)
        hosts.wait_for_all("prepared")
        return done

    def _find(self, number: int, examples: Examples, block: list[int], params: Params) -> dict[str, np.ndarray]:
        """Arrays of a block: token i32[n, R'], length and stop i32[n] of generated answers, ref_logp f[n, k, R]."""
        found: dict[str, np.ndarray] = {}
        rollouts = None
        if self.config.generation is not None:
            rollouts = self.sampler(
                self.decoder,
                params,
                [example.prompt for example in examples],
                seed=self.config.seed,
                step=number,
                config=self.config.generation,
                prompt_ids=block,  # not the prompts' own ids: two demonstrations of one prompt get two answers
                mesh=self.mesh,
            )
            found = {"token": rollouts.tokens, "length": rollouts.mask.sum(axis=1), "stop": rollouts.stop}
        if self.score is not None:
            learnt = [_example(e, found, k) for k, e in enumerate(examples)]
            parts, length = row_shards(self.mesh), self.response_length
            packed = pack_examples(learnt, row_length=self.config.row_length, parts=parts, response_length=length)
            logp = self.score(params, packed)
            self.forwards += 1
            found["ref_logp"] = logp.reshape(len(examples), -1, length)
        if self.canary is not None and rollouts is not None:
            logp = found["ref_logp"][:, 1, : rollouts.tokens.shape[1]] if self.score and self.comparable else None
            self.alarms += len(self.canary.answers(prompt_ids=block, rollouts=rollouts, logp=logp))
        return found

    def _take(self, done: Prepared, block: list[int], examples: Examples, found: dict[str, np.ndarray]) -> None:
        for k, i in enumerate(block):
            done.examples[i] = _example(examples[i], found, k)
            if "ref_logp" in found:
                done.ref_logp[i] = found["ref_logp"][k]
            if "stop" in found:
                done.stop[i] = int(found["stop"][k])

    def _made_from(self, number: int, examples: Examples, block: list[int], reference: str) -> str:
        settings = [number, self.config.seed, repr(self.config.generation), self.response_length, reference, block]
        settings += [repr(self.decoder.config), self.score is not None]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(tokens_sha256(examples).encode())
        return digest.hexdigest()


def _example(example: Any, found: dict[str, np.ndarray], k: int) -> Any:
    if "token" not in found:
        return example
    return Preference(example.prompt, example.response, found["token"][k, : found["length"][k]])


def tokens_sha256(examples: Examples) -> str:
    """Hash of every prompt and response, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for tokens in (example.prompt, *(getattr(example, name) for name in RESPONSES[type(example)])):
            digest.update(np.asarray(tokens, np.int64).tobytes() + b"|")
    return digest.hexdigest()


def is_truncated(prepared: Prepared, number: int) -> bool:
    """Whether the example's generated answer has no end."""
    return prepared.stop.get(number) == StopReason.MAX_TOKENS


def _write(path: Path, made_from: str, arrays: dict[str, np.ndarray]) -> None:
    """The arrays in a zip file whose comment, its last bytes, is a checksum of all before: one write, any reader."""
    buffer = io.BytesIO()
    np.savez(buffer, made_from=np.array(made_from), **jax.device_get(arrays))
    with zipfile.ZipFile(buffer, "a") as file:
        file.comment = bytes(CHECKSUM)  # its length is in the bytes before it
    content = buffer.getvalue()[:-CHECKSUM]
    write_atomic(path, content + _checksum(content))


def _read(path: Path, made_from: str) -> dict[str, np.ndarray] | None:
    """None where the file is absent, cannot be read, is not what was written, or was made from something else."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    # Compared first: the checksums of a zip file cover the arrays, and not their names or where they are.
    if content[-CHECKSUM:] != _checksum(content[:-CHECKSUM]):
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = dict(file)
    return arrays if str(arrays.pop("made_from", "")) == made_from else None


def _checksum(content: bytes) -> bytes:
    return b"%0*x" % (CHECKSUM, zlib.crc32(content))
