"""How fast FHIR is read, and in how much memory: MB/s and the peak of a process's own memory, on a file made here.

    python benchmarks/clinical_loading.py                # 1 GB of NDJSON, written to a temporary place and removed
    python benchmarks/clinical_loading.py --gb 0.05

`stream` consumes the events one by one, `table` keeps them as rlalign.clinical.events.table_of does. Each runs in a
process of its own, which imports no JAX. Nine of ten resources are observations, 700 bytes each, as hospitals write
them; every patient is invented.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import json, resource, sys, time
from rlalign.clinical.events import table_of
from rlalign.clinical.loaders import read_fhir
path, mode = sys.argv[1:]
before, used = time.perf_counter(), time.process_time()
events = read_fhir(path)
count = len(table_of(events)) if mode == "table" else sum(1 for _ in events)
seconds, cpu = time.perf_counter() - before, time.process_time() - used
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"events": count, "seconds": seconds, "cpu": cpu, "peak": peak}))
"""


def resources(rng: random.Random, patient: str):
    """One patient, with three visits of thirty results and three diagnoses each."""
    subject = {"reference": f"Patient/{patient}"}
    yield {"resourceType": "Patient", "id": patient, "gender": "female", "birthDate": "1960-05-04"}
    for number in range(3):
        visit, day = {"reference": f"Encounter/{patient}-{number}"}, f"20{10 + number}-0{rng.randrange(1, 10)}-11"
        stay = {"start": f"{day}T08:00:00-04:00", "end": f"{day}T18:00:00-04:00"}
        encounter = {"resourceType": "Encounter", "id": f"{patient}-{number}", "status": "finished"}
        yield encounter | {"subject": subject, "period": stay}
        for code in rng.sample(["E11.9", "I10", "J44.1", "I50.9", "E78.5", "N18.3"], 3):
            coding = [{"system": "http://hl7.org/fhir/sid/icd-10-cm", "code": code, "display": "a diagnosis"}]
            yield {"resourceType": "Condition", "subject": subject, "encounter": visit, "code": {"coding": coding}}
        for test in range(30):
            value = round(rng.gauss(14, 2), 1)
            coding = [{"system": "http://loinc.org", "code": f"{700 + test}-7", "display": "Hemoglobin in Blood"}]
            kind = {"system": "http://terminology.hl7.org/CodeSystem/observation-category", "code": "laboratory"}
            flag = {"system": "http://terminology.hl7.org/CodeSystem/v3-ObservationInterpretation", "code": "N"}
            unit = {"unit": "g/dL", "system": "http://unitsofmeasure.org", "code": "g/dL"}
            result = {"resourceType": "Observation", "id": f"{rng.getrandbits(128):032x}", "status": "final"}
            result |= {"category": [{"coding": [kind]}], "code": {"coding": coding}, "subject": subject}
            result |= {"encounter": visit, "effectiveDateTime": f"{day}T09:{test:02}:00-04:00"}
            result |= {"valueQuantity": {"value": value, **unit}, "interpretation": [{"coding": [flag]}]}
            yield result | {
                "referenceRange": [{end: {"value": x, **unit} for end, x in (("low", 12.0), ("high", 16.0))}]
            }


def write(path: Path, size: int) -> None:
    """At least `size` bytes of NDJSON: the same fifty histories again and again, of other patients each time."""
    rng, written = random.Random(0), 0
    block = "".join(
        json.dumps(resource) + "\n" for patient in range(50) for resource in resources(rng, f"COPY-{patient}")
    )
    with path.open("w") as file:
        for copy in itertools.count():
            written += file.write(block.replace("COPY-", f"{copy:06}-"))
            if written >= size:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export.ndjson"
        write(path, int(flags.gb * 1e9))
        size, found = path.stat().st_size, {}
        for mode in ("stream", "table"):
            script = f"import sys; sys.path[:0] = {sys.path!r}\n{RUN}"
            said = subprocess.run(
                [sys.executable, "-c", script, path, mode], check=True, capture_output=True, text=True
            )
            found[mode] = json.loads(said.stdout)
    rows = {
        mode: {
            "mb_per_second": round(size / 1e6 / row["seconds"], 1),
            "mb_per_cpu_second": round(size / 1e6 / row["cpu"], 1),
            "events": row["events"],
            "peak_mb": round(row["peak"] / 1e6, 1),
        }
        for mode, row in found.items()
    }
    print(json.dumps({"benchmark": "clinical_loading", "gb": round(size / 1e9, 3), **rows}))


if __name__ == "__main__":
    main()
