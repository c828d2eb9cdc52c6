"""Health records of the formats in which they are kept, as events: one small module a format.

    table = table_of(read_fhir(Path("export").glob("*.ndjson.gz")))
    table = table_of(read_mimic("mimic-iv/hosp", loinc={"50912": "2160-0"}))
    table = table_of(read_synthea("output/csv"))
    table = table_of(read_meds("meds/data"))                 # pip install "rlalign[clinical]"
    table = table_of(read_omop("omop"))

All are generators: a file of any size passes through as much memory as its largest record takes. The same content in
each format gives the same events. Units are spelled as UCUM has them, ICD codes without their dot. What a loader leaves
out, by design or with on_error="skip", is counted in the Counter `left_out`. A record that is broken is named by
file, line and field, never by what it holds.
"""

from rlalign.clinical.loaders.fhir import read_fhir
from rlalign.clinical.loaders.files import BadRecord
from rlalign.clinical.loaders.meds import read_meds
from rlalign.clinical.loaders.mimic import read_mimic
from rlalign.clinical.loaders.omop import read_omop
from rlalign.clinical.loaders.synthea import read_synthea

__all__ = ["BadRecord", "read_fhir", "read_meds", "read_mimic", "read_omop", "read_synthea"]
