"""Units of laboratory results: UCUM's, the ways in which records spell them, and conversions that a test allows."""

MASS, AMOUNT, COUNT, ACTIVITY, CHARGE = (
    "mass/volume",
    "amount/volume",
    "count/volume",
    "activity/volume",
    "charge/volume",
)

UNITS: dict[str, tuple[str, float, float]] = {  # unit -> (dimension, a, b): in the dimension's base it is a x + b
    **{unit: (MASS, a, 0.0) for unit, a in {"g/dL": 10.0, "g/L": 1.0, "mg/dL": 1e-2, "mg/L": 1e-3}.items()},
    **{unit: (MASS, a, 0.0) for unit, a in {"ug/dL": 1e-5, "ug/L": 1e-6, "ng/mL": 1e-6, "ug/mL": 1e-3}.items()},
    **{unit: (MASS, a, 0.0) for unit, a in {"ng/dL": 1e-8, "ng/L": 1e-9, "pg/mL": 1e-9, "mg/mL": 1.0}.items()},
    **{unit: (AMOUNT, a, 0.0) for unit, a in {"mol/L": 1.0, "mmol/L": 1e-3, "umol/L": 1e-6}.items()},
    **{unit: (AMOUNT, a, 0.0) for unit, a in {"nmol/L": 1e-9, "pmol/L": 1e-12}.items()},
    "meq/L": (CHARGE, 1e-3, 0.0),
    **{unit: (COUNT, a, 0.0) for unit, a in {"/uL": 1e6, "10*3/uL": 1e9, "10*9/L": 1e9}.items()},
    **{unit: (COUNT, a, 0.0) for unit, a in {"10*6/uL": 1e12, "10*12/L": 1e12, "/L": 1.0}.items()},
    **{unit: (ACTIVITY, a, 0.0) for unit, a in {"U/L": 1.0, "[IU]/L": 1.0, "ukat/L": 60.0}.items()},
    **{unit: ("hormone/volume", a, 0.0) for unit, a in {"m[IU]/L": 1.0, "u[IU]/mL": 1.0, "m[IU]/mL": 1e3}.items()},
    **{unit: ("fibrinogen equivalents", a, 0.0) for unit, a in {"ug/mL{FEU}": 1.0, "mg/L{FEU}": 1.0}.items()},
    **{unit: ("fibrinogen equivalents", a, 0.0) for unit, a in {"ng/mL{FEU}": 1e-3, "ug/L{FEU}": 1e-3}.items()},
    **{unit: ("fraction", a, 0.0) for unit, a in {"%": 0.01, "1": 1.0, "L/L": 1.0}.items()},
    **{unit: ("pressure", a, 0.0) for unit, a in {"mm[Hg]": 1.0, "kPa": 7.500617}.items()},
    **{unit: ("ratio of masses", a, 0.0) for unit, a in {"mg/g": 1.0, "ug/mg": 1.0, "mg/mmol": 8.840}.items()},
    "Cel": ("temperature", 1.0, 0.0),
    "[degF]": ("temperature", 5 / 9, -160 / 9),
    "[pH]": ("pH", 1.0, 0.0),
    "/min": ("rate", 1.0, 0.0),
    "mm/h": ("sedimentation", 1.0, 0.0),
    "kg/m2": ("mass/area", 1.0, 0.0),
    "mL/min/{1.73_m2}": ("filtration", 1.0, 0.0),
    "mmol/mol": ("HbA1c of IFCC", 1.0, 0.0),
}

