"""What must be settled before any test module is imported."""

import os

import torch
from hypothesis import HealthCheck, settings

# How long data take to be drawn says how busy the machine is.
settings.register_profile("any machine", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("any machine")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on the CPU, read as they are defined
