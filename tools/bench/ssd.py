"""The recurrence of Mamba-2 over packed sequences: torch's form in chunks beside the kernels of mamba-ssm and fla.

Each is first held to the numbers of torch's form: outputs, last states and gradients. Milliseconds forward and with
gradients, the best of several; on a GPU the least that moving the inputs and outputs once would take stands beside.
Predicted for an H200 (4.8 TB/s), 8,192 tokens, 32 heads of 64, states of 128: 0.03 ms for the bytes; a kernel within 20
times of that forward, torch's form within 10 times of the kernel, as it writes every chunk's matrices.

    python tools/bench/ssd.py [--tokens 8192] [--heads 32] [--head-dim 64] [--state 128] [--repeats 10]

A kernel that is not installed, or any of them without CUDA, is "not measured".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from posttrain.data import offsets_of
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.scan import Scan, by_fla, by_mamba_ssm, by_torch, scan_error
from posttrain_backends._torch.models.ssd import Packing
from posttrain_backends.families.mamba2 import Mamba2Shape

FORMS: dict[str, Scan] = {"torch": by_torch, "mamba_ssm": by_mamba_ssm, "fla": by_fla}
BANDWIDTH = 4.8e12
"""Bytes per second of an H200."""


def best(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Milliseconds of the fastest of several, after one that is not counted."""
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(1e3 * (time.perf_counter() - began))
    return min(found[1:])


def inputs(shape: Mamba2Shape, tokens: int, device: torch.device) -> tuple[list[torch.Tensor], Packing]:
    """x, dt, A, B and C of sequences of uneven length that are `tokens` together."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device)
    lengths = np.random.default_rng(0).multinomial(tokens - 8, np.full(8, 1 / 8)) + 1
    layout = Layout.from_offsets(offsets_of(lengths), device)
    given = [normal(tokens, shape.num_heads, shape.head_dim),
             torch.nn.functional.softplus(normal(tokens, shape.num_heads) - 3), -normal(shape.num_heads).exp(),
             *(normal(tokens, shape.n_groups, shape.state_size) for _ in range(2))]
    return [x.requires_grad_() for x in given], Packing.of(layout, shape.chunk_size, 4, final=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"tokens": 8192, "heads": 32, "head-dim": 64, "state": 128, "repeats": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    shape = Mamba2Shape(1, 1, 1, num_heads=given.heads, head_dim=given.head_dim, state_size=given.state, n_groups=1,
                        chunk_size=64)
    values, packing = inputs(shape, given.tokens, device)
    x, dt, A, B, C = values
    moved = sum(v.nbytes for v in values) + x.nbytes
    print(f"{given.tokens} tokens on {device.type}; {moved / 2**20:.0f} MiB in and out"
          + (f", {1e3 * moved / BANDWIDTH:.3f} ms on an H200" if device.type == "cuda" else ""))
    for name, form in FORMS.items():
        if name != "torch" and (device.type != "cuda" or find_spec(name) is None):
            print(f"{name:>10}  not measured ({'no CUDA device' if device.type != 'cuda' else 'not installed'})")
            continue
        error = scan_error(form, shape, device)
        assert error < 5e-3, f"{name} differs by {error:.1e}"

        def forward(form: Scan = form) -> torch.Tensor:
            return form(x, dt, A, B, C, packing)[0]

        def both(form: Scan = form) -> object:
            return torch.autograd.grad(form(x, dt, A, B, C, packing)[0].sum(), values)
        with torch.no_grad():
            alone = best(forward, given.repeats, device)
        print(f"{name:>10}  forward {alone:9.3f} ms, with gradients {best(both, given.repeats, device):9.3f} ms, "
              f"differs by {error:.1e}")


if __name__ == "__main__":
    main()
