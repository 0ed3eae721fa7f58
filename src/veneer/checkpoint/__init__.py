"""Saving and loading adapters. Files are PEFT's: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from .base import check_identity, fingerprint, get_base_model_state_dict, set_base_model_state_dict
from .card import update_card
from .hub import local_config, resolve_file
from .keys import HasSlots, Slot, slots
from .load import BIN_NAME, SAFETENSORS_NAME, START_NAME, AdapterFile, load_into, load_peft_weights, read_adapter, set_peft_model_state_dict
from .match import rename_keys
from .plan import LoadPlan, LoadReport, plan_load
from .save import folder_of, get_peft_model_state_dict, save_adapter, write_adapter

__all__ = [
    "BIN_NAME",
    "SAFETENSORS_NAME",
    "START_NAME",
    "AdapterFile",
    "HasSlots",
    "LoadPlan",
    "LoadReport",
    "Slot",
    "check_identity",
    "fingerprint",
    "folder_of",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_into",
    "load_peft_weights",
    "local_config",
    "plan_load",
    "read_adapter",
    "rename_keys",
    "resolve_file",
    "save_adapter",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "slots",
    "update_card",
    "write_adapter",
]
