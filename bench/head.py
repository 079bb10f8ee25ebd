"""The LM head with its cross-entropy by itself: forward and backward, five ways, and growth with rows and vocabulary.

- all logits: what a model's own forward does: every row projected, then cross-entropy;
- labelled rows: masked rows dropped first, then plain products;
- torch: `F.linear_cross_entropy` of torch 2.13, where there is one;
- Liger: its fused linear cross-entropy, on CUDA where it is installed;
- ours: `hydratune.fused_head.linear_cross_entropy` on the labelled rows.

    python bench/head.py --rows 512 --hidden 576 --vocabulary 49152
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from arms import OURS, alternate, machine, medians

ALL, LABELLED, TORCH, LIGER = "all logits", "labelled rows", "torch", "Liger"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--masked", type=float, default=0.6, help="share of rows without a label")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser.parse_args()


def ways() -> dict[str, Callable[[Any, Any, Any], Any]]:
    """Summed loss of rows [N, H], weight [V, H] and labels [N], -100 outside the loss, by name."""
    import torch
    import torch.nn.functional as F

    from hydratune.fused_head import linear_cross_entropy

    def every(rows, weight, labels):
        return F.cross_entropy((rows @ weight.t()).float(), labels, ignore_index=-100, reduction="sum")

    def kept(rows, labels):
        where = (labels != -100).nonzero().squeeze(1)
        return rows.index_select(0, where), labels.index_select(0, where)

    def labelled(rows, weight, labels):
        rows, labels = kept(rows, labels)
        return F.cross_entropy((rows @ weight.t()).float(), labels, reduction="sum")

    def ours(rows, weight, labels):
        rows, labels = kept(rows, labels)
        return linear_cross_entropy(rows, weight, labels)[0]

    made = {OURS: ours, ALL: every, LABELLED: labelled}
    if hasattr(F, "linear_cross_entropy"):
        made[TORCH] = lambda rows, weight, labels: F.linear_cross_entropy(
            rows, weight, labels, ignore_index=-100, reduction="sum"
        )
    if torch.cuda.is_available():
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError:
            return made
        liger = LigerFusedLinearCrossEntropyLoss(ignore_index=-100, reduction="sum")
        made[LIGER] = lambda rows, weight, labels: liger(weight, rows, labels)
    return made


def one_arm(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from hydratune.meter import host_peak

    cuda = torch.cuda.is_available()
    device, dtype = "cuda" if cuda else "cpu", getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    shape = {"generator": generator, "dtype": dtype}
    rows = torch.randn(options.rows, options.hidden, **shape).to(device).requires_grad_()
    weight = torch.randn(options.vocabulary, options.hidden, **shape).mul_(0.02).to(device).requires_grad_()
    labels = torch.randint(options.vocabulary, (options.rows,), generator=generator)
    labels[torch.rand(options.rows, generator=generator) < options.masked] = -100
    labels = labels.to(device)
    loss_of, times, cpu = ways()[options.arm], [], []
    before = torch.cuda.memory_allocated() if cuda else host_peak()
    for _ in range(options.repeats + 1):
        rows.grad = weight.grad = None
        start, began = time.perf_counter(), time.process_time()
        loss = loss_of(rows, weight, labels)
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - began)
    peak = (torch.cuda.max_memory_allocated() if cuda else host_peak()) - before
    return {
        "seconds": sorted(times[1:])[len(times) // 2 - 1],  # the first is warm-up
        "cpu_seconds": sorted(cpu[1:])[len(cpu) // 2 - 1],
        "peak_mib": peak / 2**20,
        "loss": loss.item(),
        "norms": [rows.grad.float().norm().item(), weight.grad.float().norm().item()],
    }


def main() -> None:
    options = parse()
    if options.arm:
        print(json.dumps(one_arm(options)))
        return
    results = alternate(__file__, [*ways()], options.rounds)
    found = medians(results)
    print(f"{options.rows} rows × {options.hidden}, vocabulary {options.vocabulary}, {options.masked:.0%} masked, "
          f"{options.dtype}; {machine()}\n")  # fmt: skip
    print(
        "| arm | ms | ours is faster by | by CPU time | memory MiB | loss off by | gradients off by |\n|---|---|---|---|---|---|---|"
    )
    ours, right = found[OURS], results[LABELLED][0]
    for arm, own in found.items():
        off = abs(own["loss"] - right["loss"]) / abs(right["loss"])
        norms = max(abs(a - b) / b for a, b in zip(results[arm][0]["norms"], right["norms"], strict=True))
        print(
            f"| {arm} | {1000 * own['seconds']:.0f} | {own['seconds'] / ours['seconds']:.2f}× "
            f"| {own['cpu_seconds'] / ours['cpu_seconds']:.2f}× | {own['peak_mib']:.0f} | {off:.1e} | {norms:.1e} |"
        )


if __name__ == "__main__":
    main()
