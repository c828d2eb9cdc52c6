"""Two patients, written in each format by hand with the exact headers; names and the like are planted in every file."""

import csv
import gzip
import json

import numpy as np

CANARY = "Canary"  # of every name, number and note that must appear nowhere
WALL = "-04:00"

PATIENTS = [("10001", "F", 1970), ("10002", "M", 1950)]
VISITS = [
    ("10001", "20001", "2180-05-06T22:23:00", "2180-05-08T17:15:00"),
    ("10002", "20002", "2154-01-02T03:04:05", "2154-01-03T00:00:00"),
]
DIAGNOSES = [("10001", "20001", "10", "E11.9"), ("10001", "20001", "9", "401.9"), ("10002", "20002", "10", "J44.1")]
LABS = [  # subject, visit, time, item, LOINC, value, unit, as MIMIC has it, low, high, flag
    ("10001", "20001", "2180-05-06T23:00:00", "50912", "2160-0", 1.4, "mg/dL", "mg/dL", 0.4, 1.1, "A"),
    ("10001", "20001", "2180-05-06T23:00:00", "51265", "777-3", 213, "10*3/uL", "K/uL", 150, 440, ""),
    ("10001", "", "2181-01-01T08:00:00", "51222", "718-7", 13.4, "g/dL", "g/dL", 12, 16, ""),
    ("10002", "20002", "2154-01-02T04:00:00", "51003", "10839-9", "<0.01", "ng/mL", "ng/mL", None, None, ""),
    ("10002", "20002", "2154-01-02T04:00:00", "51463", None, "NEG", "", " ", None, None, ""),
]
LOINC = {item: code for *_, item, code, _, _, _, _, _, _ in LABS if code}
LOCAL = ("mimic-labitem", "51463")  # what the user's map leaves out


def number(value):
    return value if isinstance(value, int | float) else None


def table(path, header, rows, packed):
    """A CSV file; columns that rows lack are filled with what must not be seen."""
    names = header.split(",")
    with gzip.open(f"{path}.gz", "wt", newline="") if packed else open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            assert set(row) <= set(names), set(row) - set(names)
            writer.writerow(["" if row.get(n, CANARY) is None else row.get(n, f'{CANARY} "{n}",\n') for n in names])


MIMIC = {
    "patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admit_provider_id,"
    "admission_location,discharge_location,insurance,language,marital_status,race,edregtime,edouttime,"
    "hospital_expire_flag",
    "diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    "labevents": "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,charttime,storetime,value,"
    "valuenum,valueuom,ref_range_lower,ref_range_upper,flag,priority,comments",
}


def write_mimic(folder, packed=True):
    when = lambda text: text.replace("T", " ")
    content = {
        "patients": [
            {"subject_id": s, "gender": g, "anchor_age": 52, "anchor_year": year + 52} for s, g, year in PATIENTS
        ],
        "admissions": [
            {"subject_id": s, "hadm_id": v, "admittime": when(a), "dischtime": when(d)} for s, v, a, d in VISITS
        ],
        "diagnoses_icd": [
            {"subject_id": s, "hadm_id": v, "seq_num": 1, "icd_code": c.replace(".", ""), "icd_version": version}
            for s, v, version, c in DIAGNOSES
        ],
        "labevents": [
            {
                "subject_id": s,
                "hadm_id": v,
                "itemid": item,
                "charttime": when(time),
                "valueuom": unit,
                "value": value,
                "valuenum": 0.01 if value == "<0.01" else number(value),
                "ref_range_lower": low,
                "ref_range_upper": high,
                "flag": {"A": "abnormal"}.get(flag),
            }
            for s, v, time, item, _, value, _, unit, low, high, flag in LABS
        ],
    }
    for name, rows in content.items():
        table(folder / f"{name}.csv", MIMIC[name], rows, packed)


