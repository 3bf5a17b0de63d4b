"""The rules of retention in plain loops and float64: what the fast code must equal, to the token.

Slow on purpose, one Python list per head and row, every step scored when it happens. Imports nothing of the package.
"""

from __future__ import annotations

import math
import struct


class AmbiguousError(Exception):
    """Two scores at the cut are closer than float32 can tell apart, so either choice is right."""


class ReferenceHead:
    """One KV head of one row: which visual tokens it holds, and what attention over them gives.

    score: "sum", "mean", "last", "margin", "leverage" or "learned", what a semantic head ranks its tokens by;
    columns: of the grid;
    learned: for "learned", lists of floats: key, value, row (by row of the next token, and of the token), column (by
    rows between them, and column of the token).
    """

    def __init__(self, kind, num_slots, num_cells, buffer, num_recent, num_sinks, score="sum", columns=1, learned=None):
        self.evicts_by_score = kind == "semantic" and num_slots < num_cells
        self.num_slots = num_slots
        self.buffer = min(buffer, num_slots)
        self.num_recent = num_recent
        self.num_sinks = num_sinks if num_slots < num_cells else 0
        self.score, self.columns, self.learned = score, columns, learned
        self.has_chosen = False  # whether a score has decided which tokens stay
        self.kept = []
        self.received = []  # one dict a step: visual token -> weight
        self.keys, self.values = [], []  # of every visual token that ever arrived

    def score_of(self, token, arrived):
        """The score of a visual token when `arrived` of them had arrived and as many queries had been made."""
        if self.score == "margin":
            return 1.0 if token % self.columns in (0, self.columns - 1) else 0.0
        if self.score == "leverage":
            return leverage(self.keys[token], [self.keys[kept] for kept in self.kept])
        if self.score == "learned":
            key, value, row, column = self.learned
            now, stands = (min(number // self.columns, len(row) - 1) for number in (arrived, token))
            held = sum(weight * number for weight, number in zip(key, self.keys[token], strict=True))
            held += sum(weight * number for weight, number in zip(value, self.values[token], strict=True))
            return held + row[now][stands] + column[now - stands][token % self.columns]
        first = max(0, arrived - self.buffer) if self.score == "last" else token
        received = sum(self.received[query].get(token, 0.0) for query in range(first, arrived))
        return received / (arrived - token) if self.score == "mean" else received

    def _evict(self):
        arrived = len(self.keys)
        if self.evicts_by_score:
            score = {token: self.score_of(token, arrived) for token in self.kept}
            candidates = [token for token in self.kept if self.num_sinks <= token < arrived - self.num_recent]
            ranked = sorted(candidates, key=lambda token: (score[token], token))
            self.has_chosen |= len(ranked) > self.buffer
            if len(ranked) > self.buffer and self.score != "margin":  # whole numbers are never ambiguous
                last, spared = score[ranked[self.buffer - 1]], score[ranked[self.buffer]]
                if spared - last < (1e-4 if self.score == "leverage" else 1e-5) * max(1.0, abs(spared)):
                    raise AmbiguousError
        else:
            ranked = sorted(token for token in self.kept if token >= self.num_sinks)
        for token in ranked[: self.buffer]:
            self.kept.remove(token)

    def step(self, queries, key, value, prompt_keys, prompt_values, prompt_seen, scaling):
        """Take in one visual token and return the attention output of each of its query heads.

        queries: one list of floats per query head of this KV head; key, value: lists of floats;
        prompt_keys, prompt_values: lists of them; prompt_seen: False on padding.
        """
        if len(self.kept) == self.num_slots:
            self._evict()
        token = len(self.keys)
        self.keys.append(key)
        self.values.append(value)
        self.kept.append(token)
        self.received.append({})
        outputs = []
        for query in queries:
            logits, seen_values, tokens = [], [], []
            for prompt_key, prompt_value, seen in zip(prompt_keys, prompt_values, prompt_seen, strict=True):
                if seen:
                    logits.append(scaling * sum(a * b for a, b in zip(query, prompt_key, strict=True)))
                    seen_values.append(prompt_value)
                    tokens.append(None)
            for kept in self.kept:
                logits.append(scaling * sum(a * b for a, b in zip(query, self.keys[kept], strict=True)))
                seen_values.append(self.values[kept])
                tokens.append(kept)
            highest = max(logits)
            weights = [math.exp(logit - highest) for logit in logits]
            total = sum(weights)
            weights = [weight / total for weight in weights]
            for weight, kept in zip(weights, tokens, strict=True):
                if kept is not None:
                    self.received[token][kept] = self.received[token].get(kept, 0.0) + weight
            outputs.append(
                [sum(w * v[d] for w, v in zip(weights, seen_values, strict=True)) for d in range(len(seen_values[0]))]
            )
        return outputs


def eight_bits(numbers, kv_dtype):
    """Codes and scale of one token's key or value, a list of floats, and what they stand for; float32 arithmetic."""
    largest = {"int8": 127, "fp8": 448}[kv_dtype]
    scale = max(single(max(abs(number) for number in numbers) / largest), 2.0**-126)
    if kv_dtype == "int8":
        codes = [round(single(number / scale)) for number in numbers]  # of two as near, the even one, as Python does
        held = [float(code) for code in codes]
    else:
        codes = [float8_code(single(number / scale)) for number in numbers]
        held = [float8(code) for code in codes]
    return codes, scale, [single(number * scale) for number in held]


def single(number):
    """The nearest float32."""
    return struct.unpack("f", struct.pack("f", number))[0]


def float8(bits):
    """The float8_e4m3fn of these bits, 0 to 255 without 127 and 255: a sign, 4 bits of exponent, 3 of mantissa."""
    sign, exponent, mantissa = -1.0 if bits & 128 else 1.0, (bits >> 3) & 15, bits & 7
    return sign * ((1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6)


def float8_code(number):
    """The bits of the nearest one; of two as near, that with the even mantissa, and zero keeps its sign."""
    size = abs(number)
    bits = min(range(127), key=lambda bits: (abs(float8(bits) - size), bits & 1))
    return bits | (128 if math.copysign(1.0, number) < 0 else 0)


def leverage(key, keys, ridge=0.1):
    """Squared distance of a key from the mean of `keys`, in units of their variance; `ridge` is in mean variances."""
    size = range(len(key))
    mean = [sum(other[i] for other in keys) / len(keys) for i in size]
    centred = [[other[i] - mean[i] for i in size] for other in keys]
    spread = [[sum(other[i] * other[j] for other in centred) / len(keys) for j in size] for i in size]
    least = ridge * max(sum(spread[i][i] for i in size) / len(key), 1e-12)
    away = [key[i] - mean[i] for i in size]
    rows = [[*(spread[i][j] + least * (i == j) for j in size), away[i]] for i in size]
    for i in size:  # Gaussian elimination; the matrix is positive definite, so no pivoting
        for j in range(i + 1, len(key)):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [low - factor * high for low, high in zip(rows[j], rows[i], strict=True)]
    solution = [0.0] * len(key)
    for i in reversed(size):
        rest = sum(rows[i][j] * solution[j] for j in range(i + 1, len(key)))
        solution[i] = (rows[i][-1] - rest) / rows[i][i]
    return sum(one * other for one, other in zip(away, solution, strict=True))
