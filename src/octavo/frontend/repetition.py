"""RepetitionDetector: finds outputs that repeat the same few tokens over and over."""

from octavo.params import RepetitionDetectionParams


class RepetitionDetector:
    """Follows one output, and detects that it ends with a pattern that occurs `min_count` times in a row.

    The last tokens are c occurrences of a pattern of p tokens exactly if each of the last (c - 1)p tokens equals the
    one p places before it. So the number of such tokens is counted for each p.
    """

    def __init__(self, params: RepetitionDetectionParams):
        sizes = range(max(params.min_pattern_size, 1), params.max_pattern_size + 1)
        self._equal = dict.fromkeys(sizes, 0)  # by p: last tokens that equal the one p places before
        self._repetitions = params.min_count - 1

    def push(self, tokens: list[int]) -> bool:
        """Take in the last one of `tokens`, the output so far. Return whether the output repeats itself."""
        last, length, found = tokens[-1], len(tokens), False
        for size, count in self._equal.items():
            if size >= length:
                break
            self._equal[size] = count = count + 1 if tokens[-1 - size] == last else 0
            found = found or count >= size * self._repetitions
        return found