SYNTHEA = {
    "patients": "Id,BIRTHDATE,DEATHDATE,SSN,DRIVERS,PASSPORT,PREFIX,FIRST,MIDDLE,LAST,SUFFIX,MAIDEN,MARITAL,RACE,"
    "ETHNICITY,GENDER,BIRTHPLACE,ADDRESS,CITY,STATE,COUNTY,FIPS,ZIP,LAT,LON,HEALTHCARE_EXPENSES,"
    "HEALTHCARE_COVERAGE,INCOME",
    "encounters": "Id,START,STOP,PATIENT,ORGANIZATION,PROVIDER,PAYER,ENCOUNTERCLASS,CODE,DESCRIPTION,"
    "BASE_ENCOUNTER_COST,TOTAL_CLAIM_COST,PAYER_COVERAGE,REASONCODE,REASONDESCRIPTION",
    "conditions": "START,STOP,PATIENT,ENCOUNTER,SYSTEM,CODE,DESCRIPTION",
    "observations": "DATE,PATIENT,ENCOUNTER,CATEGORY,CODE,DESCRIPTION,VALUE,UNITS,TYPE",
}


def write_synthea(folder, packed=False):
    end = {visit: until for _, visit, _, until in VISITS}
    system = {"10": "http://hl7.org/fhir/sid/icd-10-cm", "9": "http://hl7.org/fhir/sid/icd-9-cm"}
    content = {
        "patients": [{"Id": s, "BIRTHDATE": f"{year}-01-01", "GENDER": g} for s, g, year in PATIENTS],
        "encounters": [{"Id": v, "START": a + "Z", "STOP": d + "Z", "PATIENT": s} for s, v, a, d in VISITS],
        "conditions": [
            {"START": end[v] + "Z", "PATIENT": s, "ENCOUNTER": v, "SYSTEM": system[version], "CODE": c}
            for s, v, version, c in DIAGNOSES
        ],
        "observations": [
            {
                "DATE": time + "Z",
                "PATIENT": s,
                "ENCOUNTER": v,
                "CODE": code,
                "VALUE": value,
                "UNITS": unit,
                "TYPE": "text" if number(value) is None else "numeric",
            }
            for s, v, time, _, code, value, unit, *_ in LABS
            if code
        ],
    }
    for name, rows in content.items():
        table(folder / f"{name}.csv", SYNTHEA[name], rows, packed)


OMOP = {
    "person": "person_id,gender_concept_id,year_of_birth,month_of_birth,day_of_birth,birth_datetime,race_concept_id,"
    "ethnicity_concept_id,location_id,provider_id,care_site_id,person_source_value,gender_source_value,"
    "gender_source_concept_id,race_source_value,race_source_concept_id,ethnicity_source_value,"
    "ethnicity_source_concept_id",
    "visit_occurrence": "visit_occurrence_id,person_id,visit_concept_id,visit_start_date,visit_start_datetime,"
    "visit_end_date,visit_end_datetime,visit_type_concept_id,provider_id,care_site_id,visit_source_value,"
    "visit_source_concept_id,admitted_from_concept_id,admitted_from_source_value,discharged_to_concept_id,"
    "discharged_to_source_value,preceding_visit_occurrence_id",
    "condition_occurrence": "condition_occurrence_id,person_id,condition_concept_id,condition_start_date,"
    "condition_start_datetime,condition_end_date,condition_end_datetime,condition_type_concept_id,"
    "condition_status_concept_id,stop_reason,provider_id,visit_occurrence_id,visit_detail_id,condition_source_value,"
    "condition_source_concept_id,condition_status_source_value",
    "measurement": "measurement_id,person_id,measurement_concept_id,measurement_date,measurement_datetime,"
    "measurement_time,measurement_type_concept_id,operator_concept_id,value_as_number,value_as_concept_id,"
    "unit_concept_id,range_low,range_high,provider_id,visit_occurrence_id,visit_detail_id,measurement_source_value,"
    "measurement_source_concept_id,unit_source_value,unit_source_concept_id,value_source_value",
    "concept": "concept_id,concept_name,domain_id,vocabulary_id,concept_class_id,standard_concept,concept_code,"
    "valid_start_date,valid_end_date,invalid_reason",
}


