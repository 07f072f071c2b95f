"""Split: divide requests among models by percent."""

from hashlib import blake2b

from .specs import SplitSpec


class Split:
    """Chooses a model for each request of a split, so that the shares hold exactly over any hundred requests or so.

    A sticky split chooses by a hash of its key instead: the same key always has the same model, and a change of the
    shares moves as few keys as possible.
    """

    def __init__(self, spec: SplitSpec):
        self.spec = spec
        self._credit = dict.fromkeys(spec.shares, 0.0)

    def choose(self, key: str | None = None) -> str:
        """Return the name of the model for a request.

        Args:
            key: the user or the request's id if the split is sticky; None if the request has none.
        """
        shares = self.spec.shares
        if key is not None:
            number = int.from_bytes(blake2b(f"{self.spec.name}\0{key}".encode(), digest_size=8).digest(), "big")
            point, end = number / 2**64 * 100, 0.0
            for name, share in shares.items():
                end += share
                if point < end:
                    return name
            return max(shares, key=lambda name: shares[name])
        for name, share in shares.items():
            self._credit[name] += share
        chosen = max(self._credit, key=lambda name: self._credit[name])
        self._credit[chosen] -= 100
        return chosen
