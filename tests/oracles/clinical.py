"""CRPO's reward of a text once more, letter by letter and slowly, from the words of its rules (arXiv 2512.00601)."""

import string


def reward(text: str, answer: str, question: str, mode: str) -> dict[str, float]:
    """accuracy, reasoning, consistency and total."""
    if mode == "paper_code":
        text = cleaned(text)
    accuracy, reasoning = (paper, code)[mode == "paper_code"](text, answer, question)
    consistency = effective(text)
    total = 10 * accuracy + reasoning + consistency / 2
    return {"accuracy": accuracy, "reasoning": reasoning, "consistency": consistency, "total": total}


def effective(text: str) -> float:
    allowed = string.ascii_letters + string.digits + string.punctuation + " \n"
    return sum(letter in allowed for letter in text) / len(text) if text else 0.0


def places(text: str, what: str) -> list[int]:
    """Where it begins, without overlap."""
    found, i = [], 0
    while i <= len(text) - len(what):
        if text[i : i + len(what)] == what:
            found.append(i)
            i += len(what)
        else:
            i += 1
    return found


def paper(text: str, answer: str, question: str) -> tuple[float, float]:
    boxes = places(text, "\\boxed")
    right = False
    if len(boxes) == 1 and text[boxes[0] + 6 : boxes[0] + 7] == "{":
        inside, closed = "", False
        for letter in text[boxes[0] + 7 :]:
            if letter == "}":
                closed = True
                break
            inside += letter
        right = closed and inside.strip() == answer
    tags = [places(text, tag) for tag in ("<dx>", "</dx>", "<conclusion>", "</conclusion>")]
    if any(len(tag) != 1 for tag in tags):
        return float(right), 0.0
    (a,), (b,), (c,), (d,) = tags
    if not a < b < c < d or text[b + 5 : c].strip():
        return float(right), 0.0
    dx, conclusion = text[a + 4 : b], text[c + 12 : d]
    first = labels(dx, "System 1")
    if not first or not any(second > first[0] for second in labels(dx, "System 2")):
        return float(right), 0.0
    return float(right), 1.5 if refers(dx, conclusion, question) else 1.0


def labels(text: str, label: str) -> list[int]:
    """Places of a label that no further digit follows."""
    return [i for i in places(text, label) if not text[i + len(label) : i + len(label) + 1].isdecimal()]


def unlabelled(text: str) -> str:
    for label in ("System 1", "System 2"):
        for i in labels(text, label):
            text = text[:i] + " " * len(label) + text[i + len(label) :]
    return text


def refers(dx: str, conclusion: str, question: str) -> bool:
    if len(conclusion.strip()) > 0.6 * len(dx.strip()) + 1e-9:
        return False
    if even(conclusion) in even(dx):
        return False
    shared = {term for term in content(unlabelled(conclusion)) if term in runs(unboxed(unlabelled(dx)))}
    if len(shared) < 2:
        return False
    return not question.strip() or any(term in content(question) for term in shared)


def unboxed(text: str) -> str:
    """Without \\boxed and the braces directly behind it, where they hold no others."""
    out, i = "", 0
    while i < len(text):
        if text[i : i + 6] != "\\boxed":
            out, i = out + text[i], i + 1
            continue
        i += 6
        if text[i : i + 1] == "{":
            inside = text[i + 1 :].split("}")[0]
            if "}" in text[i + 1 :] and "{" not in inside:
                i += len(inside) + 2
        out += " "
    return out


def even(text: str) -> str:
    return " ".join(unboxed(text).casefold().split())


def runs(text: str) -> list[str]:
    found = [""]
    for letter in text.casefold():
        if letter.isalnum():
            found[-1] += letter
        elif found[-1]:
            found.append("")
    return [run for run in found if run]


def content(text: str) -> set[str]:
    from rlalign.rewards.clinical.text import STOP_WORDS  # a table, no rule

    digit = lambda word: any(not letter.isalpha() for letter in word)
    return {w for w in runs(unboxed(text)) if digit(w) or (len(w) >= 4 and w not in STOP_WORDS)}


def cleaned(text: str) -> str:
    text = text.split("<|im_end|>")[0].strip()
    return text.replace("<\\think>", "</think>").replace("<\\answer>", "</answer>")


def code(text: str, answer: str, question: str) -> tuple[float, float]:
    boxes = places(text, "\\boxed")
    if len(boxes) != 1:
        accuracy = -float(len(boxes)) if boxes else 0.0
    else:
        behind = text[boxes[0] + 6 :].split("\n")[0]
        if not behind.startswith("{") or "}" not in behind:
            accuracy = -1.0
        else:
            inside = behind[1:].split("}")[0]
            accuracy = float(inside == answer) if len(inside) == 1 and inside in string.ascii_uppercase else -0.5
    return accuracy, code_format(text)


def code_format(text: str) -> float:
    if not text.startswith("<think>") or not text.endswith("</answer>"):
        return 0.0
    for i in places(text, "</think>"):
        rest = text[i + 8 :].lstrip()
        if i >= 7 and rest.startswith("<answer>") and len(rest) >= len("<answer></answer>"):
            said = rest[len("<answer>") : -len("</answer>")].strip()
            boxes, left = [], said
            while "\\boxed{" in left:
                left = left[left.index("\\boxed{") :]
                line = left.split("\n")[0]
                if "}" in line:
                    boxes.append(line[: line.index("}") + 1])
                    left = left[len(boxes[-1]) :]
                else:
                    left = left[len(line) :]
            return 1.5 if len(boxes) == 1 and boxes[0] != said else 1.0
    return 0.0
