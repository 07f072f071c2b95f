"""Split: divide requests among models by percent."""

import math
from hashlib import blake2b

from .specs import SplitSpec


class Split:
    """Chooses a model for each request of a split, so that the shares hold exactly over any hundred requests or so.

    A sticky split chooses by weighted rendezvous hashing instead. With a hash u in (0, 1) of the split, the key and the
    model, it chooses the model with the greatest share / -ln(u). The same key always has the same model, whatever the
    order of the models, and a key changes its model only if that model's share falls or another one's rises.
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
            return max(shares, key=lambda name: shares[name] / -math.log(self._hash(name, key)))
        for name, share in shares.items():
            self._credit[name] += share
        chosen = max(self._credit, key=lambda name: self._credit[name])
        self._credit[chosen] -= 100
        return chosen

    def _hash(self, model: str, key: str) -> float:
        """Return a number in (0, 1)."""
        text = f"{self.spec.name}\0{model}\0{key}".encode(errors="surrogatepass")
        return (int.from_bytes(blake2b(text, digest_size=6).digest()) + 0.5) / 2**48
