"""EfficientNet-Lite0's convolutions learn scikit-learn's digits: accuracy before and after, in a hand-written loop."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import assets
import torch
from torch import Tensor, nn

EPOCHS, BATCH, SIZE = 2, 32, 64


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(training images, labels, held-out images, labels): 8 x 8 digits enlarged to SIZE, three equal channels in [-1, 1]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = nn.functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held = order[:1300], order[1300:]
    return images[train], labels[train], images[held], labels[held]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    model.eval()
    return float(torch.cat([model(part).argmax(1) for part in x.split(100)]).eq(y).float().mean())


def main() -> None:
    """Fetch, train, show."""
    from rich.progress import track

    import veneer

    torch.manual_seed(0)
    base: Any = assets.efficientnet()
    base._fc = nn.Linear(base._fc.in_features, 10)
    x, y, held_x, held_y = digits()
    convolutions = [name for name, m in base.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    config = veneer.LoraConfig(r=8, lora_alpha=8, target_modules=convolutions, modules_to_save=["_fc"])
    model = veneer.get_peft_model(base, config)
    model.print_trainable_parameters()
    before = accuracy(model, held_x, held_y)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    started = time.perf_counter()
    for epoch in range(EPOCHS):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # the running statistics belong to the frozen base
        batches = torch.randperm(len(y)).split(BATCH)
        for at in track(batches, description=f"epoch {epoch + 1}"):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()
    seconds = time.perf_counter() - started
    after = accuracy(model, held_x, held_y)
    out = Path(__file__).resolve().parents[2] / "runs" / "vision"
    model.save_pretrained(out)
    again = veneer.PeftModel.from_pretrained(model.unload(), out)
    loaded = accuracy(again, held_x, held_y)
    merged = accuracy(again.merge_and_unload(), held_x, held_y)
    print(
        f"\nheld-out accuracy {before:.1%} -> {after:.1%} in {seconds:.0f} s; loaded again {loaded:.1%}, merged {merged:.1%}; "
        f"the adapter is in {out}"
    )


if __name__ == "__main__":
    main()
