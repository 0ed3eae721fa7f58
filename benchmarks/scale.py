"""Memory and communication of LoRA past the machines that tests have, by calculation: `python -m benchmarks.scale` prints the tables of docs/distributed.md.

Nothing is measured here. Per card; GB is 1e9 bytes. Weights and gradients in bf16 (2 bytes), the adapter in fp32 with AdamW (4 + 4 + 8 bytes a number).
Activations: with gradient checkpointing, the input of each block in bf16, for one sequence of `TOKENS` tokens; the peak inside one block is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

RANK, TOKENS = 16, 4096
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, an 8-bit scale for 64 weights, an fp32 one for 256 of those scales


@dataclass(frozen=True)
class Shape:
    """A Llama 3 model, from its config.json."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 128256

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(n_in, n_out) of a block's seven linear layers."""
        h, m, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        return [(h, h), (h, kv), (h, kv), (h, h), (h, m), (h, m), (m, h)]

    @property
    def packable(self) -> int:
        """Numbers in the blocks' linear layers."""
        return self.layers * sum(a * b for a, b in self.linears)

    @property
    def weights(self) -> int:
        """All numbers, embedding and head apart from each other."""
        return self.packable + 2 * self.vocab * self.hidden + (2 * self.layers + 1) * self.hidden

    @property
    def adapter(self) -> int:
        """Numbers of LoRA on all linear layers of the blocks."""
        return self.layers * sum(RANK * (a + b) for a, b in self.linears)

    @property
    def activations(self) -> int:
        """Bytes."""
        return 2 * self.layers * TOKENS * self.hidden


MODELS = [Shape("8B", 4096, 32, 32, 8, 14336), Shape("70B", 8192, 80, 64, 8, 28672), Shape("405B", 16384, 126, 128, 8, 53248)]


def ring(n: int) -> float:
    """The part of a message that a card sends in a ring's all-gather or reduce-scatter; an all-reduce is both."""
    return (n - 1) / n


def rows(m: Shape, n: int) -> list[tuple[str, float, float]]:
    """(layout, bytes a card holds, bytes it sends in a step of one sequence) on n cards."""
    packed = m.packable * NF4 + 2 * (m.weights - m.packable)
    trained, gradient, w = 16 * m.adapter, 4 * m.adapter, 2 * m.weights
    unit = w / m.layers  # gathered while it runs
    sums = m.layers * 6 * 2 * TOKENS * m.hidden * 2 * ring(8)  # two all-reduces a block: forwards, recomputed, backwards
    return [
        ("DDP, bf16", w + trained + m.activations, 2 * gradient * ring(n)),
        ("DDP, NF4 (QLoRA)", packed + trained + m.activations, 2 * gradient * ring(n)),
        ("FSDP2, bf16", (w + trained) / n + unit + m.activations, (2 * w + 3 * gradient) * ring(n)),
        ("TP 8 × DDP, bf16 (ideal)", w / 8 + trained + m.activations, sums + 2 * gradient * ring(n // 8)),
        ("full fine-tuning, FSDP2", 16 * m.weights / n + unit + m.activations, 3 * w * ring(n)),
    ]


def tables() -> str:
    """The page's tables."""
    out = ["| model | weights | LoRA r=16 | gradients of a step, LoRA (fp32) | full (bf16) |", "|---|---|---|---|---|"]
    for m in MODELS:
        out.append(
            f"| {m.name} | {m.weights / 1e9:.1f} G | {m.adapter / 1e6:.0f} M | {4 * m.adapter / 1e9:.2f} GB | {2 * m.weights / 1e9:.0f} GB |"
        )
    out += ["", "| model | layout | " + " | ".join(f"held, {n} cards | sent, {n}" for n in (8, 64, 1000)) + " |", "|---|---|" + "---|" * 6]
    for m in MODELS:
        for columns in zip(*(rows(m, n) for n in (8, 64, 1000)), strict=True):
            cells = " | ".join(f"{held / 1e9:.1f} GB | {sent / 1e9:.2f} GB" for _, held, sent in columns)
            out.append(f"| {m.name} | {columns[0][0]} | {cells} |")
    return "\n".join(out)


if __name__ == "__main__":
    print(tables())