_COUNTS = {  # powers of ten per volume -> UCUM; each is written in many ways
    ("3", "³", "ul mcl mm3 cumm"): "10*3/uL",
    ("6", "⁶", "ul mcl mm3 cumm"): "10*6/uL",
    ("9", "⁹", "l"): "10*9/L",
    ("12", "¹²", "l"): "10*12/L",
}
_SPELLINGS = {  # how else units are written, without their case and blanks -> UCUM
    **{unit.lower(): unit for unit in UNITS},
    **dict.fromkeys(("meq/l", "mequiv/l"), "meq/L"),
    **{
        f"{times}10{power}/{volume}": unit
        for (n, raised, volumes), unit in _COUNTS.items()
        for times in ("", "x")
        for power in (f"*{n}", f"^{n}", f"e{n}", f"({n})", raised)
        for volume in volumes.split()
    },
    **dict.fromkeys(("k/ul", "k/mcl", "k/mm3", "th/ul", "thou/ul", "thousand/ul"), "10*3/uL"),
    **dict.fromkeys(("k/cumm", "gpt/l"), "10*9/L"),
    **dict.fromkeys(("m/ul", "m/mcl", "mil/ul", "million/ul"), "10*6/uL"),
    **dict.fromkeys(("t/l", "tpt/l"), "10*12/L"),  # g/L is a mass: of G/L, 10*9/L, the case alone would tell
    **dict.fromkeys(("/mm3", "#/ul", "/cumm", "cells/ul", "{cells}/ul", "cells/mm3"), "/uL"),
    **dict.fromkeys(("iu/l", "units/l", "[iu]/l"), "U/L"),
    **dict.fromkeys(("miu/l", "mu/l", "uiu/ml", "uu/ml", "mciu/ml", "mc[iu]/ml"), "m[IU]/L"),
    **dict.fromkeys(("miu/ml", "mu/ml"), "m[IU]/mL"),
    **dict.fromkeys(("ugfeu/ml", "ug/mlfeu", "mg/lfeu", "ug/ml{feu}", "mcg/mlfeu"), "ug/mL{FEU}"),
    **dict.fromkeys(("ng/mlfeu", "ngfeu/ml", "ng/ml{feu}"), "ng/mL{FEU}"),
    **dict.fromkeys(("percent", "{percent}"), "%"),
    **dict.fromkeys(("mmhg", "torr"), "mm[Hg]"),
    **dict.fromkeys(("mg/gcreat", "mg/g{creat}", "mg/gcrt", "ug/mgcreat"), "mg/g"),
    **dict.fromkeys(("c", "degc", "°c", "celsius"), "Cel"),
    **dict.fromkeys(("f", "degf", "°f", "fahrenheit"), "[degF]"),
    **dict.fromkeys(("ph", "phunits"), "[pH]"),
    **dict.fromkeys(("bpm", "beats/min", "breaths/min", "{beats}/min", "{breaths}/min", "insp/min"), "/min"),
    **dict.fromkeys(("mm/hr", "mm/1h", "mm/hour"), "mm/h"),
    **dict.fromkeys(("kg/m^2", "kg/m²", "kg/sqm"), "kg/m2"),
    **dict.fromkeys(("ml/min/1.73m2", "ml/min/1.73m^2", "ml/min/1.73m²", "ml/min/1.73sqm"), "mL/min/{1.73_m2}"),
    **dict.fromkeys(("ml/min/{1.73_m2}", "ml/min/{1.73m2}", "ml/min/1.73"), "mL/min/{1.73_m2}"),
}
_GIVEN = {  # what a unit means for a test
    "2744-1": dict.fromkeys(("", "1", "units"), "[pH]"),
    "48065-7": {"ug/mL": "ug/mL{FEU}", "mg/L": "mg/L{FEU}", "ng/mL": "ng/mL{FEU}", "ug/L": "ug/L{FEU}"},
}

_MOLAR_MASS = {  # g/mol; of the atom, molecule or subunit that is counted
    **dict.fromkeys(("2345-7", "1558-6"), 180.156),  # glucose
    **dict.fromkeys(("2093-3", "2085-9", "13457-7"), 386.65),  # cholesterol
    "2571-8": 885.4,  # triolein
    "2160-0": 113.12,
    "3094-0": 28.014,  # the nitrogen of urea
    "3084-1": 168.11,
    "1975-2": 584.66,
    "3024-7": 776.87,
    "718-7": 16114.5,  # one chain of haemoglobin with its haem
    "2524-7": 90.08,
    "17861-6": 40.078,
    "2951-2": 22.990,
    "2823-3": 39.098,
    "2075-0": 35.45,
    "2028-9": 61.017,
}
_VALENCE = {"2951-2": 1, "2823-3": 1, "2075-0": 1, "2028-9": 1, "17861-6": 2}
NGSP = 0.09148, 2.152  # HbA1c in % = 0.09148 x IFCC in mmol/mol + 2.152


def canonical(unit: str) -> str:
    """The UCUM unit that a record's spelling stands for; the text as it is where it is unknown.

    >>> canonical("MG/DL"), canonical("K/uL"), canonical("mmHg"), canonical("furlongs")
    ('mg/dL', '10*3/uL', 'mm[Hg]', 'furlongs')
    """
    if unit in UNITS:
        return unit
    plain = "".join(unit.split()).lower().replace("µ", "u").replace("μ", "u").replace("×", "x")
    return _SPELLINGS.get(plain, _SPELLINGS.get(plain.replace("mcg", "ug"), unit))


def convert(value: float, unit: str, to: str, loinc: str) -> float | None:
    """A result in another unit; None where no conversion is known.

    Mass and amount of substance convert where the molar mass of what `loinc` measures is known, equivalents where its
    valence is, and HbA1c by NGSP's master equation. Twelve digits are kept, so that 0.8 mg/dL is 8 mg/L and no more.

    Args:
      value: in `unit`.
      unit: as a record spells it.
      to: a unit of UNITS.
      loinc: of the test.

    >>> round(convert(5.5, "mmol/L", "mg/dL", "2345-7"), 1), convert(98.6, "degF", "Cel", "8310-5")
    (99.1, 37.0)
    """
    unit = canonical(unit)
    unit = _GIVEN.get(loinc, {}).get(unit, unit)
    if unit == to:
        return value
    if unit not in UNITS:
        return None
    if (loinc, unit, to) == ("4548-4", "mmol/mol", "%"):
        return float(f"{NGSP[0] * value + NGSP[1]:.12g}")
    (here, a, b), (there, c, d) = UNITS[unit], UNITS[to]
    bridge = 1.0 if here == there else _factor(here, there, loinc)
    return None if bridge is None else float(f"{((a * value + b) * bridge - d) / c:.12g}")


def _factor(here: str, there: str, loinc: str) -> float | None:
    """From the base unit of a dimension to that of another."""
    mass, valence = _MOLAR_MASS.get(loinc), _VALENCE.get(loinc)
    in_moles = {AMOUNT: 1.0, MASS: mass and 1 / mass, CHARGE: valence and 1 / valence}
    first, last = in_moles.get(here), in_moles.get(there)
    return first / last if first and last else None