def write_omop(folder, packed=False):
    end = {visit: until for _, visit, _, until in VISITS}
    coded = [("ICD10CM" if version == "10" else "ICD9CM", code) for _, _, version, code in DIAGNOSES]
    coded += [("LOINC", code) for code in LOINC.values()]
    ids = {code: str(3000 + i) for i, (_, code) in enumerate(coded)}
    content = {
        "person": [
            {"person_id": s, "gender_concept_id": {"F": 8532, "M": 8507}[g], "year_of_birth": year}
            | {"month_of_birth": 1, "day_of_birth": None}
            for s, g, year in PATIENTS
        ],
        "visit_occurrence": [
            {"visit_occurrence_id": v, "person_id": s, "visit_start_date": a[:10], "visit_start_datetime": a}
            | {"visit_end_date": d[:10], "visit_end_datetime": None if d.endswith("00:00:00") else d}
            for s, v, a, d in VISITS
        ],
        "condition_occurrence": [
            {"person_id": s, "condition_concept_id": 201826, "condition_start_date": end[v][:10]}
            | {"condition_start_datetime": end[v], "visit_occurrence_id": v, "condition_source_concept_id": ids[code]}
            for s, v, _, code in DIAGNOSES
        ],
        "measurement": [
            {"person_id": s, "measurement_concept_id": ids.get(code, 0), "measurement_date": time[:10]}
            | {"measurement_datetime": time, "operator_concept_id": 4171756 if value == "<0.01" else 4172703}
            | {"value_as_number": 0.01 if value == "<0.01" else number(value), "range_low": low, "range_high": high}
            | {"visit_occurrence_id": v, "measurement_source_concept_id": 0, "unit_source_value": unit}
            for s, v, time, _, code, value, _, unit, low, high, _ in LABS
        ],
        "concept": [
            {"concept_id": ids[code], "vocabulary_id": vocabulary, "concept_code": code} for vocabulary, code in coded
        ]
        + [{"concept_id": "201826", "vocabulary_id": "Something", "concept_code": "x"}],
    }
    for name, rows in content.items():
        table(folder / f"{name}.csv", OMOP[name], rows, packed)


def concept(system, code):
    return {"coding": [{"system": system, "code": code, "display": CANARY}], "text": CANARY}


def fhir_resources(reference="{kind}/{id}"):
    """The resources, in an order that has what refers before what it refers to."""
    to = lambda kind, name: {"reference": reference.format(kind=kind, id=name), "display": CANARY}
    mimic = "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-"
    for s, v, time, item, code, value, unit, shown, low, high, flag in LABS:
        found = {
            "resourceType": "Observation",
            "id": f"{CANARY}-{item}",
            "status": "final",
            "subject": to("Patient", s),
        }
        found |= {"note": [{"text": CANARY}], "effectiveDateTime": time + WALL}
        found["code"] = concept("http://loinc.org", code) if code else concept(mimic + "d-labitems", item)
        if v:
            found["encounter"] = to("Encounter", v)
        quantity = {"unit": shown, "system": "http://unitsofmeasure.org", "code": unit}
        if number(value) is not None:
            found["valueQuantity"] = {"value": value, **quantity}
        elif value == "<0.01":
            found["valueQuantity"] = {"value": 0.01, "comparator": "<", **quantity}
        else:
            found["valueString"] = f"{value} {CANARY}"
        if low is not None:
            found["referenceRange"] = [{"low": {"value": low}, "high": {"value": high, "unit": shown}, "text": CANARY}]
        if flag:
            interpretation = "http://terminology.hl7.org/CodeSystem/v3-ObservationInterpretation"
            found["interpretation"] = [concept(interpretation, flag)]
        yield found
    for s, v, version, code in DIAGNOSES:
        system = f"{mimic}diagnosis-icd9" if version == "9" else "http://hl7.org/fhir/sid/icd-10-cm"
        coding = [{"system": "http://snomed.info/sct", "code": "44054006"}, *concept(system, code)["coding"]]
        yield {
            "resourceType": "Condition",
            "id": CANARY,
            "subject": to("Patient", s),
            "encounter": to("Encounter", v),
        } | {
            "code": {"coding": coding, "text": CANARY},
            "verificationStatus": concept("http://terminology.hl7.org/CodeSystem/condition-ver-status", "confirmed"),
        }
    for s, v, start, end in VISITS:
        yield {"resourceType": "Encounter", "id": v, "status": "finished", "class": {"code": "IMP"}} | {
            "subject": to("Patient", s),
            "period": {"start": start + WALL, "end": end + WALL},
        }
    for s, g, year in PATIENTS:
        yield {
            "resourceType": "Patient",
            "id": s,
            "gender": {"F": "female", "M": "male"}[g],
            "birthDate": str(year),
        } | {
            "name": [{"family": CANARY, "given": [CANARY]}],
            "identifier": [{"value": CANARY}],
            "address": [{"line": [CANARY]}],
            "text": {"div": f"<div>{CANARY}</div>"},
        }
    yield {"resourceType": "Medication", "id": CANARY}


