"""Means over images that come in batches and from several processes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Averages:
    """Sums of figures of `count` images, by name; two of them add up to those of both sets."""

    count: int
    sums: dict[str, float]

    @classmethod
    def of(cls, figures: dict[str, Tensor]) -> "Averages":
        """Of figures of the same images, each (N,)."""
        counts = {len(values) for values in figures.values()}
        if len(counts) != 1:
            raise ValueError(f"figures: expected the same number of images in each, got {sorted(counts)}")
        return cls(counts.pop(), {name: values.double().sum().item() for name, values in figures.items()})

    def __add__(self, other: "Averages") -> "Averages":
        return Averages(self.count + other.count, {name: v + other.sums[name] for name, v in self.sums.items()})

    def means(self) -> dict[str, float]:
        return {name: value / self.count for name, value in self.sums.items()}
