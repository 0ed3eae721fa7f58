"""What is measured: a case a line, with the config that both libraries are given."""

from __future__ import annotations

from typing import Any

Case = tuple[str, dict[str, Any]]

STEPS: dict[str, Case] = {
    "lora": ("LoraConfig", {"r": 16}),
    "lora, dropout 0.1": ("LoraConfig", {"r": 16, "lora_dropout": 0.1}),
    "dora": ("LoraConfig", {"r": 16, "use_dora": True}),
    "vera": ("VeraConfig", {"r": 64}),
    "pvera": ("PveraConfig", {"r": 64}),
    "adalora": ("AdaLoraConfig", {"init_r": 16, "target_r": 8, "total_step": 1000}),
    "delora": ("DeloraConfig", {"r": 16}),
    "miss": ("MissConfig", {"r": 16}),
    "gralora": ("GraloraConfig", {"r": 16}),
    "randlora": ("RandLoraConfig", {"r": 16}),
    "vblora": ("VBLoRAConfig", {"num_vectors": 64, "vector_length": 64, "topk": 2}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "beft": ("BeftConfig", {}),
    "road": ("RoadConfig", {}),
    "oft": ("OFTConfig", {"oft_block_size": 32}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "hra": ("HRAConfig", {"r": 8}),
    "psoft": ("PsoftConfig", {"r": 16}),
    "loha": ("LoHaConfig", {"r": 8}),
    "lokr": ("LoKrConfig", {"r": 8}),
    "hira": ("HiraConfig", {"r": 16}),
    "fourierft": ("FourierFTConfig", {}),
    "waveft": ("WaveFTConfig", {}),
    "c3a": ("C3AConfig", {"block_size": 64}),
    "shira": ("ShiraConfig", {"r": 16, "random_seed": 0}),
    "supertuning": ("SupertuningConfig", {}),
    "frod": ("FrodConfig", {"progressbar": False}),
}
TOKENS = ("lora", "dora", "vera", "ia3", "oft")
COMPILED = ("lora",)
MEMORY = ("lora", "lora, dropout 0.1", "dora")
MERGES = ("lora", "dora", "vera", "ia3", "oft", "loha")
MIXED = (1, 4, 16)

Aims = dict[str, tuple[float | None, float | None]]  # of bfloat16 and float32

_DENSE = (1.9, 1.7)
_LOW = (1.2, 1.15)
AIMS: Aims = {
    "lora": (1.12, 1.10), "lora, dropout 0.1": (1.20, 1.15), "dora": (1.25, 1.20), "ia3": (1.06, 1.04), "beft": (1.06, 1.04), "road": (1.06, 1.04),
    "oft": (1.35, 1.20), "boft": (1.35, 1.20), "hra": (1.40, 1.30),
} | dict.fromkeys(("vera", "pvera", "adalora", "delora", "miss", "gralora", "vblora", "psoft"), _LOW) | dict.fromkeys(
    ("loha", "lokr", "hira", "fourierft", "waveft", "c3a", "shira", "supertuning", "randlora", "frod"), _DENSE
)  # fmt: skip
TOKEN_AIMS: Aims = {"lora": (1.12, 1.10), "dora": (1.12, 1.10)}
