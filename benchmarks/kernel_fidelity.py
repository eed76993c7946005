"""How true DoRA's formulas stay in bf16: PEFT's, the published kernel's and ours, against fp64.

First the change that DoRA makes to a layer's output, from the same bf16 operands; then the logits
of a small network with DoRA on its 48 linear layers; then the row norm where B A is close to -W0.
What computes in bf16 is emulated: each operation in fp32, its result rounded once, as on tensor
cores and in PyTorch's kernels. This CPU would need 70 times longer for products of bf16 itself.

Run: python -m benchmarks.kernel_fidelity
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from polyadapt.benchmarks.kernel_fidelity_network import Arithmetic, Formula, Network
from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.core.kernels.dora_compose import dora_compose
from polyadapt.core.kernels.row_norm import factored, row_norm

BF16 = torch.bfloat16
WIDTHS = (0.0005, 0.0015, 0.005, 0.02, 0.1)  # of the gain; 2603.22276 found 0.0015 in an adapter
NETWORK_WIDTHS = (0.0015, 0.02)
BRANCH, SCALE = 0.01, 0.5  # |l| over |y0|, and s
ROWS, COLUMNS = 256, 4096


def peft_bf16(y: Tensor, bias: Tensor, lora: Tensor, m: Tensor, n: Tensor, s: float) -> Tensor:
    """PEFT 0.21.2 where model and factors are bf16, m and n, too: every operation rounds."""
    gain = m.to(BF16) / n.to(BF16)
    return (gain - 1) * (y - bias) + gain * lora * s


def peft_fp32(y: Tensor, bias: Tensor, lora: Tensor, m: Tensor, n: Tensor, s: float) -> Tensor:
    """With factors in fp32, as `get_peft_model` has them: x, n and all that follows is fp32."""
    gain = m.float() / n.float()
    return (gain - 1) * (y - bias) + gain * lora.float() * s


def published(y: Tensor, bias: Tensor, lora: Tensor, m: Tensor, n: Tensor, s: float) -> Tensor:
    """n and g rounded to bf16, (g - 1) y0 in bf16; the fp32 number s makes the branch fp32."""
    return published_from((m.float() / n.to(BF16).float()).to(BF16), y - bias, lora, s)


def published_exact(
    y: Tensor, bias: Tensor, lora: Tensor, m: Tensor, n: Tensor, s: float
) -> Tensor:
    """The same with an exact n: only the gain is rounded to the activations' dtype."""
    return published_from((m / n).to(BF16), y - bias, lora, s)


def published_from(gain: Tensor, y0: Tensor, lora: Tensor, s: float) -> Tensor:
    """The published kernel's arithmetic, as its compiled form was read."""
    return (((gain - 1) * y0).float() + gain.float() * (s * lora.float())).to(BF16)


def ours(y: Tensor, bias: Tensor, lora: Tensor, m: Tensor, n: Tensor, s: float) -> Tensor:
    """`dora_compose`: m, n and g in fp32, one rounding."""
    return dora_compose(y, lora, m.float() / n.float(), s, bias)


def ours_whole(y: Tensor, bias: Tensor, lora: Tensor, m: Tensor, n: Tensor, s: float) -> Tensor:
    """y and the change in one rounding."""
    return dora_compose(y, lora, m.float() / n.float(), s, bias, whole=True)


FORMULAS = (
    Formula("PEFT, bf16 factors", peft_bf16),
    Formula("PEFT, fp32 factors", peft_fp32, wide_branch=True),
    Formula("published", published),
    Formula("published, exact n", published_exact),
    Formula("ours", ours, ours_whole),
)


@dataclass(frozen=True)
class Score:
    """A found change beside the true one."""

    error: float  # ||found - true|| / ||true||
    share: float  # <found, true> / <true, true>: how much of it is there on average

    @staticmethod
    def of(found: Tensor, true: Tensor) -> Score:
        found, length = found.double(), true.norm().item()
        error = (found - true).norm().item() / length
        return Score(error, (found * true).sum().item() / length**2)

    def __str__(self) -> str:
        return f"{self.error:8.2g} {self.share:8.3f}"


