"""Advantages of a group of responses to one prompt. A group is a list of row numbers."""

import math

import numpy as np


def rows_of(group, number, valid):
    return [i for i in range(len(group)) if group[i] == number and valid[i]]


def group_relative(reward, group, *, num_groups, valid, scale="std", ddof=1, eps=1e-6):
    """GRPO: A_i = (r_i - mean) / (std + eps); Dr. GRPO: A_i = r_i - mean."""
    out = np.zeros(len(reward))
    for number in range(num_groups):
        rows = rows_of(group, number, valid)
        values = [float(reward[i]) for i in rows]
        if any(math.isnan(v) for v in values):
            out[rows] = math.nan
        elif len(set(values)) > 1:
            mean = sum(values) / len(values)
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - ddof))
            for i, v in zip(rows, values, strict=True):
                out[i] = (v - mean) / (deviation + eps) if scale == "std" else v - mean
    return out


def leave_one_out(reward, group, *, num_groups, valid):
    """RLOO: A_i = r_i - the mean of the others of its group."""
    out = np.zeros(len(reward))
    for number in range(num_groups):
        rows = rows_of(group, number, valid)
        values = [float(reward[i]) for i in rows]
        if any(math.isnan(v) for v in values):
            out[rows] = math.nan
        elif len(set(values)) > 1:
            for i in rows:
                others = [float(reward[j]) for j in rows if j != i]
                out[i] = float(reward[i]) - sum(others) / len(others)
    return out


def group_preference(reward, group, *, num_groups, valid, weight=None):
    """GPRS: B_j = 1/K sum_i w_i 1[r_j >= r_i], A_j = B_j - mean B; eq. 7 (w = 1) and eq. 10."""
    out = np.zeros(len(reward))
    for number in range(num_groups):
        rows = rows_of(group, number, valid)
        if any(math.isnan(reward[i]) for i in rows):
            out[rows] = math.nan
            continue
        credit = {}
        for j in rows:
            credit[j] = 0.0
            for i in rows:
                if reward[j] >= reward[i]:
                    credit[j] += (1.0 if weight is None else float(weight[i])) / len(rows)
        for j in rows:
            out[j] = credit[j] - sum(credit.values()) / len(rows)
    return out


def everyone(valid, size):
    return [True] * size if valid is None else valid


def remax(reward, group, *, baseline, num_groups, valid=None):
    """ReMax: A_i = r_i - the reward of its group's greedy response."""
    valid, out = everyone(valid, len(reward)), np.zeros(len(reward))
    for number in range(num_groups):
        rows = rows_of(group, number, valid)
        bad = any(math.isnan(reward[i]) for i in rows)
        for i in rows:
            out[i] = math.nan if bad else float(reward[i]) - float(baseline[number])
    return out


def per_objective(reward, group, *, terms, term_weight, num_groups, valid=None, scale="std", ddof=1, eps=1e-6):
    """A = sum_c term_weight_c GRPO(terms_c): each term normalised, then summed."""
    valid, out = everyone(valid, len(terms)), np.zeros(len(terms))
    for c in range(len(term_weight)):
        term = [float(row[c]) for row in terms]
        part = group_relative(term, group, num_groups=num_groups, valid=valid, scale=scale, ddof=ddof, eps=eps)
        for i in range(len(terms)):
            if valid[i]:
                out[i] += float(term_weight[c]) * part[i]
    return out


def term_spread(terms, group, *, num_groups, valid=None):
    """The deviation of each term within a group of two or more, averaged over such groups."""
    valid, out = everyone(valid, len(terms)), []
    for c in range(np.shape(terms)[1]):
        deviations = []
        for number in range(num_groups):
            values = [float(terms[i][c]) for i in rows_of(group, number, valid)]
            if len(values) > 1:
                mean = sum(values) / len(values)
                deviations.append(math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)))
        out.append(sum(deviations) / max(len(deviations), 1))
    return np.array(out)


def informative_groups(reward, group, *, num_groups, valid=None):
    """DAPO keeps a group whose rewards are not all equal."""
    valid, out = everyone(valid, len(reward)), np.zeros(num_groups, bool)
    for number in range(num_groups):
        values = [float(reward[i]) for i in rows_of(group, number, valid)]
        out[number] = len(set(values)) > 1 and not any(math.isnan(v) for v in values)
    return out


def overlong_penalty(length, *, max_length, cache):
    """DAPO eq. 13: 0, then a line from 0 down to -1 over the last `cache` tokens, then -1."""
    out = np.zeros(len(length))
    for i in range(len(length)):
        tokens = int(length[i])
        if tokens > max_length:
            out[i] = -1.0
        elif tokens > max_length - cache:
            out[i] = (max_length - cache - tokens) / cache
    return out
