"""What a calibration recorded, and how it becomes scaling factors.

Max calibration per tensor, as NVIDIA ModelOpt does it: the largest magnitude that the input of every linear
layer, every key after RoPE and every value took, in bf16. It knows numbers and names, no tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from minitron_build.errors import CheckpointError
from minitron_build.source.model_config import read_json_object

CALIBRATION_NAME = "calibration.json"
CALIBRATION_SCHEMA = 1

INPUT_OF = {
    "self_attn.q_proj": "qkv_input",
    "self_attn.k_proj": "qkv_input",
    "self_attn.v_proj": "qkv_input",
    "self_attn.o_proj": "o_input",
    "mlp.gate_proj": "gate_up_input",
    "mlp.up_proj": "gate_up_input",
    "mlp.down_proj": "down_input",
}
"""Each linear layer of a decoder layer, by HF name, and the site whose tensor it multiplies."""
KEY_SITE, VALUE_SITE = "k", "v"
SITES = (*dict.fromkeys(INPUT_OF.values()), KEY_SITE, VALUE_SITE)


@dataclass(frozen=True, slots=True)
class LayerAmax:
    """amax of one decoder layer at each of SITES; bf16 values, exact as floats."""

    sites: Mapping[str, float]

    def __post_init__(self) -> None:
        if set(self.sites) != set(SITES):
            raise ValueError(f"sites {sorted(self.sites)}, expected {sorted(SITES)}")

    def check(self, layer: int) -> None:
        """Refuse a layer whose ranges cannot be scaled.

        Raises:
            CheckpointError: a value that is not finite, or a linear layer that never saw anything but zeros.
        """
        for site, amax in self.sites.items():
            is_scaled_down = site not in (KEY_SITE, VALUE_SITE)
            if not isfinite(amax) or (is_scaled_down and amax <= 0):
                raise CheckpointError(
                    f"layer {layer}: amax of {site} is {amax}",
                    expected="a positive number",
                    todo="the weights or the calibration ids are broken: check the source checkpoint in bf16",
                )

    def of_input(self, linear: str) -> float:
        """Amax of what a linear layer (HF name in its decoder layer) multiplies."""
        return self.sites[INPUT_OF[linear]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A finished calibration.

    Attributes:
        data: what it was made with; see `CalibrationSet.as_dict`.
        source_digest: of the HF checkpoint's files, by name.
        layers: in model order.
    """

    data: Mapping[str, Any]
    source_digest: Mapping[str, str]
    layers: tuple[LayerAmax, ...]

    def dump(self) -> str:
        """The text of `calibration.json`."""
        record = {
            "schema": CALIBRATION_SCHEMA,
            "data": dict(self.data),
            "source": dict(self.source_digest),
            "layers": [dict(layer.sites) for layer in self.layers],
        }
        return json.dumps(record, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Inverse of `dump`, from a file.

        Raises:
            CheckpointError: no file, another schema, or a record that cannot be read.
        """
        raw = read_json_object(path)
        if raw.get("schema") != CALIBRATION_SCHEMA:
            raise CheckpointError(
                f"schema {raw.get('schema')!r}",
                expected=str(CALIBRATION_SCHEMA),
                where=str(path),
                todo="calibrate again",
            )
        try:
            layers = tuple(read_layer_amax(layer) for layer in raw["layers"])
            return cls(dict(raw["data"]), dict(raw["source"]), layers)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"a record that cannot be read ({error})", where=str(path), todo="calibrate again"
            ) from None


def read_layer_amax(raw: Mapping[str, Any]) -> LayerAmax:
    """A layer's record as JSON holds it."""
    return LayerAmax({str(site): float(amax) for site, amax in raw.items()})