def changes(width: float, seed: int = 0) -> dict[str, tuple[Score, Score]]:
    """Formula -> the change itself, and what of it is in a bf16 output."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    y, lora = normal(ROWS, COLUMNS).to(BF16), (BRANCH * normal(ROWS, COLUMNS)).to(BF16)
    bias, n = torch.zeros(COLUMNS, dtype=BF16), 1 + 0.2 * normal(COLUMNS).clamp(-3, 3)
    m = (1 + width * normal(COLUMNS)) * n
    true = (m / n - 1) * y.double() + m / n * SCALE * lora.double()
    found = {}
    for formula in FORMULAS:
        given = (y, bias, lora, m, n, SCALE)
        arrived = formula.output(*given).double() - y.double()
        found[formula.name] = Score.of(formula.delta(*given), true), Score.of(arrived, true)
    return found


def print_changes() -> None:
    print(f"The change itself, and what of it a bf16 output holds: {ROWS} x {COLUMNS} numbers,")
    print(f"|l| = {BRANCH:g} |y0|, s = {SCALE:g}, gains normal around 1")
    print(
        f"{'gain std':>9} {'formula':20} {'error':>8} {'share':>8} {'in y: error':>13} {'share':>8}"
    )
    for width in WIDTHS:
        for name, (itself, arrived) in changes(width).items():
            print(f"{width:9g} {name:20} {itself} {arrived.error:13.2g} {arrived.share:8.3f}")


def print_logits(images: int) -> None:
    print(f"\nLogits of ViT-Ti/16 with random weights, {images} random images, against fp64.")
    print("1 - cosine of the logits; error and share of what the adapter changes in them")
    head = f"{'gain std':>9} {'formula':20} {'all in bf16: 1 - cos':>20} {'error':>8} {'share':>8}"
    print(head + f" {'delta alone: 1 - cos':>22} {'error':>8} {'share':>8}")
    for width in NETWORK_WIDTHS:
        network = Network(width, images, SCALE)
        frozen = {of: network.frozen(of) for of in Arithmetic}
        exact = network.adapted(None, Arithmetic.EXACT)
        true = exact - frozen[Arithmetic.EXACT]
        for formula in FORMULAS:
            line = f"{width:9g} {formula.name:20}"
            for of, wide in ((Arithmetic.BF16, 20), (Arithmetic.EXACT, 22)):
                found = network.adapted(formula, of)
                line += f" {distance(found, exact):{wide}.1e} {Score.of(found - frozen[of], true)}"
            print(line)


def distance(found: Tensor, true: Tensor) -> float:
    """1 - the smallest cosine among the images."""
    found = found.double()
    cosines = (found * true).sum(1) / (found.norm(dim=1) * true.norm(dim=1))
    return 1 - float(cosines.min())


def norms(distance: float, rows: int = 64, columns: int = 512, rank: int = 8) -> dict[str, float]:
    """Largest relative errors in fp32 for W0 = -s B A + distance * noise of the same length."""
    made = torch.Generator().manual_seed(0)
    shapes = ((rank, columns), (rows, rank), (rows, columns))
    a, b, noise = (torch.randn(*shape, generator=made, dtype=torch.float64) for shape in shapes)
    update = SCALE * b @ a
    noise *= update.norm() / noise.norm()
    w0, a, b = (distance * noise - update).float(), a.float(), b.float()
    true = torch.linalg.vector_norm(w0.double() + SCALE * b.double() @ a.double(), dim=1)
    plain, believed = factored(w0, a, b, SCALE)
    found = {
        "exact": row_norm(w0, a, b, SCALE, "exact"),
        "factored": plain,
        "with its bound": row_norm(w0, a, b, SCALE, "factored"),
    }
    errors = {name: ((n.double() / true) - 1).abs().max().item() for name, n in found.items()}
    return errors | {"believed": believed.float().mean().item()}


def print_norms(distances: Iterable[float] = (100, 10, 1, 0.1, 1e-2, 1e-3)) -> None:
    print("\nRow norms in fp32, W0 = -s B A + d * noise of its length: largest relative error")
    print(f"{'d':>7} {'exact':>10} {'factored':>10} {'with its bound':>15} {'rows believed':>14}")
    for d in distances:
        found = norms(d)
        row = f"{d:7g} {found['exact']:10.1e} {found['factored']:10.1e}"
        print(row + f" {found['with its bound']:15.1e} {found['believed']:13.0%}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=8)
    asked = parser.parse_args()
    one_thread()
    print(machine("timm") + "\n")
    parts: list[Callable[[], None]] = [print_changes, lambda: print_logits(asked.images)]
    for part in (*parts, print_norms):
        part()


if __name__ == "__main__":
    main()