def write_ndjson(folder, packed=True):
    """One file a kind of resource, as bulk exports have them."""
    kinds = {}
    for resource in fhir_resources():
        kinds.setdefault(resource["resourceType"], []).append(json.dumps(resource) + "\n")
    for kind, texts in kinds.items():
        text = "\n".join(texts).encode()  # blank lines are no records
        path = folder / f"Mimic{kind}.ndjson"
        (path.with_name(path.name + ".gz") if packed else path).write_bytes(gzip.compress(text) if packed else text)


def write_bundle(folder, packed=False):
    """One Bundle, whose references are urn:uuid, in many lines."""
    uuid = "urn:uuid:{kind}-{id}"
    entries = [
        {"fullUrl": uuid.format(kind=r["resourceType"], id=r["id"]), "resource": r, "request": {"method": "POST"}}
        for r in fhir_resources(uuid)
    ]
    bundle = {"resourceType": "Bundle", "type": "transaction", "entry": [*entries, {"fullUrl": CANARY}]}
    text = json.dumps(bundle, indent=1).encode()
    name = "bundle.json.gz" if packed else "bundle.json"
    (folder / name).write_bytes(gzip.compress(text) if packed else text)


def meds_rows():
    """(subject_id, time, code, numeric_value, hadm_id, unit, low, high, flag), as MIMIC-IV in MEDS has them."""
    nothing = (None,) * 4
    end = {visit: until for _, visit, _, until in VISITS}
    for s, g, year in PATIENTS:
        yield int(s), f"{year}-01-01", "MEDS_BIRTH", None, None, *nothing
        yield int(s), None, f"GENDER//{g}", None, None, *nothing
    for s, v, start, stop in VISITS:
        yield int(s), start, "HOSPITAL_ADMISSION//EW EMER.//EMERGENCY ROOM", None, int(v), *nothing
        yield int(s), stop, "HOSPITAL_DISCHARGE//HOME", None, int(v), *nothing
        yield int(s), stop, f"TRANSFER_TO//{CANARY}", None, int(v), *nothing
    for s, v, version, code in DIAGNOSES:
        text = f"DIAGNOSIS//ICD//{version}//{code.replace('.', '')}"
        yield int(s), end[v], text, None, int(v), *nothing
    for s, v, time, item, _, value, _, unit, low, high, flag in LABS:
        code = f"LAB//{item}//{unit.strip() or 'UNK'}"
        flag = {"A": "abnormal"}.get(flag)
        yield int(s), time, code, number(value), int(v) if v else None, None, low, high, flag


def expected():
    """The events of all formats that keep ranges and flags."""
    at = lambda text: int(np.datetime64(text, "s").astype(int))
    end = {visit: until for _, visit, _, until in VISITS}
    for s, g, year in PATIENTS:
        yield s, at(f"{year}-01-01"), "", "person", "birth", None, "", None, None, ""
        yield s, None, "", "person", {"F": "sex/female", "M": "sex/male"}[g], None, "", None, None, ""
    for s, v, start, stop in VISITS:
        yield s, at(start), v, "visit", "start", None, "", None, None, ""
        yield s, at(stop), v, "visit", "end", None, "", None, None, ""
    for s, v, version, code in DIAGNOSES:
        yield s, at(end[v]), v, f"icd{version}", code.replace(".", ""), None, "", None, None, ""
    for s, v, time, _, code, value, unit, _, low, high, flag in LABS:
        yield s, at(time), v, *(("loinc", code) if code else LOCAL), number(value), unit, low, high, flag
