"""Which weights a merge adds to, where a run was trained on packed (quantised) ones: the original or those again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dora_cli.checkpoints.adapter_file import AdapterFile
from dora_cli.checkpoints.adapter_format import METHOD
from dora_cli.checkpoints.json_io import take
from dora_cli.errors import UserError
from dora_cli.models.quantised import KINDS, STORED, require_package, round_trip
from dora_cli.registry import did_you_mean

ORIGINAL, DEQUANTISED = "original", "dequantised"
BASE_WEIGHTS = (ORIGINAL, DEQUANTISED)


@dataclass(frozen=True)
class PackedBase:
    """How a base was packed in training.

    Attributes:
        kind: one of ``KINDS``.
        dtype: of the weights that were packed.
        modules: full name → whether the checkpoint stores that weight as (d_in, d_out).
    """

    kind: str
    dtype: torch.dtype
    modules: Mapping[str, bool]

    def trained_with(self, module: str) -> Callable[[Tensor], Tensor]:
        """From a weight as the checkpoint stores it to the one that the run multiplied with, float32, stored alike."""
        return partial(_trained_with, kind=self.kind, dtype=self.dtype, transposed=self.modules[module])


def _trained_with(weight: Tensor, kind: str, dtype: torch.dtype, transposed: bool) -> Tensor:
    weight = weight.to(dtype)
    return round_trip(weight.T.contiguous(), kind).T.contiguous() if transposed else round_trip(weight, kind)


def packed_base(adapter: AdapterFile, base_weights: str) -> PackedBase | None:
    """How the base has to be packed and unpacked before the adapter is added; None where it is taken as it is stored.

    Raises:
        UserError: no such choice, a run that was not trained on packed weights, or what is needed is not installed.
    """
    if base_weights not in BASE_WEIGHTS:
        raise UserError(f"unknown base_weights '{base_weights}'", hint=did_you_mean(base_weights, BASE_WEIGHTS))
    if base_weights == ORIGINAL:
        return None
    kind, file = adapter.quantization, adapter.folder / METHOD
    if kind is None:
        raise UserError(
            f"base_weights={DEQUANTISED}: {adapter.folder} was not trained on a quantised base, as far as it says",
            hint=f"leave base_weights out, or set base_weights={ORIGINAL}",
        )
    if kind == STORED:
        raise UserError(
            f"base_weights={DEQUANTISED}: {adapter.folder} was trained on a model that is stored quantised",
            hint="save it once as it is dequantised (transformers' model.dequantize()), and name that with base=",
        )
    if kind not in KINDS:
        raise UserError(f"{file} is damaged", where=f"no quantisation is called '{kind}'")
    require_package(kind)
    record = adapter.method["quantization"]
    modules = take(record, "modules", dict, file)
    dtype = getattr(torch, take(record, "dtype", str, file), None)
    if not all(isinstance(flag, bool) for flag in modules.values()) or not isinstance(dtype, torch.dtype):
        raise UserError(f"{file} is damaged", where="'quantization' does not say what was packed")
    return PackedBase(kind, dtype, modules)
