"""From a cosine to how often it was right: a monotone table, measured on adapters that the encoder had not seen."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..hub.errors import FormatError


class Calibration(NamedTuple):
    """Points of a rising curve, straight between them: at `cosines[i]` the share `shares[i]` was right.

    cases: how many it was measured on; without any there are no points and nothing is claimed. chance: the share that
    was right at any cosine.
    """

    cosines: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    cases: int = 0
    chance: float = 0.0

    def __call__(self, cosine: float) -> float:
        """The measured share, 0 to 1; 0.0 where nothing was measured."""
        if not self.cosines:
            return 0.0
        return float(np.interp(cosine, self.cosines, self.shares))

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**self._asdict(), "cosines": list(self.cosines), "shares": list(self.shares)}

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """The inverse of `as_json`. Raises FormatError for what is no rising curve of shares."""
        try:
            points = tuple(map(float, data["cosines"])), tuple(map(float, data["shares"]))
            found = cls(*points, int(data["cases"]), float(data["chance"]))
        except (KeyError, TypeError, ValueError):
            raise FormatError("its calibration is no table of cosines and shares") from None
        rising = all(a <= b for row in found[:2] for a, b in pairwise(row))
        shares = (*found.shares, found.chance)
        if len(found.cosines) != len(found.shares) or not rising or not all(0 <= s <= 1 for s in shares):
            raise FormatError("its calibration is no rising curve of shares between 0 and 1")
        return found


def calibrate(cosines: ArrayLike, right: Sequence[bool] | ArrayLike) -> Calibration:
    """The isotonic regression of `right` (n,) on `cosines` (n,).

    Two wrong cases are added, one at 0 and one at the largest cosine seen: no number of successes makes certain, and
    what is far below all that was seen is worth little.
    """
    from sklearn.isotonic import IsotonicRegression

    x, y = np.asarray(cosines, np.float64), np.asarray(right, np.float64)
    if not len(x):
        return Calibration()
    curve = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
    curve.fit(np.append(x, [0.0, x.max()]), np.append(y, [0.0, 0.0]))
    points = tuple(curve.X_thresholds_.tolist()), tuple(curve.y_thresholds_.tolist())
    return Calibration(*points, len(x), float(y.mean()))
