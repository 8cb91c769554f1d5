"""Windows in a config.json, and the layers that have one."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxformers.hf.architecture.parts import of_layer
from jaxformers.hf.config.entries import Config

# The two types of layers in a file: without and with a window.
FULL, SLIDING = "full_attention", "sliding_attention"
NO_ROPE = "no_rope_layers"  # 1 for each layer that rotates queries and keys, else 0
REPEATED = ("every", "first")  # patterns that one number defines


class Windows(NamedTuple):
    """The window, and the layers whose attention has it (they "slide").

    Arguments:
        default: the window if the file names none.
        pattern: the layers that slide if the file does not list the types of layers: "all" layers;
            "last", the layers from `max_window_layers` on; "odd", the first, third, ... layer
            before `max_window_layers`; "every", all but each n-th layer; "first", all but the first
            of each n layers; "still", the layers without rotary positions (SmolLM3).
        every: the number n, or its default if the file has `every_key`.
        enabled_key: the key of a switch that must be on; it is off by default.
        key: the key of the window.
        every_key: the key of n.
        typed: whether the file may list the types of layers.
        both_sides: whether the window of the file counts both sides of a token; here a window
            counts one side.
    """

    default: int | None
    pattern: str = "all"
    every: int = 1
    enabled_key: str | None = None
    key: str = "sliding_window"
    every_key: str | None = None
    typed: bool = True
    both_sides: bool = False

    @property
    def twice(self) -> bool:
        """Whether readers use different keys for the setting, so that all keys are written."""
        return True

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        enabled = self.enabled_key is None or config.get(self.enabled_key, False, "flag")
        config.used.add(self.key)
        window = config.get(self.key, self.default, "size", optional=True) if enabled else None
        if window is not None and self.both_sides:
            window = window // 2 + 1
        types = self._types(config, fields["num_layers"], window is not None)
        fields["_types"], fields["_window"] = types, window
        fields["attention.window"] = tuple(window if kind == SLIDING else None for kind in types)

    def _types(self, config: Config, layers: int, slides: bool) -> list[str]:
        keys = self.every_key, "max_window_layers" if self.pattern in ("last", "odd") else None
        config.used.update(key for key in keys if key is not None)
        given = config.get("layer_types", None, "list", optional=True) if self.typed else None
        if given is not None:
            if len(given) != layers or any(kind not in (FULL, SLIDING) for kind in given):
                raise ValueError(
                    f"config.json: layer_types must name {FULL!r} or {SLIDING!r} for each of the "
                    f"{layers} layers, got {given!r:.120}."
                )
            if SLIDING in given and not slides:
                config.refuse("layer_types", f"there is no {self.key} for {SLIDING!r}.")
            return given
        every = self.every
        if self.every_key is not None:
            every = config.get(self.every_key, self.every, "size")
        limit = config.get(keys[1], 28, "count") if keys[1] is not None else 0
        rotating = rotating_layers(config, layers) if self.pattern == "still" else []
        n = every if self.pattern in REPEATED else limit
        slides = slides or self.pattern in REPEATED
        sliding = [slides and self._slides(i, n, rotating) for i in range(layers)]
        return [SLIDING if slide else FULL for slide in sliding]

    def _slides(self, i: int, n: int, rotating: Sequence[bool] = ()) -> bool:
        """Returns whether layer i slides in the pattern with the number n."""
        match self.pattern:
            case "last":
                return i >= n
            case "odd":
                return i < n and i % 2 == 0
            case "every":
                return (i + 1) % n != 0
            case "first":
                return i % n != 0
            case "still":
                return not rotating[i]
        return True

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        windows = [of_layer(fields["attention.window"], i) for i in range(fields["num_layers"])]
        sizes = {window for window in windows if window is not None}
        if len(sizes) > 1:
            raise ValueError(f"layers have windows of different size, {sorted(sizes)}.")
        window = next(iter(sizes), None)
        if window is not None and self.both_sides:
            window = (window - 1) * 2
        if window is None and self.pattern in REPEATED:
            window = self.default  # no layer has the sliding type, so any number will do
        config[self.key] = window
        if self.enabled_key is not None:
            config[self.enabled_key] = bool(sizes)
        if self.typed:
            config["layer_types"] = [FULL if size is None else SLIDING for size in windows]
            self._write_pattern([size is not None for size in windows], config)

    def _write_pattern(self, slides: list[bool], config: dict[str, Any]) -> None:
        """Writes the number that expresses the types, for readers that do not know types."""
        key = "max_window_layers" if self.pattern == "last" else self.every_key
        if key is None or (self.pattern == "last" and not any(slides)):
            return
        config.pop(key, None)
        for n in range(self.pattern in REPEATED, len(slides) + 2):
            if slides == [self._slides(i, n) for i in range(len(slides))]:
                config[key] = n
                return


def rotating_layers(config: Config, layers: int) -> list[bool]:
    """Returns whether each layer has rotary positions, in files that may list this (SmolLM3)."""
    every = config.get("no_rope_layer_interval", 4, "size")
    given = config.get(NO_ROPE, None, "list", optional=True)
    given = [int((i + 1) % every != 0) for i in range(layers)] if given is None else given
    if len(given) != layers or any(x not in (0, 1) for x in given):
        raise ValueError(
            f"config.json: {NO_ROPE} must have 0 or 1 for each of the {layers} layers, got "
            f"{given!r:.80}."
        )
    return [x == 1 for x in given]
