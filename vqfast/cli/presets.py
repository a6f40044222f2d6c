"""`vqfast presets`: the configurations of the papers."""

from dataclasses import dataclass

from tqdm.auto import tqdm


@dataclass
class Presets:
    """List the models of the papers, with their parameters in millions."""

    def execute(self) -> None:
        from vqfast.models.presets import PRESETS

        bar = tqdm(PRESETS.items(), desc="counting", leave=False, delay=1)
        rows = [(name, preset.kind, f"{preset.parameters / 1e6:.2f} M", preset.source) for name, preset in bar]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        for name, kind, count, source in rows:
            print(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {count:>{widths[2]}}  {source}")
