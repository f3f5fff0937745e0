"""Two LoRA phases of one module in one copy of its weights: `python examples/device_manager.py`.

The manager takes any module whose Linears a LoRA names. After a switch the weights equal a fresh merge bit for bit.
"""

import torch
from torch import nn

from ltxkern.pipeline import LoRA, LoRAPhase, TwoStageDeviceManager
from ltxkern.pipeline.files.lora import NO_LORA, LoRAFactors


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(torch.bfloat16).requires_grad_(False)
    pristine = {name: weight.clone() for name, weight in model.state_dict().items()}
    factors = {
        name: LoRAFactors(
            torch.randn(4, module.in_features, dtype=torch.bfloat16),
            torch.randn(module.out_features, 4, dtype=torch.bfloat16) * 0.02,
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    distilled = LoRA("distilled", factors)
    first, second = LoRAPhase(((distilled, 0.25),)), LoRAPhase(((distilled, 0.5),))

    with TwoStageDeviceManager("inplace", device="cpu") as manager:
        manager.attach(model)
        manager.prepare(first, second)
        print(manager.describe())
        before = manager.block_checksums()
        with manager.stage("stage 1", forwards=1):
            model(torch.randn(2, 64, dtype=torch.bfloat16))
        manager.switch_lora_phase(second)
        with manager.stage("stage 2", forwards=1):
            model(torch.randn(2, 64, dtype=torch.bfloat16))
        manager.switch_lora_phase(first)
        assert manager.block_checksums() == before, "back in the first phase, bit for bit"
        manager.switch_lora_phase(NO_LORA)
    assert all(torch.equal(weight, pristine[name]) for name, weight in model.state_dict().items())
    print("both phases were run, and the pristine weights are back")


if __name__ == "__main__":
    main()
