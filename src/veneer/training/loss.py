"""The loss over a large vocabulary without ever holding the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.products import linear, mm

_ROWS = 128  # rows of logits that exist at a time


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ over rows of -log softmax(h Wᵀ + b)[label]; the gradient to h is made chunk by chunk in the forward, W is frozen."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor) -> Tensor:
        total = h.new_zeros((), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        dh = torch.empty_like(h) if wanted else None
        for i in range(0, h.shape[0], _ROWS):
            part, at = h[i : i + _ROWS], labels[i : i + _ROWS].unsqueeze(1)
            logits = linear(part, w, b).float()
            right, most = logits.gather(1, at), logits.amax(1, keepdim=True)
            p = logits.sub_(most).exp_()  # in place, and once for the loss and its gradient
            sums = p.sum(1, keepdim=True)
            total += (sums.log() + most - right).sum()
            if dh is not None:
                p.div_(sums).scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype))
                dh[i : i + _ROWS] = mm(p.to(h.dtype), w)
        ctx.save_for_backward(dh)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        (dh,) = ctx.saved_tensors
        return dh * dy.to(dh.dtype), None, None, None


def chunked_cross_entropy(h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor) -> tuple[Tensor, int]:
    """(sum of the losses, number of labels that count).

    Args:
        h: (rows, n) what the head reads;  w: (vocabulary, n) the head's frozen weight;  b: its bias or None.
        labels: (rows,); -100 does not count.
    """
    keep = labels != -100
    h, labels = h[keep], labels[keep]
    if not len(labels):
        return h.sum() * 0, 0
    return summed_cross_entropy(h, w, b, labels), len(labels)


def summed_cross_entropy(h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor) -> Tensor:
    """The sum of the losses where all labels count; arguments as in `chunked_cross_entropy`."""
    loss: Tensor = _ChunkedCrossEntropy.apply(h, w, b, labels)  # type: ignore[no-untyped-call]
    return loss


class Aside(nn.Module):
    """Stands in the head's place and hands on what the head would have read."""

    def forward(self, h: Tensor) -> Tensor:
        return h


class HeadlessLoss:
    """Next-token loss of a causal language model, its head run chunk by chunk.

    Only for models whose head is a plain frozen linear layer that nothing follows; `of` finds out by trying.
    """

    def __init__(self, inner: Any, path: str) -> None:
        self.inner, self.path = inner, path
        self.head: nn.Linear = inner.get_submodule(path)

    @classmethod
    def of(cls, model: Any) -> HeadlessLoss | None:
        """For this PeftModel, or None if the model's own loss has to be used."""
        loss = cls.at_head(model.get_base_model())
        if loss is None:
            return None
        head = loss.head
        ids = torch.arange(8, device=head.weight.device).unsqueeze(0)
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                out = model(input_ids=ids, labels=ids)
                theirs, logits = float(out.loss), out.logits.float()
                h = loss.hidden(model, {"input_ids": ids})
                (total, count), bare = loss.of_hidden(h, ids), head(h).float()
        except Exception:  # a model that cannot be run like this has a loss of its own
            return None
        finally:
            model.train(training)
        # capped logits, and a loss beside, may hardly show in the loss of a few tokens
        eps = torch.finfo(head.weight.dtype).eps
        if float((bare - logits).norm()) > max(eps, 1e-5) * float(logits.norm()) or getattr(out, "aux_loss", None) is not None:
            return None
        return loss if abs(float(total) / count - theirs) <= max(eps, 1e-4) * max(abs(theirs), 1.0) else None

    @classmethod
    def at_head(cls, inner: Any) -> HeadlessLoss | None:
        """For the head of a base model, untried; None if it has none that is a linear layer and frozen."""
        head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        if type(head) is not nn.Linear or any(p.requires_grad for p in head.parameters()):
            return None
        path = next((n for n, m in inner.named_modules() if m is head), "")
        return cls(inner, path) if path else None

    def hidden(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """(rows, length, n): what the head would have read."""
        parent, _, name = self.path.rpartition(".")
        owner = self.inner.get_submodule(parent)
        owner._modules[name] = Aside()
        more = {"use_cache": False} if "position_ids" in inputs else {}  # with a cache, transformers lets rows end to end see each other
        try:
            h: Tensor = model(**inputs, **more).logits
        finally:
            owner._modules[name] = self.head
        return h

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """(sum of the losses, number of labels that count)."""
        return self.of_hidden(self.hidden(model, {k: v for k, v in batch.items() if k != "labels"}), batch["labels"])

    def of_hidden(self, h: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """The same of what the head would have read (rows, length, n), and labels (rows, length)."""
        h = h[:, :-1].reshape(-1, h.shape[-1])
        return chunked_cross_entropy(h, self.head.weight, self.head.bias, labels[:, 1:].reshape(-1))


@torch.no_grad()
def keeps_rows_apart(model: Any, loss: HeadlessLoss) -> bool:
    """Whether rows laid end to end, with positions that start anew, come out as each alone: found out by trying.

    Not so where attention does not read the positions, or a layer mixes tokens by itself. Methods that look at rows, prompts among them, are left
    out untried: at their start they may change nothing.
    """
    if any(c.is_prompt_learning or getattr(c, "routes", False) or getattr(c, "unmergeable", "") for c in model.peft_config.values()):
        return False
    rows = [torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[5, 3, 1]]), torch.tensor([[2, 4, 6, 1]])]
    rows = [r.to(loss.head.weight.device) for r in rows]
    places = torch.cat([torch.arange(r.shape[1], device=r.device) for r in rows]).unsqueeze(0)
    training = model.training
    model.eval()
    try:
        alone = torch.cat([loss.hidden(model, {"input_ids": r}) for r in rows], 1).float()
        together = loss.hidden(model, {"input_ids": torch.cat(rows, 1), "position_ids": places}).float()
    except Exception:  # a model that takes no positions
        return False
    finally:
        model.train(training)
    rounding = torch.finfo(loss.head.weight.dtype).eps ** 0.5 / 3  # of all layers; rows that see each other differ by a tenth and more
    return alone.shape == together.shape and float((alone - together).norm()) <= rounding * float(alone.norm())
